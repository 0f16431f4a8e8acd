"""Perplexity over a whole evaluation set, each sample counted once, whatever the batch size and rank count."""

import math
from collections.abc import Callable, Iterable

import torch

from utils.distributed.ranks import all_reduce_sum
from utils.logging.console import phase
from utils.machine.cpu_allocator import give_back_freed_memory
from utils.machine.device import to_device
from utils.module.fused_loss import summed_loss


def evaluate(
    model: torch.nn.Module,
    batches: Iterable[tuple[dict[str, torch.Tensor], bool]],
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
    count: int = 0,
) -> tuple[float, float] | None:
    """(perplexity, loss): exp(total negative log-likelihood / total label tokens), and that mean itself.

    Every rank must call it with the same number of batches. An empty set gives (nan, nan).

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
                tokens += batch["targets"].numel()
    model.train(training)
    if stopped:
        return None
    loss_sum, token_sum = all_reduce_sum([total.item(), tokens], device)
    if token_sum == 0:
        return math.nan, math.nan
    loss = loss_sum / token_sum
    return (math.exp(loss) if loss < 700 else math.inf), loss
