"""The decisions of a run, made once from its arguments."""

import re
from argparse import Namespace
from typing import NamedTuple

from utils.distributed.ranks import global_rank, world_size
from utils.errors import UserError

HERE = "here"  # what a bare --dry_run means


class Gpus(NamedTuple):
    """What a plan is for."""

    count: int  # over all nodes
    gigabytes: float  # of memory each, in 1e9 bytes


def planned_ranks(args: Namespace) -> int:
    """Ranks of the run the plan is for."""
    gpus = parse_gpus(args.dry_run)
    return world_size() if gpus is None else gpus.count


def data_ranks(args: Namespace) -> int:
    """Data parallel ranks of the run: those of one sequence parallel group count as one."""
    return planned_ranks(args) // args.sequence_parallel_size


def window_size(args: Namespace) -> int:
    """Samples of a window of a stream: whole steps, where steps are counted in samples."""
    global_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * data_ranks(args)
    return args.streaming if args.packing else -(-args.streaming // global_batch) * global_batch


def sequence_part(args: Namespace) -> tuple[int, int]:
    """(k, N): this rank has part k of N of every row; neighbouring ranks form a group, as in DeepSpeed."""
    return global_rank() % args.sequence_parallel_size, args.sequence_parallel_size


def data_rank(args: Namespace) -> int:
    """Which data this rank works on: the number of its group."""
    return global_rank() // args.sequence_parallel_size


def averaged_over(args: Namespace) -> int:
    """What DeepSpeed (0.19.8) divides the gradients by that it sums over all ranks.

    The ranks of a group hold parts of one gradient, so it divides by the number of groups; but at ZeRO 3, where
    gradients go through `reduce_scatter_coalesced`, by that of all ranks.
    """
    return data_ranks(args) * (args.sequence_parallel_size if args.zero_stage == 3 else 1)


def parse_gpus(text: str | None) -> Gpus | None:
    """The GPUs of `--dry_run 64x80`; None for a run, or a dry run, on this machine.

    Raises:
        UserError: the text is not of that form.
    """
    if text in (None, HERE):
        return None
    match = re.fullmatch(r"([1-9]\d*)[xX×](\d+(?:\.\d+)?)", text)
    if not match or float(match[2]) == 0:
        raise UserError(f"--dry_run {text}: write GPUs x gigabytes, as in 64x80, or nothing for this machine.")
    return Gpus(int(match[1]), float(match[2]))
