"""Checkpoints: everything a run needs to resume, in folders that are complete or absent.

`{output_dir}/checkpoints/step-000100/` holds DeepSpeed's shards of weights and optimizer, the random states of every
rank, and `complete.json`, written last: position, arguments, layout, versions, and the size of every file. The
folder is written aside and renamed; one without that file, or with a file of another size, does not count.
"""

import json
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from utils.distributed.ranks import global_rank, world_size
from utils.errors import UserError
from utils.machine.device import set_random_seed, set_random_states
from utils.train.state import RunState

FOLDER = "checkpoints"
MARKER = "complete.json"
LATEST = "latest"  # DeepSpeed's own name of the file that names the newest checkpoint: its zero_to_fp32.py reads it
FORMAT = 1
NAME = re.compile(r"step-(\d{6,})")


class Checkpoint(NamedTuple):
    """A complete checkpoint on disk."""

    folder: str
    info: dict[str, Any]  # what its marker says

    @property
    def state(self) -> RunState:
        """Return the position of the run when the checkpoint was written."""
        return RunState.from_dict(self.info["state"])


def checkpoints_folder(output_dir: str) -> str:
    """Return the folder of a run's checkpoints."""
    return os.path.join(output_dir, FOLDER)


def read_checkpoint(folder: str) -> Checkpoint:
    """Read the checkpoint in `folder`; a UserError says why it is not a complete one."""
    try:
        with open(os.path.join(folder, MARKER), encoding="utf-8") as file:
            info = json.load(file)
        files, version = info["files"], info["format"]
        RunState.from_dict(info["state"])
    except FileNotFoundError as err:
        raise UserError(f"{folder} is no complete checkpoint: it has no {MARKER}.") from err
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise UserError(f"{folder} is no complete checkpoint: its {MARKER} can't be read ({err}).") from err
    if version != FORMAT:
        raise UserError(
            f"{folder} was written in format {version}, not {FORMAT}: resume it with the code that wrote it."
        )
    for name, size in files.items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise UserError(f"{folder} is damaged: {name} is missing.")
        if os.path.getsize(path) != size:
            raise UserError(f"{folder} is damaged: {name} has {os.path.getsize(path)} bytes where {size} were written.")
    return Checkpoint(folder, info)


def list_checkpoints(root: str) -> tuple[list[Checkpoint], list[str]]:
    """Return (the complete checkpoints below `root`, oldest first; why each of the others is not complete)."""
    complete, problems = [], []
    for name in sorted(os.listdir(root), key=lambda name: (len(name), name)) if os.path.isdir(root) else []:
        if NAME.fullmatch(name):
            try:
                complete.append(read_checkpoint(os.path.join(root, name)))
            except UserError as err:
                problems.append(str(err))
    return complete, problems


def find_checkpoint(
    output_dir: str | None, wanted: str | None, say: Callable[[str], None] = lambda line: None
) -> Checkpoint | None:
    """Return the checkpoint that `--resume_from_checkpoint` names; None for a run from the start.

    Args:
        wanted: a checkpoint's folder, "latest", or None.
        say: gets a line on each decision made here.

    Raises:
        UserError: PATH is no complete checkpoint, or holds a model alone; or `--output_dir` already has checkpoints
            from further on, which the new ones would be mixed up with.
    """
    complete, problems = list_checkpoints(checkpoints_folder(output_dir)) if output_dir else ([], [])
    resumable = [checkpoint for checkpoint in complete if checkpoint.info["kind"] == "full"]
    if wanted == "latest":
        for problem in problems:
            say(f"Not used: {problem}")
        if not resumable:
            say(f"No checkpoint in {output_dir} to go on from: starting anew")
        return resumable[-1] if resumable else None
    found = read_checkpoint(wanted) if wanted is not None else None
    if found is not None and found.info["kind"] != "full":
        raise UserError(f"{wanted} holds a model alone (--save_only_model): a run can't go on from it.")
    later = [checkpoint for checkpoint in complete if found is None or checkpoint.state.step > found.state.step]
    if later:
        raise UserError(
            f"{output_dir} holds checkpoints of an earlier run, the last {later[-1].folder}: go on from it with "
            f"--resume_from_checkpoint latest, or remove {checkpoints_folder(output_dir)}, or give another "
            "--output_dir."
        )
    return found


# ------------------------------------------------------------------------------------- random states


def random_file(rank: int) -> str:
    """Return the name of the file with the random states of a rank."""
    return f"random_rank_{rank}.pt"


def restore_random_states(checkpoint: Checkpoint, seed: int) -> None:
    """Set this rank's random states to the checkpoint's, or, on another number of ranks, to fresh ones."""
    if checkpoint.info["layout"]["ranks"] != world_size():
        fresh = np.random.SeedSequence([seed, checkpoint.state.step, global_rank()]).generate_state(1)
        set_random_seed(int(fresh[0]))
        return
    path = os.path.join(checkpoint.folder, random_file(global_rank()))
    set_random_states(torch.load(path, map_location="cpu", weights_only=False))
