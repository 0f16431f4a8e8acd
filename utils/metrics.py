"""What a run records of itself: the loss of every optimizer step, evaluations, and their picture."""

import io
import json
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from utils.errors import UserError

METRICS_FILE = "metrics.jsonl"
PICTURE = "loss.png"
MEAN_PARTS = 25  # the running mean goes over this part of the steps


class StepLosses:
    """Collects the loss of optimizer steps on the device and brings them over in one go when asked."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: list[torch.Tensor] = []
        self.tokens: list[int] = []
        self.current = torch.zeros((), device=device)
        self.last = self.current, 1  # the step just finished

    def add(self, summed_loss: torch.Tensor, counts: bool) -> None:
        """Add one micro batch of the current step."""
        if counts:
            self.current = self.current + summed_loss.detach()

    def finish_step(self, step_label_tokens: int) -> None:
        """The step is complete; it had so many label tokens over all ranks."""
        self.sums.append(self.current)
        self.tokens.append(step_label_tokens)
        self.last = self.current, step_label_tokens
        self.current = torch.zeros((), device=self.device)

    def collect(self) -> list[float]:
        """Mean loss per label token of every step since the last call. Every rank must call it."""
        if not self.sums:
            return []
        sums = torch.stack(self.sums)
        if dist.is_initialized():
            dist.all_reduce(sums)
        losses = [total / tokens for total, tokens in zip(sums.tolist(), self.tokens, strict=True)]
        self.sums, self.tokens = [], []
        return losses

    def of_last_step(self) -> float:
        """Mean loss per label token of the step just finished. Waits for the device; every rank must call it."""
        total = self.last[0].detach().clone()
        if dist.is_initialized():
            dist.all_reduce(total)
        return total.item() / self.last[1]


class MetricsFile:
    """Appends one JSON object per record to `{output_dir}/metrics.jsonl`; does nothing without a folder."""

    def __init__(self, output_dir: str | None, is_writer: bool, keep_bytes: int = 0) -> None:
        """Start the file anew, or, for a run that goes on, cut it to the length it had at the checkpoint."""
        self.path = os.path.join(output_dir, METRICS_FILE) if output_dir and is_writer else None
        if self.path:
            os.makedirs(output_dir, exist_ok=True)
            with open(self.path, "ab") as file:
                file.truncate(min(keep_bytes, file.tell()))

    def size(self) -> int:
        """Bytes written so far."""
        return os.path.getsize(self.path) if self.path else 0

    def write(self, **record: float | int | str) -> None:
        """Append one record: `epoch`, `step`, and the figures of one kind of record; the README says which there are.

        A figure that is not finite becomes null: JSON has no word for it.
        """
        if self.path:
            record = {
                key: value if not isinstance(value, float) or math.isfinite(value) else None
                for key, value in record.items()
            }
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as err:
                raise UserError(
                    f"{self.path} can't be written any more ({err}): is the folder still there and the disk not full? "
                    "Checkpoints written so far are as they were."
                ) from err


def read_metrics(output_dir: str) -> list[dict[str, float]]:
    """The records of a run."""
    with open(os.path.join(output_dir, METRICS_FILE), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def draw_losses(output_dir: str, folder: str | None = None) -> str:
    """Draw training and evaluation loss over the optimizer steps into `loss.png` in `folder`; returns its path.

    `folder` is `output_dir` unless given. Beside the loss of every step stands its running mean, where there are
    enough steps for one.
    """
    records = read_metrics(output_dir)
    picture = _picture(tuple(curve(records, "loss")), tuple(curve(records, "eval_loss")))
    path = os.path.join(folder or output_dir, PICTURE)
    with open(path, "wb") as file:
        file.write(picture)
    return path


@lru_cache(maxsize=1)  # the end of a run wants it twice: beside its records, and in the folder of its model
def _picture(train: tuple[tuple[int, float], ...], evaluation: tuple[tuple[int, float], ...]) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), dpi=120)
    if train:
        steps, losses = zip(*train, strict=True)
        window = len(train) // MEAN_PARTS
        axes.plot(steps, losses, color="tab:blue", alpha=0.35 if window > 2 else 1, linewidth=1, label="training, step")
        if window > 2:
            mean = running_mean(losses, window)
            axes.plot(steps, mean, color="tab:blue", linewidth=1.8, label=f"training, mean of {window} steps")
    if evaluation:
        steps, losses = zip(*evaluation, strict=True)
        axes.plot(steps, losses, "o-", color="tab:orange", markersize=5, linewidth=1.8, label="evaluation")
        _name_last(axes, evaluation[-1])
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per label token (nats)")
    axes.grid(alpha=0.3)
    if train or evaluation:
        axes.legend()
    written = io.BytesIO()
    figure.tight_layout()
    figure.savefig(written, format="png")
    plt.close(figure)
    return written.getvalue()


def curve(records: list[dict[str, float]], name: str) -> list[tuple[float, float]]:
    """(step, value) of every record that has a finite value of this name."""
    return [(record["step"], record[name]) for record in records if record.get(name) is not None]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """At each place the mean of the last `window` values, or of all so far where there are fewer."""
    sums = [0.0, *accumulate(values)]
    starts = [max(0, place - window) for place in range(1, len(sums))]
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, 1)]


def _name_last(axes: Any, point: tuple[float, float]) -> None:
    """Write the last evaluation's loss and perplexity beside its dot."""
    step, loss = point
    words = f"{loss:.4g}, perplexity {math.exp(loss):.4g}" if loss < 700 else f"{loss:.3g}"
    place = {"textcoords": "offset points", "xytext": (3, 9), "ha": "right", "fontsize": 9}
    axes.annotate(words, (step, loss), color="tab:orange", **place)
