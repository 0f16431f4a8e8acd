"""Batches of a data set, in the order and cut that `sampler` plans."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from utils.data.sampler import MicroBatch, plan_micro_batches

Collate = Callable[[Sequence[dict[str, torch.Tensor]]], dict[str, torch.Tensor]]


class StepSize(NamedTuple):
    """What one optimizer step holds, over all ranks and accumulation steps."""

    samples: int
    tokens: int
    label_tokens: int


class TrainBatch(NamedTuple):
    """One micro batch of this rank and what it counts for."""

    tensors: dict[str, torch.Tensor]
    weight: float  # makes DeepSpeed's averages the mean over the step's label tokens; 0 for a stand-in
    is_last: bool  # the optimizer steps after this one
    step: StepSize


def load_batches(dataset: Any, plans: list[MicroBatch], collate: Collate) -> Iterator[dict[str, torch.Tensor]]:
    """Read and collate the planned micro batches one after another.

    How samples become tensors is `collate`'s affair alone: this is the place for another layout.
    """
    return iter(DataLoader(dataset, batch_sampler=[plan.indices for plan in plans], collate_fn=collate))


def train_batches(
    dataset: Any,
    order: np.ndarray,
    lengths: np.ndarray,
    collate: Collate,
    micro_batch: int,
    accumulation: int,
    world_size: int,
    rank: int,
) -> Iterator[TrainBatch]:
    """This rank's micro batches of one epoch.

    Args:
        order: [samples] the epoch's order.
        lengths: [samples] tokens of each sample; all but the first are labels.
    """
    plans = list(plan_micro_batches(order, lengths, micro_batch, accumulation, world_size, rank))
    steps = step_sizes(order, lengths, micro_batch * accumulation * world_size)
    for plan, tensors in zip(plans, load_batches(dataset, plans, collate), strict=True):
        step = steps[plan.step]
        # DeepSpeed divides by the accumulation steps and averages over the ranks: undone here.
        weight = accumulation * world_size / step.label_tokens if plan.counts else 0.0
        yield TrainBatch(tensors, weight, plan.is_last, step)


def step_sizes(order: np.ndarray, lengths: np.ndarray, global_batch: int) -> list[StepSize]:
    """The sizes of every optimizer step of one epoch. All tokens of a sample but the first are labels."""
    chosen = [lengths[order[start : start + global_batch]] for start in range(0, len(order), global_batch)]
    return [StepSize(len(part), int(part.sum()), max(int(part.sum()) - len(part), 1)) for part in chosen]


def eval_batches(
    dataset: Any, collate: Collate, micro_batch: int, world_size: int, rank: int
) -> Iterator[tuple[dict[str, torch.Tensor], bool]]:
    """This rank's evaluation batches and whether they count (a stand-in on a rank without samples does not).

    Samples of like length go together: a sum over the whole set does not depend on its order.
    """
    lengths = dataset.lengths()
    order = np.argsort(-lengths, kind="stable")
    plans = list(plan_micro_batches(order, lengths, micro_batch, 1, world_size, rank))
    for plan, batch in zip(plans, load_batches(dataset, plans, collate), strict=True):
        yield batch, plan.counts
