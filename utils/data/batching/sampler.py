"""Which samples form which micro batch: a pure function of sizes, seed and epoch.

A unit is what a batch is counted in: one sample, or with packing one row of samples. The units of one
optimizer step are the same however the step is cut up (ranks, micro batch, accumulation), and every rank runs
the same number of micro batches, which ZeRO 3 needs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from utils.data.batching.packing import pack_best_fit


class Units(NamedTuple):
    """The units of one epoch, in the order they are used; sizes are [units] int64."""

    members: list[np.ndarray] | np.ndarray  # of each unit the samples; an array where a unit is one sample
    samples: np.ndarray
    tokens: np.ndarray
    labels: np.ndarray


class MicroBatch(NamedTuple):
    """What one rank feeds through the model at once."""

    indices: list[int]  # positions in the data set
    counts: bool  # False: a stand-in for a rank that has nothing left; its loss weighs 0
    step: int  # optimizer step within the epoch, from 0
    is_last: bool  # the optimizer steps after this one


class StepSize(NamedTuple):
    """What one optimizer step holds, over all ranks and accumulation steps."""

    units: int
    samples: int
    tokens: int
    label_tokens: int


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `size` things in `epoch`, [size] int64; the same for the same (seed, epoch) everywhere."""
    return np.random.default_rng([seed, epoch]).permutation(size)


def epoch_units(
    lengths: np.ndarray, label_counts: np.ndarray, seed: int, epoch: int, row_length: int | None = None
) -> Units:
    """The units of one epoch: samples in the epoch's order, or packed rows of `row_length` tokens.

    Args:
        lengths: [samples] tokens of each sample.
        label_counts: [samples] label tokens of each sample.
    """
    order = epoch_order(len(lengths), seed, epoch)
    if row_length is None:
        return Units(order, np.ones(len(order), dtype=np.int64), lengths[order], label_counts[order])
    rows = pack_best_fit(lengths, row_length, order)
    # Packing goes from long to short; the rows are used in an order of their own.
    rows = [rows[row] for row in epoch_order(len(rows), seed, epoch)]
    sums = [np.array([values[row].sum() for row in rows], dtype=np.int64) for values in (lengths, label_counts)]
    return Units(rows, np.array([len(row) for row in rows], dtype=np.int64), *sums)


def steps_per_epoch(units: int, global_batch: int) -> int:
    """Optimizer steps of one epoch; the last, incomplete one counts: it steps too."""
    return -(-units // global_batch)


def micro_batches_per_epoch(units: int, micro_batch: int, accumulation: int, world_size: int) -> int:
    """Micro batches each rank runs in one epoch."""
    full, rest = divmod(units, micro_batch * accumulation * world_size)
    return full * accumulation + -(-rest // (micro_batch * world_size))


def plan_micro_batches(
    units: Units, micro_batch: int, accumulation: int, world_size: int, rank: int
) -> Iterator[MicroBatch]:
    """Yield the micro batches of `rank` for one pass over `units`.

    Within a step the units are sorted by length, which changes nothing but the padding, and dealt out to the
    ranks in turn, so that all have about the same work.
    """
    width = micro_batch * world_size
    global_batch = width * accumulation
    for step, start in enumerate(range(0, len(units.tokens), global_batch)):
        tokens = units.tokens[start : start + global_batch]
        chosen = start + np.argsort(-tokens, kind="stable")
        for offset in range(0, len(chosen), width):
            shared = chosen[offset : offset + width]
            mine = shared[rank::world_size]
            counts = len(mine) > 0
            indices = _members(units, mine if counts else shared[:1])
            yield MicroBatch(indices, counts, step, offset + width >= len(chosen))


def _members(units: Units, chosen: np.ndarray) -> list[int]:
    if isinstance(units.members, np.ndarray):
        return units.members[chosen].tolist()
    return np.concatenate([units.members[unit] for unit in chosen]).tolist()


def step_sizes(units: Units, global_batch: int) -> list[StepSize]:
    """The sizes of every optimizer step of one epoch; label tokens are at least 1, so that they can divide."""
    starts = np.arange(0, len(units.tokens), global_batch)
    ones = np.ones(len(units.tokens), dtype=np.int64)
    sums = [np.add.reduceat(values, starts) for values in (ones, units.samples, units.tokens, units.labels)]
    return [StepSize(*counts, max(labels, 1)) for *counts, labels in np.stack(sums, axis=1).tolist()]


def remaining_units(units: Units, used: int) -> Units:
    """The units of an epoch that come after the first `used`."""
    return Units(*(field[used:] for field in units))


def step_members(units: Units, start: int, count: int) -> list[int]:
    """Positions in the data set of the samples in `count` units from `start` on."""
    return _members(units, np.arange(start, start + count))
