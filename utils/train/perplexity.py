"""Perplexity over the evaluation data: each sample counts once, whatever the batch size and the number of ranks."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from utils.data.batching.batches import Collate, EvalBatch, eval_batches
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
    sources: dict[str, "Evaluation"] = {}  # of each data set that has samples, by name, where there are several


def measure_perplexity(
    engine: torch.nn.Module,
    evaluation: PromptDataset,
    collate: Collate,
    config: RunConfig,
    should_stop: Callable[[], bool],
) -> Evaluation | None:
    """Return what the model is worth on the evaluation data, None when it was stopped; see `evaluate`."""
    cut = config.eval_batches
    sources = evaluation.by_source()
    count = sum(micro_batches_per_epoch(len(one), cut.micro_batch, 1, cut.ranks) for one in sources.values())
    return evaluate(engine, eval_batches(evaluation, collate, cut), config.device, should_stop, count, list(sources))


def evaluate(
    model: torch.nn.Module,
    batches: Iterable[EvalBatch],
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
    count: int = 0,
    sources: Sequence[str] = ("",),
) -> Evaluation | None:
    """Return exp(total negative log-likelihood / total label tokens), that mean itself, and the token accuracy.

    Those of each data set too, where there are several.

    Every rank must call it with the same number of batches. An empty set gives nan for each.

    Args:
        batches: of this rank; one that does not count weighs 0.
        should_stop: asked before every batch, with the same answer on all ranks; once it says yes, there is no
            result (None).
        count: number of the batches, for the live line.
        sources: names of the data sets that the batches are of.
    """
    give_back_freed_memory()
    training = model.training
    model.eval()
    dtype = torch.float32 if device.type == "mps" else torch.float64
    total = torch.zeros(len(sources), dtype=dtype, device=device)
    hits = torch.zeros(len(sources), dtype=torch.int64, device=device)
    tokens = [0] * len(sources)
    stopped = False
    with torch.no_grad(), phase("evaluating") as show:
        for number, (batch, counts, source) in enumerate(batches, 1):
            show(f"{number}/{count}")
            stopped = should_stop()
            if stopped:
                break
            loss = summed_loss(model, to_device(batch, device))
            if counts:
                total[source] += loss
                hits[source] += last_figures(model).hits
                tokens[source] += batch["targets"].numel()
    model.train(training)
    if stopped:
        return None
    sums = all_reduce_sum([*total.tolist(), *hits.tolist(), *tokens], device)
    losses, right, labels = (sums[place : place + len(sources)] for place in range(0, len(sums), len(sources)))
    of_each = {name: _worth(*figures) for name, *figures in zip(sources, losses, right, labels, strict=True)}
    whole = _worth(sum(losses), sum(right), sum(labels))
    if len(sources) == 1:
        return whole
    return whole._replace(sources={name: one for name, one in of_each.items() if not math.isnan(one.loss)})


def _worth(loss_sum: float, hits: float, tokens: float) -> Evaluation:
    if tokens == 0:
        return Evaluation(math.nan, math.nan, math.nan)
    loss = loss_sum / tokens
    return Evaluation(math.exp(loss) if loss < 700 else math.inf, loss, hits / tokens)


def describe_source(name: str, one: Evaluation) -> str:
    """Return a line on what a model is worth on one data set of a blend."""
    return f"on {name}: perplexity {one.perplexity}, loss {one.loss}, token accuracy {one.accuracy:.2%}"
