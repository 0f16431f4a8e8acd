"""Where a run is in its data and schedule, and what is due after a step: plain numbers, saved in every checkpoint."""

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from utils.data.sampler import steps_per_epoch


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
        """What the position is called in "Epoch e/n": the epoch in progress or, between two, the one just done."""
        return self.epoch - (self.is_between_epochs or self.step == 0)

    @property
    def is_between_epochs(self) -> bool:
        """An epoch is to begin; a stream has none, it ends with the run."""
        return self.units_done == 0 and self.stream is None

    def advance(self, units: int, units_in_all: int, next_window: dict[str, Any] | None = None) -> None:
        """An optimizer step is done over so many of the epoch's units, or of the window's with a `next_window`."""
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
        """Plain values for a JSON file; an infinite loss becomes null."""
        return {key: None if value == math.inf else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunState":
        """The state `to_dict` wrote."""
        return cls(**{**values, "best_loss": math.inf if values["best_loss"] is None else values["best_loss"]})


class RunPlan(NamedTuple):
    """How long a run is."""

    units: int | None  # per epoch; None where they are not known, of a stream
    global_batch: int  # units per optimizer step, over all ranks and accumulation steps
    epochs: int
    steps: int  # all of them, those already done included

    def is_done(self, state: RunState) -> bool:
        """No step is left."""
        return state.step >= self.steps


def plan_run(units: int | None, global_batch: int, epochs: int, max_steps: int | None, state: RunState) -> RunPlan:
    """The plan of a run that stands at `state`; `max_steps` replaces the number of epochs, as in transformers.

    A stream (`units` None) is one epoch of `max_steps`.
    """
    if units is None:
        return RunPlan(None, global_batch, 1, max_steps)
    per_epoch = steps_per_epoch(units, global_batch)
    rest_of_epoch = steps_per_epoch(units - state.units_done, global_batch)
    if max_steps is not None:
        beyond = max_steps - state.step - rest_of_epoch
        return RunPlan(units, global_batch, state.epoch + max(0, math.ceil(beyond / per_epoch)), max_steps)
    steps = state.step + (rest_of_epoch + (epochs - state.epoch) * per_epoch if state.epoch <= epochs else 0)
    return RunPlan(units, global_batch, epochs, steps)


def is_evaluation_due(state: RunState, plan: RunPlan, eval_steps: int | None) -> bool:
    """After this step: at the end of an epoch and of the run, and every `eval_steps`."""
    every = eval_steps is not None and state.step % eval_steps == 0
    return state.is_between_epochs or plan.is_done(state) or every


def is_checkpoint_due(state: RunState, strategy: str, save_steps: int | None) -> bool:
    """After this step: every `save_steps` ("steps"), at the end of an epoch ("epoch"), or never ("no")."""
    if strategy == "epoch":
        return state.is_between_epochs
    return strategy == "steps" and state.step % save_steps == 0
