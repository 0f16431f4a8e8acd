"""Checkpoints: everything a run needs to resume, in folders that are complete or absent.

`{output_dir}/checkpoints/step-000100/` holds DeepSpeed's shards of weights and optimizer, the random states of every
rank, and `complete.json`, written last: position, arguments, layout, versions, and the size of every file. The
folder is written aside and renamed; one without that file, or with a file of another size, does not count.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import datasets
import deepspeed
import numpy as np
import torch
import transformers
from transformers import PreTrainedTokenizerBase

from utils.distributed.ranks import global_rank, is_rank_0, wait_for_all, world_size
from utils.distributed.zero3 import whole_numel
from utils.errors import UserError
from utils.export.hf_model import save_model_folder, settled
from utils.export.owned_files import keep_foreign
from utils.export.save import export_form
from utils.files import INCOMPLETE, remove_incomplete, replace_folder, sync, sync_tree, write_aside, write_json
from utils.machine.device import random_states, set_random_seed, set_random_states
from utils.module.quantized import plain_dtype
from utils.run_config import RunConfig
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


# --------------------------------------------------------------------------------------------- writing


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine,
    tokenizer: PreTrainedTokenizerBase,
    state: RunState,
    config: RunConfig,
    record: dict[str, Any],
) -> str:
    """Write a checkpoint of this position and drop those beyond `--save_total_limit`. Every rank must call it.

    Args:
        record: the rest of the marker's content (`resume.run_record`).

    Returns:
        its folder.

    Raises:
        UserError: it can't be written; earlier checkpoints are as they were.
    """
    root = checkpoints_folder(config.args.output_dir)
    name = f"step-{state.step:06d}"
    work = os.path.join(root, INCOMPLETE + name)
    try:
        if is_rank_0():
            remove_incomplete(root)
            os.makedirs(work)
            _check_space(engine, root, config.save_only_model)
        wait_for_all()
        if config.save_only_model:
            form = export_form(config, tokenizer)
            save_model_folder(settled(engine), tokenizer, work, form.describe, form.max_shard_size)
        else:
            # Frozen weights are those of the model the run started from: only what trains is written.
            engine.save_checkpoint(root, INCOMPLETE + name, save_latest=False, exclude_frozen_parameters=True)
            torch.save(random_states(), os.path.join(work, _random_file(global_rank())))
        wait_for_all()
        if is_rank_0():
            kind = "model" if config.save_only_model else "full"
            _publish(work, os.path.join(root, name), {**record, "kind": kind, "state": state.to_dict()})
            if not config.save_only_model:
                with write_aside(os.path.join(root, LATEST)) as file:
                    file.write(name.encode())
            drop_old(root, config.args.save_total_limit)
        wait_for_all()
    except BaseException as err:
        if is_rank_0():  # another rank must not take the folder away under those that still write
            shutil.rmtree(work, ignore_errors=True)
        if not _is_writing_failure(err):
            raise
        raise UserError(_failed_words(root, state.step, err)) from err
    return os.path.join(root, name)


def _is_writing_failure(err: BaseException) -> bool:
    """Whether writing failed: torch.save reports a full disk as an error of its own, not as an OSError."""
    known = isinstance(err, (OSError, UserError))
    return known or any(word in str(err) for word in ("PytorchStreamWriter", "inline_container", "Parent directory"))


def _failed_words(root: str, step: int, err: BaseException) -> str:
    complete, _ = list_checkpoints(root)
    try:
        free = f"{shutil.disk_usage(root).free / 1e9:.2f} GB are free there"
    except OSError as gone:
        free = f"the folder is gone ({gone})"
    last = f"The last good checkpoint is {complete[-1].folder}" if complete else "There is no earlier checkpoint"
    return (
        f"the checkpoint of step {step} can't be written below {root}: {err} ({free}). {last}. Make room (or lower "
        "--save_total_limit) and start again with --resume_from_checkpoint latest."
    )


def checkpoint_bytes(engine: deepspeed.DeepSpeedEngine, only_model: bool) -> int:
    """Estimate the bytes of a checkpoint over all ranks: trained weights, in 16 bits a float32 copy, Adam's moments."""
    total = 0
    for parameter in engine.module.parameters():
        numel = whole_numel(parameter)
        size = plain_dtype(parameter).itemsize
        if only_model:
            total += numel * size
        elif parameter.requires_grad:
            total += numel * (size + 8 + (4 if size < 4 or engine.zero_optimization_stage() > 0 else 0))
    return total


def _check_space(engine: deepspeed.DeepSpeedEngine, root: str, only_model: bool) -> None:
    needed, free = checkpoint_bytes(engine, only_model), shutil.disk_usage(root).free
    if free < needed:
        raise UserError(f"it takes about {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB left")


def _publish(work: str, folder: str, info: dict[str, Any]) -> None:
    """Sync all files, write the marker with their sizes, and give the folder its name."""
    files = sync_tree(work)
    versions = {module.__name__: module.__version__ for module in (torch, deepspeed, transformers, datasets, np)}
    write_json(os.path.join(work, MARKER), {"format": FORMAT, **info, "versions": versions, "files": files})
    sync(os.path.join(work, MARKER))
    replace_folder(work, folder)


def drop_old(root: str, limit: int | None) -> None:
    """Remove the oldest complete checkpoints beyond `limit`; renamed first, so that none is ever half there."""
    complete, _ = list_checkpoints(root)
    for checkpoint in complete[:-limit] if limit else []:
        keep_foreign(checkpoint.folder, {MARKER, *checkpoint.info["files"]})
        doomed = os.path.join(root, INCOMPLETE + os.path.basename(checkpoint.folder))
        os.rename(checkpoint.folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


# ------------------------------------------------------------------------------------- random states


def _random_file(rank: int) -> str:
    return f"random_rank_{rank}.pt"


def restore_random_states(checkpoint: Checkpoint, seed: int) -> None:
    """Set this rank's random states to the checkpoint's, or, on another number of ranks, to fresh ones."""
    if checkpoint.info["layout"]["ranks"] != world_size():
        fresh = np.random.SeedSequence([seed, checkpoint.state.step, global_rank()]).generate_state(1)
        set_random_seed(int(fresh[0]))
        return
    path = os.path.join(checkpoint.folder, _random_file(global_rank()))
    set_random_states(torch.load(path, map_location="cpu", weights_only=False))
