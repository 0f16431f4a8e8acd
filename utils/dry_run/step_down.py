"""A run with `--fit` whose device ran out of memory: once, it goes on with a setting that takes a fifth less.

On one rank alone. Of several, the one that failed knows, and the others wait for it in a collective that can be ended
only with its process: all have to start again, which is the launcher's part. So the message has what to add.
"""

from __future__ import annotations

import copy
import gc
import traceback
from argparse import Namespace
from collections.abc import Callable

import torch
from deepspeed.accelerator import get_accelerator

from utils.distributed.ranks import print_rank_0, world_size
from utils.dry_run.fit import GB, LastFit
from utils.errors import UserError
from utils.module.attention import clear_documents

LESS = 0.8  # of the memory that the setting was estimated to take


def run_stepping_down(
    main: Callable[[Namespace], None],
    args: Namespace,
    newest: Callable[[Namespace], str | None],
    tidy: Callable[[], None],
) -> None:
    """Call `main`; where `--fit` chose too much, call it again with a lower limit, from the last checkpoint.

    Args:
        newest: returns what `--resume_from_checkpoint` is to be then.
        tidy: releases what `main` holds outside its own memory.

    Raises:
        UserError: several ranks run, of which the others wait for the one that failed; the message has the limit.
    """
    try:
        main(args)
        return
    except torch.OutOfMemoryError as err:
        if args.fit is None or LastFit.row is None:
            raise
        words = " ".join(str(err).split())[:200]
        traceback.clear_frames(err.__traceback__)  # they hold the engine
    again = _lower(args, words, newest(args))
    clear_documents()
    tidy()
    gc.collect()
    get_accelerator().empty_cache()
    main(again)


def _lower(args: Namespace, words: str, checkpoint: str | None) -> Namespace:
    """Return the arguments of the second attempt."""
    row = LastFit.row
    limit = f"{LESS * row.peak / GB:.4g}"
    what = f"the device ran out of memory ({words}) with {row.choice.words}"
    if world_size() > 1:
        go_on = "" if checkpoint is None else " --resume_from_checkpoint"
        raise UserError(
            f"{what}, which --fit chose: start all ranks again, by the same command with --fit {limit}{go_on} at its "
            "end (a later argument replaces an earlier one)."
        )
    where = "from the beginning" if checkpoint is None else f"from {checkpoint}"
    print_rank_0(f"Fit: {what}; once, it goes on with --fit {limit}, a fifth less than estimated, {where}")
    again = copy.copy(args)
    again.as_typed = args
    again.fit, again.resume_from_checkpoint = limit, checkpoint
    return again
