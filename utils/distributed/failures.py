"""End a run that failed or was stopped: print one error, from the first rank that failed, and set the exit status."""

import os
import sys
import tempfile
import time
import traceback
from typing import NoReturn

import torch
import torch.distributed as dist

from utils.errors import EXIT_USER_ERROR, UserError
from utils.logging.console import current_stage, say
from utils.logging.library_log import LOG

EXIT_CRASH = 1
EXIT_INTERRUPTED = 75  # "try again later" (EX_TEMPFAIL of sysexits.h): stopped as asked, can be resumed
EXIT_BY_SIGINT = 130
EXIT_BY_SIGPIPE = 141  # as a shell reports a program that writes to a pipe nobody reads
FIRST_ERROR = "first_error"
# What torch, gloo and NCCL say to a rank whose peer has gone.
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "remote process")
MEMORY_ADVICE = (
    "lower --per_device_train_batch_size (and raise --gradient_accumulation_steps by as much), add "
    "--gradient_checkpointing, raise --zero_stage, add --offload, or train with --lora_dim; with long rows add "
    "--tiled_mlp or --sequence_parallel_size; --dry_run shows what each needs, and --fit chooses."
)
SCALE_ADVICE = (
    "fp16 can't hold this model's gradients: the loss scale reached its minimum and every step was skipped. Use "
    "--dtype bf16 (or fp32)."
)


class Interrupted(Exception):
    """The run was stopped as asked, between two steps; the message says how to resume it."""


def as_user_error(err: BaseException) -> UserError | None:
    """Return an error that the user can correct, with advice; None for everything else."""
    if isinstance(err, UserError):
        return err
    if isinstance(err, torch.OutOfMemoryError):
        return UserError(f"the device ran out of memory ({err}): {MEMORY_ADVICE}")
    if isinstance(err, MemoryError) or "can't allocate memory" in str(err):
        where = f"while {current_stage()} ({err or 'MemoryError'})"
        return UserError(f"this machine ran out of memory {where}: {MEMORY_ADVICE}")
    if "loss scale already at minimum" in str(err):
        return UserError(SCALE_ADVICE)
    return None


def end_run(err: BaseException, rank: int) -> NoReturn:
    """Print what ended the run and exit.

    The status is 2 for the user's own mistakes; 75 and 130 for a run that was stopped; 1 for the rest, whose traceback
    goes to a file. A rank that only lost its connection repeats the first rank's error instead of its own.
    """
    if isinstance(err, SystemExit):
        raise err
    if isinstance(err, Interrupted):
        _say_on_rank_0(str(err), rank)
        sys.exit(EXIT_INTERRUPTED)
    if isinstance(err, KeyboardInterrupt):
        _say_on_rank_0(f"stopped while {current_stage()}; checkpoints written so far are as they were", rank)
        sys.exit(EXIT_BY_SIGINT)
    known = as_user_error(err)
    prefix = f"[rank {rank}] " if rank > 0 else ""
    if known is None and _is_lost_peer(err):
        print(
            f"{prefix}stopped: {_first_error() or 'another rank is gone; what it said stands above'}", file=sys.stderr
        )
        sys.stderr.flush()
        os._exit(EXIT_CRASH)  # not sys.exit: threads of a broken process group may never end
    words = describe_failure(err)
    _publish(f"rank {rank} failed first: {words}")
    if known is not None:
        if rank > 0:
            time.sleep(10)  # most mistakes are everyone's: rank 0 speaks first, and one message is enough
        print(f"{prefix}error: {known}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
    print(f"{prefix}error: {words} ({keep_traceback(err)})", file=sys.stderr, flush=True)
    sys.exit(EXIT_CRASH)


def describe_failure(err: BaseException) -> str:
    """Return what the user can correct, or on one line what the program was doing and which error ended it."""
    known = as_user_error(err)
    if known is not None:
        return str(known)
    text = " ".join(str(err).split())
    return f"while {current_stage()}: {type(err).__name__}: {text if len(text) <= 500 else f'{text[:500]} ...'}"


def keep_traceback(err: BaseException) -> str:
    """Write the traceback to the run's library log, or to a temporary file; returns words on where it is."""
    lines = "".join(traceback.format_exception(err))
    try:
        if LOG.last_path is not None and os.path.isdir(os.path.dirname(LOG.last_path)):
            with open(LOG.last_path, "a", encoding="utf-8") as file:
                file.write(lines)
            return f"traceback: {LOG.last_path}"
        descriptor, path = tempfile.mkstemp(prefix="sft_error_", suffix=".log")
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(lines)
        return f"traceback: {path}"
    except OSError:
        sys.stderr.write(lines)
        return "traceback above: no file could be written for it"


def _say_on_rank_0(words: str, rank: int) -> None:
    if rank <= 0:
        say(words)


def _is_lost_peer(err: BaseException) -> bool:
    return isinstance(err, RuntimeError) and any(words in str(err) for words in LOST_PEER)


def _publish(words: str) -> None:
    """Store the first error where the other ranks find it; later errors don't replace it."""
    try:
        store = _store()
        if store is not None:
            store.compare_set(FIRST_ERROR, "", words)
    except RuntimeError:
        return  # the store lives on rank 0, which may be the one that is gone


def _first_error() -> str | None:
    time.sleep(1)  # the failing rank publishes before its connections break, but on its way out
    try:
        store = _store()
        return store.get(FIRST_ERROR).decode() if store is not None and store.check([FIRST_ERROR]) else None
    except RuntimeError:
        return None


def _store() -> dist.Store | None:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.distributed_c10d._get_default_store()
