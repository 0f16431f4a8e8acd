"""The figures of optimizer steps: summed on the device, and read from it all at once when they are asked for."""

import torch
import torch.distributed as dist

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
        """Return the means per label token of every step since the last call. Every rank must call it.

        Returns:
            `loss` and `token_accuracy` of each step; `router_loss` too in a model with routers.
        """
        if not self.sums:
            return []
        figures = {"loss": _over_ranks(self.sums), "token_accuracy": _over_ranks(self.hits)}
        if self.has_routers:
            figures["router_loss"] = _over_ranks(self.router_sums)
        steps = [
            {name: sums[number] / tokens for name, sums in figures.items()} for number, tokens in enumerate(self.tokens)
        ]
        self.sums, self.hits, self.router_sums, self.tokens = [], [], [], []
        return steps

    def collect_load(self) -> list[float] | None:
        """Return the busiest expert's tokens of each layer, over the mean of its experts, since the last call.

        1 is an even load. Every rank must call it; None for a model without routers.
        """
        if not self.has_routers:
            return None
        tokens = torch.zeros((), device=self.device) if self.expert_tokens is None else self.expert_tokens
        self.expert_tokens = None
        if dist.is_initialized():
            dist.all_reduce(tokens)
        return [round(value, 4) for value in (tokens.amax(-1) / tokens.mean(-1)).tolist()]

    def of_last_step(self) -> float:
        """Return the mean loss per label token of the last step. Waits for the device; every rank must call it."""
        total = self.last[0].detach().clone()
        if dist.is_initialized():
            dist.all_reduce(total)
        return total.item() / self.last[1]


def _over_ranks(sums: list[torch.Tensor]) -> list[float]:
    stacked = torch.stack(sums)
    if dist.is_initialized():
        dist.all_reduce(stacked)
    return stacked.tolist()
