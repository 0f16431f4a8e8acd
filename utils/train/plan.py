"""The plan of a run: how many steps it has, what batches are counted in, and what is due after a step."""

import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from utils.data.batching.sampler import Units, epoch_units, micro_batches_per_epoch, steps_per_epoch
from utils.data.prompt_dataset import PromptDataset
from utils.distributed.ranks import print_rank_0
from utils.run_config import BatchCut, RunConfig
from utils.train.state import RunState

TOKENS_AT_ONCE = 2048  # 25 MB in float32 where an MLP is 3,072 wide, 32 MB in 16 bits where it is 8,192


class RunPlan(NamedTuple):
    """The length of a run."""

    units: int | None  # samples, or packed rows, per epoch; None for a stream, whose length is unknown
    global_batch: int  # units per optimizer step, over all ranks and accumulation steps
    epochs: int
    steps: int  # all of them, those already done included

    def is_done(self, state: RunState) -> bool:
        """Whether no step is left."""
        return state.step >= self.steps


def fit_micro_batches(
    config: RunConfig, train_data: PromptDataset, say: Callable[[str], None] = print_rank_0
) -> BatchCut:
    """Return the cut of batches to run: on a CPU without ZeRO, micro batches of at most 2,048 tokens on average.

    More and smaller micro batches make the same optimizer steps. The activations of larger ones are blocks above 32 MB,
    which the C library maps anew each time (`machine/cpu_allocator.py`), and 2,048 tokens keep a CPU as busy as more do
    (`benchmarks/RESULTS.md`), in less memory. In 16 bits gradients are added up in 16 bits, as by any accumulation.
    Batches stay as asked where ranks share gradients (each micro batch would send its own) and where they are padded
    (another sample would be the longest of its batch).
    """
    asked = config.batches.micro_batch
    is_cpu_run = config.device.type == "cpu" and config.gpus is None
    if not is_cpu_run or config.layout != "free" or config.zero_stage > 0 or len(train_data) == 0:
        return config.batches
    micro = cpu_micro_batch(asked, config.row_length or float(train_data.lengths().mean()))
    if micro == asked:
        return config.batches
    unit = "packed rows" if config.packing else "samples"
    say(
        f"Micro batches: {asked} {unit} as {asked // micro} x {micro}, the same optimizer step "
        "(a CPU is as fast so, in less memory)"
    )
    return replace(config.batches, micro_batch=micro, accumulation=config.batches.accumulation * (asked // micro))


def cpu_micro_batch(asked: int, tokens: float) -> int:
    """Return the largest divisor of `asked` samples of so many tokens each that makes at most 2,048 tokens, or 1."""
    fitting = (size for size in range(1, asked + 1) if asked % size == 0 and size * tokens <= TOKENS_AT_ONCE)
    return max(fitting, default=1)


def units_of_epoch(config: RunConfig, train_data: PromptDataset, epoch: int) -> Units:
    """Return what batches are counted in, in the order of the epoch (or window): samples, or packed rows of samples."""
    return epoch_units(train_data.lengths(), train_data.label_counts(), config.args.seed, epoch, config.row_length)


def units_in_use(config: RunConfig, train_data: PromptDataset, state: RunState) -> Units:
    """Return the units of the epoch, or of the window of a stream, that the run is in."""
    state.stream = train_data.follow(state.stream)
    return units_of_epoch(config, train_data, state.epoch if state.stream is None else state.stream["window"] + 1)


def micro_batches_of_epoch(plan: RunPlan, cut: BatchCut, units: Units) -> int:
    """Count the micro batches each rank runs in an epoch, which is the whole run of a stream."""
    if plan.units is None:
        return plan.steps * cut.accumulation
    return micro_batches_per_epoch(len(units.tokens), cut.micro_batch, cut.accumulation, cut.ranks)


def warm_up_warning(args: Namespace, steps: int) -> str | None:
    """Return what `--num_warmup_steps` does other than its user may think; None where it does what it says."""
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    if args.num_warmup_steps and schedule == "constant":
        return (
            f"--num_warmup_steps {args.num_warmup_steps} has no effect with --lr_scheduler_type constant, which is at "
            "its rate from the first step: constant_with_warmup rises to it"
        )
    if args.num_warmup_steps > steps:
        return (
            f"--num_warmup_steps {args.num_warmup_steps} is more than the run's {steps} steps: the learning rate ends "
            f"at {steps / args.num_warmup_steps:.1%} of its peak"
        )
    return None


def make_plan(config: RunConfig, train_data: PromptDataset, state: RunState) -> RunPlan:
    """Plan the run from `state` on, and print the plan."""
    args, cut = config.args, config.batches
    units = units_of_epoch(config, train_data, epoch=1)
    count = len(units.tokens)
    known = None if config.is_streaming else count
    plan = plan_run(known, cut.global_batch, args.num_train_epochs, args.max_steps, state)
    if config.packing:
        whole = " (the first window)" if config.is_streaming else ""
        print_rank_0(
            f"Packing: {len(train_data)} samples{whole} in {count} rows of {args.max_seq_len}, "
            f"{units.tokens.sum() / (count * args.max_seq_len):.1%} full; a step holds "
            f"{cut.global_batch * len(train_data) / count:.1f} samples on average"
        )
    unit = "rows" if config.packing else "samples"
    what, portion = f"= {plan.epochs} epoch(s) of {count} {unit}", "an epoch"
    if config.is_streaming:
        what, portion = f"over a stream in windows of {config.window_size} samples, each shuffled,", "a window"
    group = args.sequence_parallel_size
    print_rank_0(
        f"Plan: {plan.steps} optimizer steps {what} in steps of {cut.micro_batch} x {cut.accumulation} accumulation x "
        f"{cut.ranks} {'rank(s)' if group == 1 else f'group(s) of {group} ranks'}; "
        f"{portion}'s last step takes what is left"
    )
    if warning := warm_up_warning(args, plan.steps):
        print_rank_0(f"Warm-up: {warning}")
    return plan


def plan_run(units: int | None, global_batch: int, epochs: int, max_steps: int | None, state: RunState) -> RunPlan:
    """Return the plan of a run that is at `state`; `max_steps` replaces the number of epochs, as in transformers.

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
    """Whether to evaluate after this step: at the end of an epoch and of the run, and every `eval_steps`."""
    every = eval_steps is not None and state.step % eval_steps == 0
    return state.is_between_epochs or plan.is_done(state) or every


def is_checkpoint_due(state: RunState, strategy: str, save_steps: int | None) -> bool:
    """Whether to save after this step: every `save_steps` ("steps"), at the end of an epoch ("epoch"), never ("no")."""
    if strategy == "epoch":
        return state.is_between_epochs
    return strategy == "steps" and state.step % save_steps == 0
