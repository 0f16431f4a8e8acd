"""Perplexity over the evaluation data: each sample counts once, whatever the batch size and the number of ranks."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from utils.data.batching.batches import Collate, eval_batches
from utils.data.batching.sampler import micro_batches_per_epoch
from utils.data.prompt_dataset import PromptDataset
from utils.distributed.ranks import all_reduce_sum
from utils.logging.console import phase
from utils.machine.cpu_allocator import give_back_freed_memory
from utils.machine.device import to_device
from utils.module.fused_loss import last_figures, summed_loss
from utils.run_config import RunConfig


class Evaluation(NamedTuple):
    """What a model is worth on the evaluation data; nan without any."""

    perplexity: float
    loss: float  # mean negative log-likelihood of a label token
    accuracy: float  # share of label tokens that no other token outdid in likelihood


def measure_perplexity(
    engine: torch.nn.Module,
    evaluation: PromptDataset,
    collate: Collate,
    config: RunConfig,
    should_stop: Callable[[], bool],
) -> Evaluation | None:
    """Return what the model is worth on the evaluation data, None when it was stopped; see `evaluate`."""
    cut = config.eval_batches
    count = micro_batches_per_epoch(len(evaluation), cut.micro_batch, 1, cut.ranks)
    return evaluate(engine, eval_batches(evaluation, collate, cut), config.device, should_stop, count)


def evaluate(
    model: torch.nn.Module,
    batches: Iterable[tuple[dict[str, torch.Tensor], bool]],
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
    count: int = 0,
) -> Evaluation | None:
    """Return exp(total negative log-likelihood / total label tokens), that mean itself, and the token accuracy.

    Every rank must call it with the same number of batches. An empty set gives nan for each.

    Args:
        batches: (batch, counts) pairs of this rank; one that does not count weighs 0.
        should_stop: asked before every batch, with the same answer on all ranks; once it says yes, there is no
            result (None).
        count: number of the batches, for the live line.
    """
    give_back_freed_memory()
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    hits = torch.zeros((), dtype=torch.int64, device=device)
    tokens = 0
    stopped = False
    with torch.no_grad(), phase("evaluating") as show:
        for number, (batch, counts) in enumerate(batches, 1):
            show(f"{number}/{count}")
            stopped = should_stop()
            if stopped:
                break
            loss = summed_loss(model, to_device(batch, device))
            if counts:
                total += loss
                hits += last_figures(model).hits
                tokens += batch["targets"].numel()
    model.train(training)
    if stopped:
        return None
    loss_sum, hit_sum, token_sum = all_reduce_sum([total.item(), hits.item(), tokens], device)
    if token_sum == 0:
        return Evaluation(math.nan, math.nan, math.nan)
    loss = loss_sum / token_sum
    return Evaluation(math.exp(loss) if loss < 700 else math.inf, loss, hit_sum / token_sum)
