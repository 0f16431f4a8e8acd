"""Plans which samples form which micro batch: a pure function of sizes, seed and epoch.

Batches are counted in units: a unit is one sample, or with packing one row of samples. The units of an optimizer step
are the same for any number of ranks, micro batch and accumulation, and every rank runs the same number of micro
batches, which ZeRO 3 needs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from utils.data.batching.packing import pack_best_fit


class Units(NamedTuple):
    """The units of one epoch, in the order of their use; sizes are [units] int64."""

    members: list[np.ndarray] | np.ndarray  # the samples of each unit; one array where every unit is one sample
    samples: np.ndarray
    tokens: np.ndarray
    labels: np.ndarray


class MicroBatch(NamedTuple):
    """The samples that one rank feeds through the model at once."""

    indices: list[int]  # positions in the data set
    counts: bool  # False: a dummy batch for a rank that has no samples left; its loss weighs 0
    step: int  # optimizer step within the epoch, from 0
    is_last: bool  # the optimizer steps after this micro batch


class StepSize(NamedTuple):
    """The size of one optimizer step, over all ranks and accumulation steps."""

    units: int
    samples: int
    tokens: int
    label_tokens: int


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of `size` items for `epoch`, [size] int64: a function of (seed, epoch) on any machine."""
    return np.random.default_rng([seed, epoch]).permutation(size)


def epoch_units(
    lengths: np.ndarray, label_counts: np.ndarray, seed: int, epoch: int, row_length: int | None = None
) -> Units:
    """Return the units of one epoch: samples in the epoch's order, or packed rows of `row_length` tokens.

    Args:
        lengths: [samples] tokens of each sample.
        label_counts: [samples] label tokens of each sample.
    """
    order = epoch_order(len(lengths), seed, epoch)
    if row_length is None:
        return Units(order, np.ones(len(order), dtype=np.int64), lengths[order], label_counts[order])
    rows = pack_best_fit(lengths, row_length, order)
    # Packing makes rows from long documents to short ones; this permutation removes that order.
    rows = [rows[row] for row in epoch_order(len(rows), seed, epoch)]
    sums = [np.array([values[row].sum() for row in rows], dtype=np.int64) for values in (lengths, label_counts)]
    return Units(rows, np.array([len(row) for row in rows], dtype=np.int64), *sums)


def steps_per_epoch(units: int, global_batch: int) -> int:
    """Return the optimizer steps of one epoch, an incomplete last one included."""
    return -(-units // global_batch)


def micro_batches_per_epoch(units: int, micro_batch: int, accumulation: int, ranks: int) -> int:
    """Return the micro batches that each rank runs in one epoch."""
    full, rest = divmod(units, micro_batch * accumulation * ranks)
    return full * accumulation + -(-rest // (micro_batch * ranks))


def plan_micro_batches(
    units: Units, micro_batch: int, accumulation: int, ranks: int, rank: int
) -> Iterator[MicroBatch]:
    """Yield the micro batches of `rank` for one pass over `units`.

    Within a step the units are sorted by length, which changes nothing but the padding, and dealt to the ranks in
    turn, so that all have about the same work.

    Args:
        ranks: data parallel ranks, of which `rank` is one.
    """
    width = micro_batch * ranks
    global_batch = width * accumulation
    for step, start in enumerate(range(0, len(units.tokens), global_batch)):
        tokens = units.tokens[start : start + global_batch]
        chosen = start + np.argsort(-tokens, kind="stable")
        for offset in range(0, len(chosen), width):
            shared = chosen[offset : offset + width]
            mine = shared[rank::ranks]
            counts = len(mine) > 0
            indices = _members(units, mine if counts else shared[:1])
            yield MicroBatch(indices, counts, step, offset + width >= len(chosen))


def _members(units: Units, chosen: np.ndarray) -> list[int]:
    if isinstance(units.members, np.ndarray):
        return units.members[chosen].tolist()
    return np.concatenate([units.members[unit] for unit in chosen]).tolist()


def step_sizes(units: Units, global_batch: int) -> list[StepSize]:
    """Return the size of every optimizer step of one epoch; label tokens are at least 1, since they are a divisor."""
    starts = np.arange(0, len(units.tokens), global_batch)
    ones = np.ones(len(units.tokens), dtype=np.int64)
    sums = [np.add.reduceat(values, starts) for values in (ones, units.samples, units.tokens, units.labels)]
    return [StepSize(*counts, max(labels, 1)) for *counts, labels in np.stack(sums, axis=1).tolist()]


def remaining_units(units: Units, used: int) -> Units:
    """Return the units of an epoch that come after the first `used`."""
    return Units(*(field[used:] for field in units))


def step_members(units: Units, start: int, count: int) -> list[int]:
    """Return the positions in the data set of the samples in `count` units, from unit `start` on."""
    return _members(units, np.arange(start, start + count))
