"""Which samples come when: an order per epoch, nothing twice, the same work on every rank."""

import numpy as np
import pytest
from conftest import make_json_data
from hypothesis import given
from hypothesis import strategies as st

from utils.data.batching.sampler import (
    epoch_order,
    epoch_units,
    micro_batches_per_epoch,
    plan_micro_batches,
    steps_per_epoch,
)


def units_of(size: int, epoch: int = 1, seed: int = 1234):
    lengths = np.random.default_rng(size).integers(2, 50, size)
    return epoch_units(lengths, lengths - 1, seed, epoch)


def test_every_epoch_has_its_own_order_and_the_seed_repeats_it():
    orders = {(seed, epoch): tuple(epoch_order(50, seed, epoch)) for seed in (1, 2) for epoch in (1, 2, 3)}
    assert len(set(orders.values())) == 6
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert tuple(epoch_order(50, 1, 2)) == orders[1, 2]
    # Written down: a run continued on another machine must meet the same order.
    assert epoch_order(8, 1234, 1).tolist() == [1, 4, 0, 2, 5, 7, 6, 3]


@given(
    size=st.integers(1, 60), micro=st.integers(1, 5), accumulation=st.integers(1, 4), ranks=st.integers(1, 5)
)  # fmt: skip
def test_all_samples_once_and_all_ranks_alike(size, micro, accumulation, ranks):
    units = units_of(size)
    plans = [list(plan_micro_batches(units, micro, accumulation, ranks, rank)) for rank in range(ranks)]
    # Every rank runs as many forwards and steps at the same places: else ZeRO 3 would wait for ever.
    assert {len(plan) for plan in plans} == {micro_batches_per_epoch(size, micro, accumulation, ranks)}
    assert len({tuple((batch.step, batch.is_last) for batch in plan) for plan in plans}) == 1
    assert sum(batch.is_last for batch in plans[0]) == steps_per_epoch(size, micro * accumulation * ranks)
    counted = [index for plan in plans for batch in plan if batch.counts for index in batch.indices]
    assert sorted(counted) == list(range(size))
    assert all(1 <= len(batch.indices) <= micro for plan in plans for batch in plan)


def test_the_schedule_plans_the_steps_that_are_taken():
    """10 batches of 2 with accumulation 8 make two steps an epoch: one full, one of what is left."""
    taken = list(plan_micro_batches(units_of(20), 2, 8, 1, 0))
    assert steps_per_epoch(20, 16) == 2 == sum(batch.is_last for batch in taken)
    assert [batch.is_last for batch in taken] == [False] * 7 + [True] + [False, True]


@pytest.mark.parametrize("other", [[], ["--seed", "7"]], ids=["same", "another"])
def test_the_seed_decides_the_run(other, tiny_opt, cache_folder, run_inside, tmp_path):
    """The same command gives the same losses; another --seed does not."""
    data = make_json_data(tmp_path, 16, 3)
    arguments = [
        "--model_name_or_path", tiny_opt, "--data_path", data, "--data_split", "10,0,0", "--data_output_path",
        cache_folder, "--max_seq_len", "48", "--dtype", "fp32", "--per_device_train_batch_size", "4", "--print_loss",
    ]  # fmt: skip
    losses = []
    for more in ([], other):
        status, out, err = run_inside([*arguments, *more])
        assert status == 0, err
        assert "no --output_dir: the model is not saved" in out
        losses.append([line for line in out.splitlines() if "loss = " in line])
    assert len(losses[0]) == 4
    assert (losses[0] == losses[1]) == (not other)
