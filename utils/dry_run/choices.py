"""The settings `--fit` chooses among: ways to run the same optimizer steps, with their memory and estimated time."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import PretrainedConfig

from utils.data.prompt_dataset import PromptDataset
from utils.dry_run.activation_memory import Counts, count, simulated_model
from utils.dry_run.dry_run import largest_micro_batch
from utils.dry_run.memory import quantized_counts, size_words, stage_name
from utils.dry_run.step_time import CPU, Load, Machine, step_seconds
from utils.dry_run.zero_memory import Sizes, estimate, setting_from_config
from utils.ds_file.read import merge_config
from utils.ds_utils import get_train_ds_config, scale_settings
from utils.engine.device_settings import zero_settings_of_device
from utils.model.build import model_form
from utils.model.model_utils import load_model_config
from utils.run_config import RunConfig
from utils.train.plan import units_of_epoch


class Choice(NamedTuple):
    """One way to run a step; a dictionary of it has the names of the arguments."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    zero_stage: int
    offload: str | None

    @property
    def words(self) -> str:
        checkpointing = "on" if self.gradient_checkpointing else "off"
        return (
            f"micro batch {self.per_device_train_batch_size} x {self.gradient_accumulation_steps} accumulation, "
            f"checkpointing {checkpointing}, ZeRO {stage_name(self.zero_stage, self.offload is not None)}"
        )


class Row(NamedTuple):
    """A choice, what it takes, and whether it fits."""

    choice: Choice
    peak: int  # bytes of the device
    host: int  # bytes of CPU memory per rank
    seconds: float  # of a step as estimated, for comparing
    fits: bool
    measured: float | None = None  # seconds of a step
    problem: str | None = None  # why it was not measured, though it was to be
    too_slow: bool = False  # that is why

    @property
    def memory(self) -> str:
        return size_words(self.peak) + (f" and {size_words(self.host)} of CPU memory" if self.host else "")

    @property
    def order(self) -> tuple:
        """Return what rows are compared by: estimated time, then the plainer setting."""
        choice = self.choice
        return (self.seconds, choice.zero_stage, choice.offload is not None, choice.gradient_checkpointing)


class Limits(NamedTuple):
    """What one rank may use, in bytes."""

    device: float
    host: float
    words: str


def apply(config: RunConfig, choice: Choice) -> RunConfig:
    """Return the configuration with a choice's settings."""
    return config.with_zero(choice.zero_stage, choice.offload).with_cut(
        choice.per_device_train_batch_size, choice.gradient_accumulation_steps, choice.gradient_checkpointing
    )


def samples_each(config: RunConfig) -> int:
    """Return the samples, or packed rows, of a step on each device."""
    return config.batches.micro_batch * config.batches.accumulation


