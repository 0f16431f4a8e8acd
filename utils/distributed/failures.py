"""How a run ends when it can't go on: one message, the first rank's, and an exit status that says what it was."""

import os
import sys
import time
import traceback

import torch
import torch.distributed as dist

from utils.errors import UserError

EXIT_CRASH = 1
EXIT_USER_ERROR = 2
FIRST_ERROR = "first_error"
# What torch, gloo and NCCL say to a rank whose peer has gone.
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "remote process")
MEMORY_ADVICE = (
    "lower --per_device_train_batch_size (and raise --gradient_accumulation_steps by as much), add "
    "--gradient_checkpointing, raise --zero_stage, add --offload, or train with --lora_dim; with long rows add "
    "--tiled_mlp or --sequence_parallel_size; --dry_run shows what each needs."
)
SCALE_ADVICE = (
    "fp16 can't hold this model's gradients: the loss scale reached its minimum and every step was skipped. Use "
    "--dtype bf16 (or fp32)."
)


def as_user_error(err: Exception) -> UserError | None:
    """What a user can mend, in their terms; None for everything else."""
    if isinstance(err, UserError):
        return err
    if isinstance(err, torch.OutOfMemoryError):
        return UserError(f"the device ran out of memory ({err}): {MEMORY_ADVICE}")
    if "loss scale already at minimum" in str(err):
        return UserError(SCALE_ADVICE)
    return None


def end_run(err: Exception, rank: int) -> None:
    """Print what ended the run and exit: 2 for the user's own mistakes, without a traceback, 1 for the rest.

    A rank that only lost its connection repeats the first rank's error instead of burying it under its own.
    """
    known = as_user_error(err)
    prefix = f"[rank {rank}] " if rank > 0 else ""
    if known is None and _is_lost_peer(err):
        print(
            f"{prefix}stopped: {_first_error() or 'another rank is gone; what it said stands above'}", file=sys.stderr
        )
        sys.stderr.flush()
        os._exit(EXIT_CRASH)  # not sys.exit: threads of a broken process group may never end
    words = str(known) if known is not None else f"{type(err).__name__}: {err}"
    _publish(f"rank {rank} failed first: {words}")
    if known is not None:
        if rank > 0:
            time.sleep(10)  # most mistakes are everyone's: rank 0 speaks first, and one message is enough
        print(f"{prefix}error: {known}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
    traceback.print_exception(err)
    print(f"{prefix}error: {words}", file=sys.stderr, flush=True)
    sys.exit(EXIT_CRASH)


def _is_lost_peer(err: Exception) -> bool:
    return isinstance(err, RuntimeError) and any(words in str(err) for words in LOST_PEER)


def _publish(words: str) -> None:
    """Leave the first error where the other ranks find it; later ones don't replace it."""
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
