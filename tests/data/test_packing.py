"""Packing: every document once, rows never too long, no worse than best-fit decreasing promises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.data.batching.packing import pack_best_fit
from utils.data.batching.sampler import (
    epoch_units,
    micro_batches_per_epoch,
    plan_micro_batches,
    remaining_units,
    step_members,
    step_sizes,
)


def slow_best_fit_decreasing(lengths: list[int], row_length: int) -> int:
    """The textbook rule, one document at a time over all rows: how many rows it takes."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(row_length - length)
    return len(rooms)


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 60), st.integers(0, 5))
def test_rows(lengths, row_length, seed):
    order = np.random.default_rng(seed).permutation(len(lengths))
    sizes = np.array(lengths, dtype=np.int64)
    rows = pack_best_fit(sizes, row_length, order)
    assert sorted(np.concatenate(rows).tolist() if rows else []) == list(range(len(lengths)))
    assert all(sizes[row].sum() <= row_length for row in rows)
    assert len(rows) == slow_best_fit_decreasing(lengths, row_length)


def test_a_document_longer_than_a_row():
    with pytest.raises(ValueError, match="9 tokens does not fit a row of 8"):
        pack_best_fit(np.array([3, 9]), 8, np.arange(2))


def test_rows_of_dialogue_lengths_are_full():
    lengths = np.random.default_rng(0).gamma(2.0, 80.0, size=5000).astype(np.int64).clip(2, 512)
    rows = pack_best_fit(lengths, 512, np.arange(5000))
    assert lengths.sum() / (len(rows) * 512) > 0.99


SIZES = np.random.default_rng(1).integers(2, 40, size=101)


def test_epochs_make_other_rows_the_same_seed_makes_the_same():
    def rows(seed: int, epoch: int) -> list[list[int]]:
        return [row.tolist() for row in epoch_units(SIZES, SIZES - 1, seed, epoch, row_length=64).members]

    assert rows(1, 1) == rows(1, 1)
    assert rows(1, 1) != rows(1, 2) and rows(1, 1) != rows(2, 1)
    assert len(rows(1, 1)) == len(rows(1, 2))  # the schedule can count on it
    assert len({tuple(sorted(row)) for row in rows(1, 1)} & {tuple(sorted(row)) for row in rows(1, 2)}) < 10


@pytest.mark.parametrize("row_length", [None, 64])
@pytest.mark.parametrize(("micro", "accumulation", "ranks"), [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2)])
def test_however_a_step_is_cut_it_holds_the_same_samples(row_length, micro, accumulation, ranks):
    units = epoch_units(SIZES, SIZES - 1, 7, 3, row_length)
    plans = [list(plan_micro_batches(units, micro, accumulation, ranks, rank)) for rank in range(ranks)]
    assert {len(plan) for plan in plans} == {micro_batches_per_epoch(len(units.tokens), micro, accumulation, ranks)}
    steps: dict[int, list[int]] = {}
    for plan in plans:
        for batch in plan:
            if batch.counts:
                steps.setdefault(batch.step, []).extend(batch.indices)
    members = [[unit] if row_length is None else unit.tolist() for unit in units.members]
    sizes = step_sizes(units, 8)
    assert len(steps) == len(sizes)
    for step, size in enumerate(sizes):
        expected = [sample for unit in members[step * 8 : step * 8 + 8] for sample in unit]
        assert sorted(steps[step]) == sorted(expected)
        units_of_step = len(members[step * 8 : step * 8 + 8])
        assert size == (units_of_step, len(expected), SIZES[expected].sum(), SIZES[expected].sum() - len(expected))
        assert sorted(step_members(units, step * 8, units_of_step)) == sorted(expected)
        rest = remaining_units(units, step * 8)
        assert step_sizes(rest, 8)[0] == size and len(rest.members) == len(members) - step * 8
    # All ranks agree when the optimizer steps, and a dummy batch never counts.
    assert len({tuple(batch.is_last for batch in plan) for plan in plans}) == 1
    assert sum(batch.is_last for batch in plans[0]) == len(sizes)
