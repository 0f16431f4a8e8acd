"""What to type once a model is saved: to talk to it, compare, publish and serve it."""

import json
import os
import shlex

from utils.export import other_programs

PLACEHOLDER = "USER/NAME"  # of a model on the hub


def next_steps(base: str, output_dir: str, architecture: str | None) -> dict[str, str]:
    """Return commands by what they are for, with paths quoted for a shell.

    Args:
        base: the model that was fine-tuned, as typed.
        output_dir: the folder of the saved model.
        architecture: of `saved_architecture`.
    """
    base, folder = shlex.quote(base), shlex.quote(output_dir)
    return {
        "talk to it": f"bash evaluation_scripts/run_chat.sh {folder}",
        "compare it with its base": f"bash evaluation_scripts/run_report.sh {base} {folder}",
        "publish it": f"hf upload {PLACEHOLDER} {folder} --exclude 'checkpoints/*'",
        **other_programs.commands(folder, architecture),
    }


def saved_architecture(folder: str) -> str | None:
    """Return the model class that config.json in `folder` names; None where it names none."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            return (json.load(file).get("architectures") or [None])[0]
    except (OSError, ValueError):
        return None


def next_steps_text(base: str, output_dir: str) -> str:
    """Return the commands for the saved model as lines to print, under one heading."""
    architecture = saved_architecture(output_dir)
    steps = next_steps(base, output_dir, architecture)
    width = max(map(len, steps))
    lines = [f"  {purpose:<{width}}  {command}" for purpose, command in steps.items()]
    return "\n".join(["What next:", *lines, *(f"  {note}" for note in other_programs.notes(architecture))])
