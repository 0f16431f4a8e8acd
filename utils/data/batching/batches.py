"""Batches of a data set: the planned micro batches, read ahead and laid out as the run asks."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from utils.data.batching.collate import collate_free, collate_padded, collate_slice
from utils.data.batching.sampler import MicroBatch, StepSize, Units, plan_micro_batches, step_sizes
from utils.data.prompt_dataset import PromptDataset

Collate = Callable[[Sequence[dict[str, torch.Tensor]]], dict[str, Any]]


class TrainBatch(NamedTuple):
    """One micro batch of this rank and what it counts for."""

    tensors: dict[str, Any]
    weight: float  # makes DeepSpeed's averages the mean over the step's label tokens; 0 for a stand-in
    is_last: bool  # the optimizer steps after this one
    step: StepSize


def collate_for(padding: str, pad_token_id: int, max_seq_len: int, part: tuple[int, int] = (0, 1)) -> Collate:
    """How samples become a batch: "free" (one row, no padding), "longest" or "max_length".

    `part` (k, N): this rank gets part k of N of every row ("free" only).
    """
    if padding == "free":
        return collate_free if part[1] == 1 else partial(collate_slice, part=part)
    return partial(collate_padded, pad_token_id=pad_token_id, pad_to=max_seq_len if padding == "max_length" else None)


def load_batches(
    dataset: PromptDataset, plans: list[MicroBatch], collate: Collate, on_cpu: bool
) -> Iterator[dict[str, Any]]:
    """Read and collate the planned micro batches: ahead, in a process of its own, where a GPU does the training.

    On a CPU another process would take time from the training itself.
    """
    workers = 0 if on_cpu or not plans else 1
    return iter(
        DataLoader(
            dataset, batch_sampler=[plan.indices for plan in plans], collate_fn=collate, num_workers=workers,
            prefetch_factor=4 if workers else None, pin_memory=not on_cpu,
            # Of its own, so that starting to read takes nothing from the random numbers of the training.
            generator=torch.Generator(),
        )
    )  # fmt: skip


def train_batches(
    dataset: PromptDataset,
    units: Units,
    collate: Collate,
    micro_batch: int,
    accumulation: int,
    world_size: int,
    rank: int,
    on_cpu: bool = True,
    averaged_over: int | None = None,
) -> Iterator[TrainBatch]:
    """This rank's micro batches of one epoch over `units`.

    Args:
        world_size: data parallel ranks, of which this is number `rank`; those that share rows count as one.
        averaged_over: what DeepSpeed divides the ranks' summed gradients by, where that is another number.
    """
    plans = list(plan_micro_batches(units, micro_batch, accumulation, world_size, rank))
    steps = step_sizes(units, micro_batch * accumulation * world_size)
    for plan, tensors in zip(plans, load_batches(dataset, plans, collate, on_cpu), strict=True):
        step = steps[plan.step]
        # DeepSpeed divides by the accumulation steps and averages over the ranks: undone here.
        weight = accumulation * (averaged_over or world_size) / step.label_tokens if plan.counts else 0.0
        yield TrainBatch(tensors, weight, plan.is_last, step)


def eval_batches(
    dataset: PromptDataset, collate: Collate, micro_batch: int, world_size: int, rank: int, on_cpu: bool = True
) -> Iterator[tuple[dict[str, Any], bool]]:
    """This rank's evaluation batches and whether they count (a stand-in on a rank without samples does not).

    Samples of like length go together: a sum over the whole set does not depend on its order.
    """
    lengths = dataset.lengths()
    order = (-lengths).argsort(kind="stable")
    units = Units(order, order, lengths[order], lengths[order])
    plans = list(plan_micro_batches(units, micro_batch, 1, world_size, rank))
    for plan, tensors in zip(plans, load_batches(dataset, plans, collate, on_cpu), strict=True):
        yield tensors, plan.counts
