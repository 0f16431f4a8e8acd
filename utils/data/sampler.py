"""Which samples form which micro batch: a pure function of sizes, seed and epoch.

The samples of one optimizer step are the same however the step is cut up (ranks, micro batch, accumulation),
and every rank runs the same number of micro batches, which ZeRO 3 needs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class MicroBatch(NamedTuple):
    """What one rank feeds through the model at once."""

    indices: list[int]  # positions in the data set
    counts: bool  # False: a stand-in for a rank that has no sample left; its loss weighs 0
    step: int  # optimizer step within the epoch, from 0
    is_last: bool  # the optimizer steps after this one


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `size` samples in `epoch`, [size] int64; the same for the same (seed, epoch) everywhere."""
    return np.random.default_rng([seed, epoch]).permutation(size)


def steps_per_epoch(size: int, global_batch: int) -> int:
    """Optimizer steps of one epoch; the last, incomplete one counts: it steps too."""
    return -(-size // global_batch)


def micro_batches_per_epoch(size: int, micro_batch: int, accumulation: int, world_size: int) -> int:
    """Micro batches each rank runs in one epoch."""
    global_batch = micro_batch * accumulation * world_size
    full, rest = divmod(size, global_batch)
    return full * accumulation + -(-rest // (micro_batch * world_size))


def plan_micro_batches(
    order: np.ndarray, lengths: np.ndarray, micro_batch: int, accumulation: int, world_size: int, rank: int
) -> Iterator[MicroBatch]:
    """Yield the micro batches of `rank` for one pass over `order`.

    Within a step the samples are sorted by length, which changes nothing but the padding, and dealt out to
    the ranks in turn, so that all have about the same work.

    Args:
        order: [n] positions in the data set, in the order they are used.
        lengths: [size of the data set] tokens of each sample.
    """
    global_batch = micro_batch * accumulation * world_size
    width = micro_batch * world_size
    for step, start in enumerate(range(0, len(order), global_batch)):
        chosen = order[start : start + global_batch]
        chosen = chosen[np.argsort(-lengths[chosen], kind="stable")]
        for offset in range(0, len(chosen), width):
            shared = chosen[offset : offset + width]
            mine = shared[rank::world_size]
            counts = len(mine) > 0
            indices = (mine if counts else shared[:1]).tolist()
            yield MicroBatch(indices, counts, step, offset + width >= len(chosen))
