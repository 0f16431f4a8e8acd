"""The batches of one epoch, or of one window of a stream, from the run's position on."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from utils.data.batching.batches import Collate, TrainBatch, train_batches
from utils.data.batching.collate import collate_filled
from utils.data.batching.sampler import StepSize, Units, remaining_units, step_members
from utils.data.prompt_dataset import PromptDataset
from utils.run_config import RunConfig
from utils.train.plan import RunPlan, micro_batches_of_epoch, units_in_use
from utils.train.state import RunState


class Epoch(NamedTuple):
    """What is left of an epoch."""

    units: Units  # samples or packed rows of the whole epoch, in its order
    micro_batches: int  # of the whole epoch, on each rank
    batches: Iterator[TrainBatch]  # this rank's, from the run's position on


def open_epoch(config: RunConfig, train_data: PromptDataset, plan: RunPlan, state: RunState, collate: Collate) -> Epoch:
    """Return the epoch that the run is in; a stream reads the window that it is in."""
    units = units_in_use(config, train_data, state)
    if config.packing and config.compiled_shape is not None:
        collate = partial(collate_filled, tokens=config.compiled_shape[1])
    batches = train_batches(train_data, remaining_units(units, state.units_done), collate, config.batches)
    return Epoch(units, micro_batches_of_epoch(plan, config.batches, units), batches)


def finish_step(epoch: Epoch, train_data: PromptDataset, state: RunState, step: StepSize) -> list[int]:
    """Advance `state` by an optimizer step; returns the positions of its samples in the training data."""
    samples = step_members(epoch.units, state.units_done, step.units)
    state.advance(step.units, len(epoch.units.tokens), train_data.after)
    return samples