def choices(config: RunConfig) -> list[Choice]:
    """List the settings that make this run's steps and leave what was typed; larger micro batches first."""
    typed, zero = config.args.typed, config.overrides.get("zero_optimization", {})
    on_cpu = config.gpus is None and config.device.type == "cpu"
    stages = [config.zero_stage] if "zero_stage" in typed or "stage" in zero else [0, 1, 2, 3]
    if config.args.quantize_base or config.args.torch_compile:  # which are refused at stage 3
        stages = [stage for stage in stages if stage < 3]
    is_placed = config.offload is not None or "offload" in typed or any(name.startswith("offload") for name in zero)
    places = [config.offload] if is_placed else [None] if on_cpu else [None, "cpu"]
    checkpointing = [True] if config.args.gradient_checkpointing else [False, True]
    pairs = [(stage, place) for stage in stages for place in places if stage > 0 or place is None]
    if config.ranks == 1 and len(stages) > 1:  # nothing is shared: a stage is only the way to offload
        pairs = [(stage, place) for stage, place in pairs if stage in (0, 2, 3) and (stage == 0 or place)] or pairs
    cuts = [config.batches.micro_batch]
    if "gradient_accumulation_steps" not in typed:
        cuts = divisors(samples_each(config))
    each = samples_each(config)
    return [Choice(cut, each // cut, is_on, *pair) for cut in cuts for is_on in checkpointing for pair in pairs]


def divisors(number: int) -> list[int]:
    """Return divisors of a number from it to 1, each at most half of the one before."""
    found = [number]
    while found[-1] > 1:
        found.append(max(part for part in range(1, found[-1] // 2 + 1) if number % part == 0))
    return found


class Table:
    """Memory and time of settings; a model is simulated once for each micro batch with and without checkpointing."""

    def __init__(self, config: RunConfig, data: PromptDataset, entries: int, limits: Limits) -> None:
        self.config, self.data, self.entries, self.limits = config, data, entries, limits
        self.tokens = float(units_of_epoch(config, data, 1).tokens.mean()) * samples_each(config)
        self.counted: dict[tuple[int, bool], Counts] = {}

    @property
    def parameters(self) -> int:
        """Return the parameters of the model of the rows made so far."""
        return next(iter(self.counted.values())).parameters

    def rows(self) -> list[Row]:
        """Return the rows of all settings; of smaller micro batches only where a larger one does not fit.

        The next smaller one of the fastest is there too: the estimate of its time leaves most out.
        """
        rows: list[Row] = []
        fitting: set[tuple] = set()
        for choice in choices(self.config):
            if choice[2:] not in fitting:
                rows.append(self.row(choice))
                if rows[-1].fits:
                    fitting.add(choice[2:])
        best = min((row for row in rows if row.fits), key=lambda row: row.order, default=None)
        if best is not None and self.config.gpus is None:
            kind, size = best.choice[2:], best.choice.per_device_train_batch_size
            smaller = (one for one in choices(self.config) if one[2:] == kind and one[0] < size)
            rows += [self.row(choice) for choice in list(smaller)[:1]]
        return rows

    def row(self, choice: Choice) -> Row:
        """Return what a setting takes."""
        config = apply(self.config, choice)
        counts = self._counts(config)
        on_cpu = config.gpus is None and config.device.type == "cpu"
        size = 4 if config.dtype == "fp32" else 2
        setting = setting_from_config(trial_ds_config(config), config.ranks, size, on_cpu)
        guess = estimate(Sizes(*counts), setting)
        fits = guess.peak <= self.limits.device and (on_cpu or guess.host <= self.limits.host)
        load = Load(
            counts.parameters, counts.trainable, size, self.tokens / config.args.sequence_parallel_size,
            choice.gradient_accumulation_steps, config.ranks, choice.zero_stage, choice.offload is not None,
            choice.gradient_checkpointing,
        )  # fmt: skip
        seconds = step_seconds(load, CPU if on_cpu else Machine())
        return Row(choice, guess.peak, 0 if on_cpu else guess.host, seconds, fits)

    def _counts(self, config: RunConfig) -> Counts:
        key = (config.batches.micro_batch, config.gradient_checkpointing)
        if key not in self.counted:
            form = model_form(config.args, config.gradient_checkpointing)
            layout = largest_micro_batch(config, self.data)
            model_config: PretrainedConfig = load_model_config(config.args.model_name_or_path)
            packed = quantized_counts(model_config, form)
            model = simulated_model(model_config, form, config.dtype, self.entries)
            self.counted[key] = count(model, layout, config.layout != "max_length")._replace(**packed)
        return self.counted[key]


def trial_ds_config(config: RunConfig) -> dict[str, Any]:
    """Return what the memory estimate reads of the DeepSpeed configuration that a run would have; prints nothing."""
    ds_config = get_train_ds_config(config.flag_offload, config.zero_stage, config.dtype)
    device = zero_settings_of_device(config, say=lambda line: None)
    ds_config = merge_config(ds_config, {"zero_optimization": device})
    ds_config["zero_optimization"] |= scale_settings(config, is_trial=True)
    ds_config["gradient_accumulation_steps"] = config.batches.accumulation
    ds_config = merge_config(ds_config, config.overrides)
    ds_config["zero_optimization"]["stage"] = config.zero_stage
    ds_config["sequence_parallel_size"] = config.args.sequence_parallel_size
    return ds_config
