"""`--output_dir`: what is in it that no run wrote is never replaced, and one run at a time has it."""

import json
import os
import socket
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timezone

from utils.checkpoint.checkpoint_folder import FOLDER, MARKER, NAME, checkpoints_folder
from utils.checkpoint.checkpointer import NAME as BEST_MODEL
from utils.checkpoint.checkpointer import RECORD
from utils.distributed.ranks import answer_of_rank_0, is_rank_0
from utils.errors import UserError
from utils.export.owned_files import (
    ADAPTER_FOLDER,
    LIST,
    STRAY_ADAPTER,
    changed_files,
    is_run_folder,
    owned_files,
    record_files,
    saved_names,
    withdraw_list,
)
from utils.files import INCOMPLETE, RUN_FILE, free_lock, remove_incomplete, try_lock
from utils.logging.console import say
from utils.logging.library_log import LOG_FILE
from utils.logging.metrics_file import METRICS_FILE, SAMPLES_FILE

LOCK = ".running"  # says who has the folder, while a run has it
RUN_FILES = {LIST, LOCK, RUN_FILE, METRICS_FILE, SAMPLES_FILE, LOG_FILE, "training.log", FOLDER, ADAPTER_FOLDER}
SHOWN = 5

_held: list[tuple[str, int, bool]] = []  # locks of this process: path, descriptor, whether the folder is new


def check_output_folder(args: Namespace) -> None:
    """Check that a run may write into `--output_dir`: it is not the base model's folder, and nothing would be lost.

    Raises:
        UserError: what is in the way, and what to do.
    """
    folder = args.output_dir
    if not folder or not folder.strip():  # none, or named among wrong values
        return
    _check_apart_from_base(folder, args.model_name_or_path)
    for record in (MARKER, RECORD):
        if os.path.isfile(os.path.join(folder, record)):
            raise UserError(f"--output_dir {folder} is a checkpoint or best model of a run: give another folder.")
    foreign = list(_foreign_files(folder, args.save_lora_adapter, args.sample_prompts is not None))
    if foreign:
        edited = [name for name in changed_files(folder) if name in foreign]
        note = (
            f" ({_shown(edited)} {'was' if len(edited) == 1 else 'were'} changed after it was saved)" if edited else ""
        )
        raise UserError(
            f"--output_dir {folder} holds what no run of this program wrote, and a run would replace it or its saved "
            f"model would be read with it: {_shown(foreign)}{note}. Move it away, or give another --output_dir."
        )


def _check_apart_from_base(folder: str, base: str) -> None:
    """Check that the run does not write where the model it starts from is read."""
    output = os.path.realpath(folder)
    for place in _base_folders(base):
        real = os.path.realpath(place)
        if real == output or (os.path.exists(output) and os.path.samefile(real, output)):
            raise UserError(
                f"--output_dir {folder} is the folder of the base model ({place}): the run would overwrite the model "
                "it starts from. Give another --output_dir."
            )
        managed = [os.path.join(output, name) for name in (FOLDER, ADAPTER_FOLDER)]
        if any(os.path.commonpath([real, own]) == own for own in managed):
            raise UserError(
                f"the base model {place} lies in a folder that a run with --output_dir {folder} fills and empties "
                "itself. Give another --output_dir, or copy the model elsewhere."
            )


def _base_folders(base: str) -> Iterator[str]:
    """Yield the folder of the base model and, for a PEFT adapter, of the model below it."""
    if not os.path.isdir(base):
        return
    yield base
    try:
        with open(os.path.join(base, "adapter_config.json"), encoding="utf-8") as file:
            below = json.load(file)["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if isinstance(below, str) and os.path.isdir(below):
        yield below


def _foreign_files(folder: str, with_adapter: bool, with_samples: bool) -> Iterator[str]:
    """Yield what no run wrote and a run would replace, or leave where loaders read it with the saved model."""
    if not os.path.isdir(folder):
        return
    owned, is_run = owned_files(folder), is_run_folder(folder)
    records = (RUN_FILE, METRICS_FILE, *[SAMPLES_FILE] * with_samples)
    for name in saved_names(folder):
        if name not in owned and (with_adapter or not name.startswith(f"{ADAPTER_FOLDER}/")):
            yield name
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if (
            STRAY_ADAPTER.fullmatch(name)
            or (name in records and not is_run)
            or (name in (FOLDER, ADAPTER_FOLDER) and not os.path.isdir(path))
        ):
            yield name
    root = checkpoints_folder(folder)
    for name in sorted(os.listdir(root)) if os.path.isdir(root) and not is_run else []:
        record = MARKER if NAME.fullmatch(name) else RECORD if name == BEST_MODEL else None
        if record is not None and not os.path.isfile(os.path.join(root, name, record)):
            yield f"{FOLDER}/{name}"


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


# ------------------------------------------------------------------------------------------ one run at a time


def claim_output_folder(args: Namespace) -> None:
    """Take `--output_dir` for this run, and print what in it is not a run's. Every rank must call it; rank 0 locks.

    The lock is the system's, on `.running` in the folder: it ends with the process, however that ends.

    Raises:
        UserError: another run has the folder, or something of somebody else's is in the way.
    """
    if args.output_dir is None or args.dry_run:
        return
    problem = answer_of_rank_0(_claim(args) if is_rank_0() else None)
    if problem is not None:
        raise UserError(problem)


def _claim(args: Namespace) -> str | None:
    """Lock the folder and list what earlier runs wrote in it; returns what is in the way."""
    folder = args.output_dir
    path = os.path.join(os.path.realpath(folder), LOCK)
    now = datetime.now(timezone.utc).isoformat(sep=" ", timespec="seconds")
    is_new = not os.path.isdir(folder)
    try:
        os.makedirs(folder, exist_ok=True)
        descriptor, holder = try_lock(path, f"process {os.getpid()} on {socket.gethostname()}, started {now}\n")
    except OSError as err:
        say(f"{folder} can't be locked ({err}): a second run on it would not be noticed")
    else:
        if descriptor is None:
            return (
                f"--output_dir {folder} is in use by another run ({holder or 'which has just begun'}): wait for its "
                "end or stop it, or give another --output_dir."
            )
        _held.append((path, descriptor, is_new))
    try:
        check_output_folder(args)
        remove_incomplete(folder)
        record_files(folder, owned_files(folder))
    except UserError as err:
        return str(err)
    except OSError as err:
        return f"--output_dir {folder} can't be written ({err}): give a folder you may write to."
    others = other_files(folder)
    if others:
        say(f"In {folder} no run wrote: {_shown(others)}. It stays as it is")
    return None


def other_files(folder: str) -> list[str]:
    """List what lies in `folder` and is neither a run's nor in its way."""
    owned = {name.partition("/")[0] for name in owned_files(folder)} | RUN_FILES
    return [name for name in sorted(os.listdir(folder)) if name not in owned and not name.startswith(INCOMPLETE)]


def release_output_folder() -> None:
    """Free the folder that this process has claimed; a run that ended before it wrote anything leaves no trace."""
    while _held:
        path, descriptor, is_new = _held.pop()
        folder = os.path.dirname(path)
        with suppress(OSError):
            withdraw_list(folder)
        free_lock(path, descriptor)
        if is_new:
            with suppress(OSError):
                os.rmdir(folder)  # only if it is empty
