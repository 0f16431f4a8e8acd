"""What will run: batches and steps."""

import math
from argparse import Namespace
from typing import Any, NamedTuple

from deepspeed.accelerator import get_accelerator

from utils.data.batching.sampler import Units, epoch_units, micro_batches_per_epoch, steps_per_epoch
from utils.data.prompt_dataset import PromptDataset
from utils.distributed.ranks import print_rank_0
from utils.run_config import data_ranks, parse_gpus, window_size
from utils.train.state import RunState

TOKENS_AT_ONCE = 2048  # 25 MB in float32 where an MLP is 3,072 wide, 32 MB in 16 bits where it is 8,192


class RunPlan(NamedTuple):
    """How long a run is."""

    units: int | None  # per epoch; None where they are not known, of a stream
    global_batch: int  # units per optimizer step, over all ranks and accumulation steps
    epochs: int
    steps: int  # all of them, those already done included

    def is_done(self, state: RunState) -> bool:
        """No step is left."""
        return state.step >= self.steps


def units_of_epoch(args: Namespace, train_data: PromptDataset, epoch: int) -> Units:
    """What batches are counted in, in the epoch's (or window's) order: samples, or with packing rows of samples."""
    row_length = args.max_seq_len if args.packing else None
    return epoch_units(train_data.lengths(), train_data.label_counts(), args.seed, epoch, row_length)


def units_in_use(args: Namespace, train_data: PromptDataset, state: RunState) -> Units:
    """The units of the epoch, or of the window of a stream, that the run stands in."""
    state.stream = train_data.follow(state.stream)
    return units_of_epoch(args, train_data, state.epoch if state.stream is None else state.stream["window"] + 1)


def micro_batches_of_epoch(args: Namespace, plan: RunPlan, units: Units) -> int:
    """Micro batches each rank runs in an epoch, which is the whole run of a stream."""
    accumulation = args.gradient_accumulation_steps
    if plan.units is None:
        return plan.steps * accumulation
    return micro_batches_per_epoch(len(units.tokens), args.per_device_train_batch_size, accumulation, data_ranks(args))


def print_plan(args: Namespace, train_data: PromptDataset, state: RunState) -> RunPlan:
    """Say what will run."""
    micro, accumulation, ranks = args.per_device_train_batch_size, args.gradient_accumulation_steps, data_ranks(args)
    units = units_of_epoch(args, train_data, epoch=1)
    count = len(units.tokens)
    known = None if args.streaming else count
    plan = plan_run(known, micro * accumulation * ranks, args.num_train_epochs, args.max_steps, state)
    whole = " (the first window)" if args.streaming else ""
    if args.packing:
        print_rank_0(
            f"Packing: {len(train_data)} samples{whole} in {count} rows of {args.max_seq_len}, "
            f"{units.tokens.sum() / (count * args.max_seq_len):.1%} full; a step holds "
            f"{micro * accumulation * ranks * len(train_data) / count:.1f} samples on average"
        )
    unit = "rows" if args.packing else "samples"
    what, portion = f"= {plan.epochs} epoch(s) of {count} {unit}", "an epoch"
    if args.streaming:
        what, portion = f"over a stream in windows of {window_size(args)} samples, each shuffled,", "a window"
    print_rank_0(
        f"Plan: {plan.steps} optimizer steps {what} in steps of {micro} x {accumulation} accumulation x {ranks} "
        f"{'rank(s)' if args.sequence_parallel_size == 1 else f'group(s) of {args.sequence_parallel_size} ranks'}; "
        f"{portion}'s last step takes what is left"
    )
    return plan


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


def cut_micro_batches(args: Namespace, ds_config: dict[str, Any], train_data: PromptDataset) -> None:
    """On a CPU without ZeRO, run micro batches of 2,048 tokens on average at most, and more of them: the same steps.

    The activations of larger ones are blocks above 32 MB, which are mapped anew each time (`host_memory`), and so few
    tokens keep a CPU as busy as more do (`benchmarks/RESULTS.md`), in less memory. In 16 bits gradients are added up in
    16 bits, as by any accumulation. Where ranks share gradients each micro batch would send its own, and padded batches
    stay as they were asked for: what is longest in them would change. `args` and `ds_config` are set to what is run.
    """
    asked = args.per_device_train_batch_size
    on_cpu = get_accelerator().device_name() == "cpu" and parse_gpus(args.dry_run) is None
    if not on_cpu or args.padding != "free" or args.zero_stage > 0 or len(train_data) == 0:
        return
    each = args.max_seq_len if args.packing else float(train_data.lengths().mean())
    micro = max(
        (size for size in range(1, asked + 1) if asked % size == 0 and size * each <= TOKENS_AT_ONCE), default=1
    )
    if micro == asked:
        return
    args.per_device_train_batch_size = ds_config["train_micro_batch_size_per_gpu"] = micro
    args.gradient_accumulation_steps *= asked // micro
    ds_config["gradient_accumulation_steps"] = args.gradient_accumulation_steps
    unit = "packed rows" if args.packing else "samples"
    print_rank_0(
        f"Micro batches: {asked} {unit} as {asked // micro} x {micro}, the same optimizer step "
        "(a CPU is as fast so, in less memory)"
    )
