"""Write checkpoints: at once, or copied into memory first and written while the training goes on.

Either way a checkpoint is written aside, gets its marker last and then its name; `checkpoint_folder.py` says what
counts.
"""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any, NamedTuple

import datasets
import deepspeed
import numpy as np
import torch
import transformers
from transformers import PreTrainedTokenizerBase

from utils.checkpoint.checkpoint_folder import FORMAT, LATEST, MARKER, checkpoints_folder, list_checkpoints, random_file
from utils.checkpoint.held_files import held_in_memory, write_files
from utils.distributed.ranks import global_rank, is_rank_0, wait_for_all
from utils.distributed.zero3 import whole_numel
from utils.errors import UserError
from utils.export.hf_model import save_model_folder, settled
from utils.export.owned_files import keep_foreign
from utils.export.save import export_form
from utils.files import INCOMPLETE, remove_incomplete, replace_folder, sync, sync_tree, write_aside, write_json
from utils.machine.device import random_states
from utils.module.quantized import plain_dtype
from utils.run_config import RunConfig
from utils.train.state import RunState


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
    work = os.path.join(root, INCOMPLETE + _name(state.step))
    with _told_if_it_fails(root, state.step):
        _make_room(engine, root, work, config.save_only_model)
        if config.save_only_model:
            form = export_form(config, tokenizer)
            save_model_folder(settled(engine), tokenizer, work, form.describe, form.max_shard_size)
        else:
            _write_states(engine, root, state.step)
        return _complete(root, state.to_dict(), record, config)


class Begun(NamedTuple):
    """A checkpoint whose files are being written while the training goes on."""

    state: dict[str, Any]
    record: dict[str, Any]
    writing: Future  # this rank's files


def begin_checkpoint(
    engine: deepspeed.DeepSpeedEngine, state: RunState, config: RunConfig, record: dict[str, Any], writer: Executor
) -> Begun:
    """Copy the states of this position into CPU memory and begin to write them. Every rank must call it.

    The checkpoint counts once `finish_checkpoint` has been called. Raises as `save_checkpoint` does.
    """
    root = checkpoints_folder(config.args.output_dir)
    with _told_if_it_fails(root, state.step):
        _make_room(engine, root, os.path.join(root, INCOMPLETE + _name(state.step)), False)
        with held_in_memory(engine) as files:
            _write_states(engine, root, state.step)
    return Begun(state.to_dict(), record, writer.submit(write_files, files))


def finish_checkpoint(begun: Begun, config: RunConfig) -> str:
    """Wait for the files of all ranks and publish the checkpoint, as `save_checkpoint` does. Every rank must call it.

    Returns:
        its folder.

    Raises:
        UserError: it could not be written; earlier checkpoints are as they were.
    """
    root = checkpoints_folder(config.args.output_dir)
    with _told_if_it_fails(root, begun.state["step"]):
        begun.writing.result()
        return _complete(root, begun.state, begun.record, config)


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _make_room(engine: deepspeed.DeepSpeedEngine, root: str, work: str, only_model: bool) -> None:
    """Make the folder that a checkpoint is written in; UserError where the disk is too small for it."""
    if is_rank_0():
        remove_incomplete(root)
        os.makedirs(work)
        _check_space(engine, root, only_model)
    wait_for_all()


def _write_states(engine: deepspeed.DeepSpeedEngine, root: str, step: int) -> None:
    """Write this rank's states below `root`, or where the engine's checkpoints go now (`held_in_memory`)."""
    # Frozen weights are those of the model the run started from: only what trains is written.
    engine.save_checkpoint(root, INCOMPLETE + _name(step), save_latest=False, exclude_frozen_parameters=True)
    path = os.path.join(root, INCOMPLETE + _name(step), random_file(global_rank()))
    engine.checkpoint_engine.save(random_states(), path)


def _complete(root: str, state: dict[str, Any], record: dict[str, Any], config: RunConfig) -> str:
    """Publish what all ranks have written and drop the checkpoints that are too many; return the folder."""
    name = _name(state["step"])
    wait_for_all()
    if is_rank_0():
        kind = "model" if config.save_only_model else "full"
        info = {**record, "kind": kind, "state": state}
        _publish(os.path.join(root, INCOMPLETE + name), os.path.join(root, name), info)
        if not config.save_only_model:
            with write_aside(os.path.join(root, LATEST)) as file:
                file.write(name.encode())
        drop_old(root, config.args.save_total_limit)
    wait_for_all()
    return os.path.join(root, name)


@contextmanager
def _told_if_it_fails(root: str, step: int) -> Iterator[None]:
    """Remove what was begun where writing fails, and say what is left."""
    try:
        yield
    except BaseException as err:
        if is_rank_0():  # another rank must not take the folder away under those that still write
            shutil.rmtree(os.path.join(root, INCOMPLETE + _name(step)), ignore_errors=True)
        if not _is_writing_failure(err):
            raise
        raise UserError(_failed_words(root, step, err)) from err


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
