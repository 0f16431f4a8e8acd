"""The figures of optimizer steps: summed on the device, and read from it all at once when they are asked for."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from utils.machine.later import OnItsWay
from utils.module.fused_loss import BatchFigures


class StepLosses:
    """Collects losses, hits and router losses of optimizer steps without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: list[torch.Tensor] = []
        self.hits: list[torch.Tensor] = []
        self.router_sums: list[torch.Tensor] = []
        self.tokens: list[int] = []
        self.expert_tokens: torch.Tensor | None = None  # [layers, experts], since they were last collected
        self.has_routers = False
        self._begin_step()
        self.last = self.current, 1  # the step just finished

    def _begin_step(self) -> None:
        self.current = torch.zeros((), device=self.device)
        self.current_hits = torch.zeros((), dtype=torch.int64, device=self.device)
        self.current_router = torch.zeros((), device=self.device)

    def add(
        self, summed_loss: torch.Tensor, counts: bool, figures: BatchFigures | None = None, labels: int = 0
    ) -> None:
        """Add one micro batch of the current step, which had so many label tokens."""
        if not counts:
            return
        self.current = self.current + summed_loss.detach()
        if figures is None:
            return
        self.current_hits = self.current_hits + figures.hits
        if figures.router_loss is not None:
            self.has_routers = True
            self.current_router = self.current_router + figures.router_loss * labels
            before = 0 if self.expert_tokens is None else self.expert_tokens
            self.expert_tokens = before + figures.expert_tokens

    def finish_step(self, step_label_tokens: int) -> None:
        """Complete the step, which had so many label tokens over all ranks."""
        self.sums.append(self.current)
        self.hits.append(self.current_hits)
        self.router_sums.append(self.current_router)
        self.tokens.append(step_label_tokens)
        self.last = self.current, step_label_tokens
        self._begin_step()

    def collect(self) -> list[dict[str, float]]:
        """Return what `begin_collecting` returns, at once. Every rank must call it."""
        return self.begin_collecting()()

    def begin_collecting(self) -> Callable[[], list[dict[str, float]]]:
        """Send the figures of every step since the last call to the host, without waiting. Every rank must call it.

        Returns:
            a function that waits for them and returns the means per label token of each step: `loss` and
            `token_accuracy`, and `router_loss` in a model with routers.
        """
        if not self.sums:
            return list
        names, sums = ["loss", "token_accuracy"], [self.sums, self.hits]
        if self.has_routers:
            names, sums = [*names, "router_loss"], [*sums, self.router_sums]
        coming, tokens = OnItsWay([_over_ranks(torch.stack(of_steps)) for of_steps in sums]), self.tokens
        self.sums, self.hits, self.router_sums, self.tokens = [], [], [], []

        def means() -> list[dict[str, float]]:
            figures = dict(zip(names, (values.tolist() for values in coming.get()), strict=True))
            return [
                {name: values[number] / count for name, values in figures.items()}
                for number, count in enumerate(tokens)
            ]

        return means

    def collect_load(self) -> list[float] | None:
        """Return what `begin_collecting_load` returns, at once. Every rank must call it."""
        return self.begin_collecting_load()()

    def begin_collecting_load(self) -> Callable[[], list[float] | None]:
        """Send the load of experts since the last call to the host, without waiting. Every rank must call it.

        Returns:
            a function that waits for it and returns the busiest expert's tokens of each layer over the mean of its
            experts, 1 for an even load; None for a model without routers.
        """
        if not self.has_routers:
            return lambda: None
        tokens = torch.zeros((), device=self.device) if self.expert_tokens is None else self.expert_tokens
        self.expert_tokens = None
        coming = OnItsWay([_over_ranks(tokens)])

        def load() -> list[float]:
            whole = coming.get()[0]
            return [round(value, 4) for value in (whole.amax(-1) / whole.mean(-1)).tolist()]

        return load

    def of_last_step(self) -> float:
        """Return the mean loss per label token of the last step. Waits for the device; every rank must call it."""
        total = self.last[0].detach().clone()
        if dist.is_initialized():
            dist.all_reduce(total)
        return total.item() / self.last[1]


def _over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Add `values`, which nobody else holds, over all ranks, in place; return them."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
