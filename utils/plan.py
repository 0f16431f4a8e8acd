"""What will run: batches and steps."""

from argparse import Namespace

from utils.data.prompt_dataset import PromptDataset
from utils.data.sampler import Units, epoch_units, micro_batches_per_epoch
from utils.ds_utils import world_size
from utils.hardware import parse_gpus
from utils.run_state import RunPlan, RunState, plan_run
from utils.utils import print_rank_0


def planned_ranks(args: Namespace) -> int:
    """Ranks of the run the plan is for."""
    gpus = parse_gpus(args.dry_run)
    return world_size() if gpus is None else gpus.count


def data_ranks(args: Namespace) -> int:
    """Data parallel ranks of the run: those of one sequence parallel group count as one."""
    return planned_ranks(args) // args.sequence_parallel_size


def window_size(args: Namespace) -> int:
    """Samples of a window of a stream: whole steps, where steps are counted in samples."""
    global_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * data_ranks(args)
    return args.streaming if args.packing else -(-args.streaming // global_batch) * global_batch


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
