"""Turns of throughput.py: the same documents for every way, and what a way's steps through them took."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from deepspeed.accelerator import get_accelerator

from benchmarks.memory_estimate import process_memory
from utils.data.batching.sampler import Units, epoch_order, epoch_units, step_members
from utils.data.prompt_dataset import PromptDataset

SEED = 1234


class Turn(NamedTuple):
    """The same documents twice: as the one optimizer step of packed, and as the steps of all that take samples."""

    rows: Units
    steps: list[Units]


class Measured(NamedTuple):
    """One optimizer step, or the sum of several."""

    seconds: float
    tokens: int  # real ones
    samples: int
    cells: int  # with padding


def make_turns(data: PromptDataset, micro_batch: int, row_length: int, count: int) -> list[Turn]:
    """Turn k holds the documents of packed's k-th optimizer step, `micro_batch` rows of `row_length` tokens.

    As samples they come shuffled, so that lengths mix as in an epoch, and in steps of about `micro_batch`, split
    evenly: no document is dropped, so packed's step stays as full as in training.
    """
    lengths, labels = data.lengths(), data.label_counts()
    units = epoch_units(lengths, labels, SEED, 1, row_length)
    if len(units.tokens) < count * micro_batch:
        raise SystemExit(f"{count} turns need {count * micro_batch} packed rows; the data has {len(units.tokens)}")
    turns = []
    for number in range(count):
        start = number * micro_batch
        rows = Units(*(field[start : start + micro_batch] for field in units))
        documents = np.array(step_members(units, start, micro_batch))
        documents = documents[epoch_order(len(documents), SEED, number)]
        steps = np.array_split(documents, round(len(documents) / micro_batch))
        turns.append(Turn(rows, [Units(step, np.ones_like(step), lengths[step], labels[step]) for step in steps]))
    return turns


def total(parts: Iterable[Measured]) -> Measured:
    return Measured(*(sum(column) for column in zip(*parts, strict=True)))


def peak_memory_gb() -> float:
    """This process's so far: resident memory on a CPU, else what its tensors took on the device."""
    if get_accelerator().device_name() == "cpu":
        return process_memory("VmHWM") / 2**30
    return get_accelerator().max_memory_allocated() / 2**30
