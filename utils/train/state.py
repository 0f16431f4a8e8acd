"""The position of a run in its data and schedule: plain numbers, saved in every checkpoint."""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class RunState:
    """The position of a run between two optimizer steps.

    The position in the data is counted in units of the epoch's order (samples, or packed rows), so it means the
    same on any number of ranks.
    """

    step: int = 0  # optimizer steps taken
    epoch: int = 1  # the epoch the next step belongs to
    units_done: int = 0  # units of that epoch already used
    scheduler_steps: int = 0  # steps the learning rate has followed: all but the skipped ones
    evaluation_due: bool = True  # perplexity at this position is still to be measured
    best_loss: float = math.inf
    best_step: int = 0
    evaluations_without_gain: int = 0
    metrics_bytes: int = 0  # length of metrics.jsonl at this position
    stream: dict[str, Any] | None = None  # where the window in use begins, whose units `units_done` counts then

    @property
    def epochs_begun(self) -> int:
        """Return e of "Epoch e/n": the epoch in progress or, between two epochs, the one just done."""
        return self.epoch - (self.is_between_epochs or self.step == 0)

    @property
    def is_between_epochs(self) -> bool:
        """Whether an epoch is about to begin; never in a stream, which is one epoch."""
        return self.units_done == 0 and self.stream is None

    def advance(self, units: int, units_in_all: int, next_window: dict[str, Any] | None = None) -> None:
        """Advance by an optimizer step over so many units of the epoch, or of the window before `next_window`."""
        self.step += 1
        self.units_done += units
        if self.units_done >= units_in_all:
            self.units_done = 0
            self.epoch += next_window is None
            self.stream = next_window

    def record_evaluation(self, loss: float) -> bool:
        """Note the loss of the evaluation that was due; True when it is the best of the trained model so far."""
        self.evaluation_due = False
        if self.step == 0:
            return False
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.evaluations_without_gain = loss, self.step, 0
            return True
        self.evaluations_without_gain += 1
        return False

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a JSON file; an infinite loss becomes null."""
        return {key: None if value == math.inf else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunState":
        """Return the state that `to_dict` wrote."""
        return cls(**{**values, "best_loss": math.inf if values["best_loss"] is None else values["best_loss"]})
