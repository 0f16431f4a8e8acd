"""The meeting before weights are gathered: who is waited for, how long, and who is told that it is alone."""

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from utils.distributed import meeting
from utils.distributed.meeting import meet
from utils.errors import UserError

HERE, THERE = "save_hf_format", "save_zero_three_model"


@pytest.fixture
def store(monkeypatch) -> dist.Store:
    """This process is rank 0 of three; the others come when a test says so."""
    found = dist.HashStore()
    found.set_timeout(timedelta(seconds=20))
    monkeypatch.setattr(meeting, "world_size", lambda: 3)
    monkeypatch.setattr(meeting, "global_rank", lambda: 0)
    monkeypatch.setattr(meeting, "_met", 0)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: found)
    return found


def arrive(store: dist.Store, place: str, number: int = 0) -> None:
    """What one of the other ranks does first."""
    if store.add(f"meeting/{number}/{place}", 1) == 3:
        store.set(f"meeting/{number}/{place}/complete", "")


def later(seconds: float, store: dist.Store, place: str) -> None:
    threading.Timer(seconds, arrive, (store, place)).start()


def test_all_come(store):
    for number in range(2):
        for _ in range(2):
            arrive(store, HERE, number)
        start = time.monotonic()
        assert meet(HERE, THERE) is True
        assert time.monotonic() - start < 0.1, "a save is not slower for it"


def test_rank_0_alone_is_told_and_can_try_again(store):
    start = time.monotonic()
    with pytest.raises(UserError, match=r"save_hf_format was called on rank 0, and in 1 s on no other of the 3 ranks"):
        meet(HERE, THERE, patience=1)
    assert 1 <= time.monotonic() - start < 3
    for _ in range(2):
        later(0.2, store, HERE)
    assert meet(HERE, THERE, patience=1), "the first attempt does not count as a rank"


def test_once_one_other_has_come_the_rest_may_be_busy(store):
    arrive(store, HERE)
    later(1.5, store, HERE)
    assert meet(HERE, THERE, patience=0.2)


def test_the_others_wait_elsewhere(store):
    for _ in range(2):
        later(0.2, store, THERE)
    assert meet(HERE, THERE, patience=5) is False
    assert meet(THERE) is True, "and rank 0 comes to them"
    assert meeting._met == 1


def test_another_rank_waits_for_rank_0_as_long_as_it_takes(store, monkeypatch):
    monkeypatch.setattr(meeting, "global_rank", lambda: 1)
    arrive(store, HERE)
    later(1, store, HERE)
    assert meet(HERE, THERE, patience=0.1)


def test_one_rank_meets_nobody(monkeypatch):
    monkeypatch.setattr(meeting, "world_size", lambda: 1)
    assert meet(HERE) is True
