"""Batches of a data set: the planned micro batches, read ahead and laid out in the run's padding."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from utils.data.batching.collate import collate_free, collate_padded, collate_slice
from utils.data.batching.sampler import MicroBatch, StepSize, Units, plan_micro_batches, step_sizes

if TYPE_CHECKING:
    from utils.data.prompt_dataset import PromptDataset
    from utils.run_config import BatchCut

Collate = Callable[[Sequence[dict[str, torch.Tensor]]], dict[str, Any]]


class TrainBatch(NamedTuple):
    """One micro batch of this rank, and its weight in the optimizer step."""

    tensors: dict[str, Any]
    weight: float  # makes DeepSpeed's averages the mean over the step's label tokens; 0 for a dummy batch
    is_last: bool  # the optimizer steps after this micro batch
    step: StepSize


class EvalBatch(NamedTuple):
    """One evaluation batch of this rank."""

    tensors: dict[str, Any]
    counts: bool  # False: a dummy batch for a rank without samples
    source: int = 0  # the place of its data set in `PromptDataset.by_source`


def collate_for(padding: str, pad_token_id: int, max_seq_len: int, part: tuple[int, int] = (0, 1)) -> Collate:
    """Return the function that makes a batch of samples.

    Args:
        padding: "free" (samples end to end in one row), "longest" (padded to the longest) or "max_length".
        part: (k, N), "free" only: this rank gets part k of N of every row.
    """
    if padding == "free":
        return collate_free if part[1] == 1 else partial(collate_slice, part=part)
    return partial(collate_padded, pad_token_id=pad_token_id, pad_to=max_seq_len if padding == "max_length" else None)


class OneByOne(torch.utils.data.Dataset):
    """Reads a data set item by item: a DataLoader would ask it for whole batches, which come padded."""

    def __init__(self, dataset: "PromptDataset") -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.dataset[index]


def load_batches(
    dataset: "PromptDataset", plans: list[MicroBatch], collate: Collate, on_cpu: bool
) -> Iterator[dict[str, Any]]:
    """Return an iterator over the planned micro batches, collated.

    Where a GPU trains, a worker process reads ahead; on a CPU it would take time from the training.
    """
    workers = 0 if on_cpu or not plans else 1
    return iter(
        DataLoader(
            OneByOne(dataset), batch_sampler=[plan.indices for plan in plans], collate_fn=collate, num_workers=workers,
            prefetch_factor=4 if workers else None, pin_memory=not on_cpu,
            # A generator of its own, so that reading does not advance the random numbers of the training.
            generator=torch.Generator(), worker_init_fn=ignore_stop_signals if workers else None,
        )
    )  # fmt: skip


def ignore_stop_signals(worker: int) -> None:
    """Make a worker process ignore the signals that ask a run to stop, but for the SIGTERM of the run's own process.

    Launchers and Slurm signal every process of a run. torch's worker dies of SIGTERM, which would end the run with an
    error instead of a checkpoint. At its own end the run's process terminates its workers by the same signal.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_terminated_by, args=(os.getppid(),), daemon=True).start()


def _end_when_terminated_by(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        continue
    os._exit(0)


def train_batches(dataset: "PromptDataset", units: Units, collate: Collate, cut: "BatchCut") -> Iterator[TrainBatch]:
    """Yield this rank's micro batches of one pass over `units`."""
    plans = list(plan_micro_batches(units, cut.micro_batch, cut.accumulation, cut.ranks, cut.rank))
    steps = step_sizes(units, cut.micro_batch * cut.accumulation * cut.ranks)
    for plan, tensors in zip(plans, load_batches(dataset, plans, collate, cut.on_cpu), strict=True):
        step = steps[plan.step]
        # DeepSpeed divides by the accumulation steps and averages over the ranks; this weight undoes both.
        divisor = cut.accumulation * (cut.averaged_over or cut.ranks)
        weight = divisor / step.label_tokens if plan.counts else 0.0
        yield TrainBatch(tensors, weight, plan.is_last, step)


def eval_batches(dataset: "PromptDataset", collate: Collate, cut: "BatchCut") -> Iterator[EvalBatch]:
    """Yield this rank's evaluation batches of `cut.micro_batch` samples, the data sets of a blend one after the other.

    Samples of similar length are batched together: a sum over a whole set does not depend on the order.
    """
    lengths, plans, sources = dataset.lengths(), [], []
    for source, members in enumerate(dataset.by_source().values()):
        order = members[(-lengths[members]).argsort(kind="stable")]
        units = Units(order, order, lengths[order], lengths[order])
        of_source = list(plan_micro_batches(units, cut.micro_batch, 1, cut.ranks, cut.rank))
        plans += of_source
        sources += [source] * len(of_source)
    batches = load_batches(dataset, plans, collate, cut.on_cpu)
    for plan, source, tensors in zip(plans, sources, batches, strict=True):
        yield EvalBatch(tensors, plan.counts, source)
