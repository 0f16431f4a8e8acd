"""What to type once a model is saved: to talk to it, compare, publish and serve it."""

import shlex

PLACEHOLDER = "USER/NAME"  # of a model on the hub


def next_steps(base: str, output_dir: str) -> dict[str, str]:
    """Return commands by what they are for, with paths quoted for a shell.

    Args:
        base: the model that was fine-tuned, as typed.
        output_dir: the folder of the saved model.
    """
    base, folder = shlex.quote(base), shlex.quote(output_dir)
    return {
        "talk to it": f"bash evaluation_scripts/run_chat.sh {folder}",
        "compare it with its base": f"bash evaluation_scripts/run_report.sh {base} {folder}",
        "publish it": f"hf upload {PLACEHOLDER} {folder} --exclude 'checkpoints/*'",
        **elsewhere(folder),
    }


def elsewhere(folder: str) -> dict[str, str]:
    """Return the commands of other programs that read the saved folder; `folder` is quoted already."""
    return {
        "serve it with vLLM": f"vllm serve {folder}",
        "convert it for llama.cpp": f"python convert_hf_to_gguf.py {folder} --outfile model.gguf",
    }


def next_steps_text(base: str, output_dir: str) -> str:
    """Return the commands as lines to print, under one heading."""
    steps = next_steps(base, output_dir)
    width = max(map(len, steps))
    return "\n".join(["What next:", *(f"  {purpose:<{width}}  {command}" for purpose, command in steps.items())])
