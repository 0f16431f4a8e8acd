"""`--dry_run`: everything but training, printed: data, steps, memory, the first sample, and the time where it fits."""

import itertools
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedTokenizerBase

from utils.data.batching.batches import collate_for, train_batches
from utils.data.batching.sampler import plan_micro_batches
from utils.data.prompt_dataset import PromptDataset
from utils.data.tokenization.tokenize_rows import end_of_conversation_token
from utils.distributed.ranks import print_rank_0
from utils.dry_run.activation_memory import Layout
from utils.dry_run.memory import Foreseen, describe, device_memory, foresee
from utils.engine.engine import create_optimizer, initialize_engine
from utils.machine.device import free_memory, to_device
from utils.model.layout_check import choose_layout
from utils.model.model_utils import has_weights
from utils.module.fused_loss import summed_loss
from utils.run_config import data_rank, data_ranks, parse_gpus, planned_ranks, sequence_part
from utils.train.plan import RunPlan, print_plan, units_of_epoch
from utils.train.state import RunState

BARS = 8
BAR_WIDTH = 40
SHOWN_TOKENS = 400
MEASURED_BATCHES = 3
MEASURED_SECONDS = 20.0
LABEL, RESET = "\033[32m", "\033[0m"


def dry_run(
    args: Namespace,
    ds_config: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    train_data: PromptDataset,
    eval_data: PromptDataset,
    device: torch.device,
    create_model: Callable[..., torch.nn.Module],
    groups: Namespace | None = None,
) -> None:
    """Print the plan of a run. Every rank must call it; nothing is written to `--output_dir`.

    Args:
        create_model: main.py's; called without weights, and only where the model fits this machine.
        groups: of `start_sequence_parallel`.
    """
    print_rank_0(f"Arguments: {json.dumps(vars(args), default=str)}")
    print_rank_0(f"DeepSpeed configuration: {json.dumps(ds_config)}")
    print_rank_0(describe_data(args, tokenizer, train_data, eval_data))
    plan = print_plan(args, train_data, RunState())
    print_rank_0(f"Schedule: {args.lr_scheduler_type.value}, {describe_warmup(args, plan)}")
    print_rank_0("First sample as the model sees it, tokens that are labels " + first_sample(train_data, tokenizer))
    gpus = parse_gpus(args.dry_run)
    layout = largest_micro_batch(args, train_data, gpus is None and device.type == "cpu")
    foreseen = foresee(args, ds_config, layout, planned_ranks(args), len(tokenizer))
    room = device_memory(gpus, device)
    print_rank_0(describe(foreseen, room))
    folder = args.model_name_or_path
    if os.path.isdir(folder) and not has_weights(folder):
        print_rank_0(f"Weights: none in {folder}, which is enough for a plan and not for a run")
    if gpus is not None:
        print_rank_0("Time: not measured, the GPUs of this plan are not here")
    elif foreseen.estimate.peak > room.bytes_each or untrained_bytes(foreseen) > free_memory():
        print_rank_0("Time: not measured, the model does not fit here")
    else:
        model = create_model(args, tokenizer, ds_config, untrained=True)
        print_rank_0(measure_time(model, args, ds_config, tokenizer, train_data, device, plan, groups))
    print_rank_0("Dry run: everything is checked and the data prepared; nothing was trained or saved")


# -------------------------------------------------------------------------------------------------- data


def describe_data(
    args: Namespace, tokenizer: PreTrainedTokenizerBase, train_data: PromptDataset, eval_data: PromptDataset
) -> str:
    """Samples, tokens, lengths as a histogram, what was cut, and what the layouts would waste."""
    lengths, labels = train_data.lengths(), train_data.label_counts()
    median, most = np.percentile(lengths, (50, 90))
    end = tokenizer.convert_tokens_to_ids(end_of_conversation_token(args, tokenizer))
    cut = int((last_tokens(train_data) != end).sum())
    longest = padded_cells(args, train_data)
    title = "Training data, the first window of the stream" if args.streaming else "Training data"
    lines = [
        f"{title}: {len(lengths)} samples, {lengths.sum()} tokens, {labels.sum()} of them labels "
        f"({labels.sum() / lengths.sum():.1%}); evaluation data: {len(eval_data)} samples, "
        f"{eval_data.lengths().sum()} tokens",
        f"Lengths: mean {lengths.mean():.1f}, median {median:.0f}, 90% up to {most:.0f}, longest {lengths.max()}; "
        f"--max_seq_len {args.max_seq_len} cuts {cut} samples ({cut / len(lengths):.1%})",
        *histogram(lengths),
        f"Padding: {1 - lengths.sum() / (len(lengths) * args.max_seq_len):.1%} of all tokens with --padding "
        f"max_length, {1 - lengths.sum() / longest:.1%} with longest, 0% with free; this run: {args.padding}",
    ]
    return "\n".join(lines)


def last_tokens(data: PromptDataset) -> np.ndarray:
    """[samples] the last token of each."""
    lists = data.table.with_format("arrow")[:]["input_ids"]
    return pc.list_flatten(lists).to_numpy()[np.cumsum(data.lengths()) - 1]


def histogram(lengths: np.ndarray) -> list[str]:
    """A line for each of at most 8 equal ranges of lengths."""
    width = max(1, -(-int(lengths.max()) // BARS))
    counts = np.bincount((lengths - 1) // width)
    return [
        f"  {number * width + 1:>6} to {(number + 1) * width:<6} {'#' * -(-BAR_WIDTH * count // counts.max())} {count}"
        for number, count in enumerate(counts.tolist())
    ]


def padded_cells(args: Namespace, data: PromptDataset) -> int:
    """Tokens of one epoch, padding included, when every micro batch is padded to its longest sample."""
    units = units_of_epoch(Namespace(**{**vars(args), "packing": False}), data, 1)
    lengths = data.lengths()
    plans = plan_micro_batches(
        units, args.per_device_train_batch_size, args.gradient_accumulation_steps, data_ranks(args), 0
    )
    # Of rank 0, whose share of real tokens stands for the others'.
    cells = real = 0
    for batch in plans:
        real += lengths[batch.indices].sum()
        cells += lengths[batch.indices].max() * len(batch.indices)
    return int(cells * (lengths.sum() / real))


def describe_warmup(args: Namespace, plan: RunPlan) -> str:
    """How the learning rate begins."""
    if args.num_warmup_steps == 0:
        return f"peak rate {args.learning_rate:g} from the first step"
    late = "; MORE than the run has, its peak is never reached" if args.num_warmup_steps >= plan.steps else ""
    share = args.num_warmup_steps / plan.steps
    return f"{args.num_warmup_steps} warm-up steps ({share:.1%}) to the peak rate {args.learning_rate:g}{late}"


def first_sample(data: PromptDataset, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first training sample, special tokens and all, its labels green in a terminal and in ⟦ ⟧ elsewhere."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    before, after = (LABEL, RESET) if colour else ("⟦", "⟧")
    ids, labels = data[0]["input_ids"], data[0]["labels"]
    is_label = (labels >= 0).tolist()
    is_label[0] = False  # nothing predicts the first token
    cuts = [0, *(i for i in range(1, len(ids)) if is_label[i] != is_label[i - 1]), len(ids)]
    parts = itertools.pairwise(cuts)
    shown = [(start, min(end, SHOWN_TOKENS)) for start, end in parts if start < SHOWN_TOKENS]
    texts = [
        f"{before}{tokenizer.decode(ids[start:end])}{after}" if is_label[start] else tokenizer.decode(ids[start:end])
        for start, end in shown
    ]
    more = f" ... {len(ids) - SHOWN_TOKENS} more tokens" if len(ids) > SHOWN_TOKENS else ""
    return f"{'green' if colour else 'in ⟦ ⟧'} ({len(ids)} tokens):\n  " + "".join(texts).replace("\n", "\n  ") + more


def largest_micro_batch(args: Namespace, data: PromptDataset, on_cpu: bool) -> Layout:
    """The micro batch of the first epoch that takes most memory."""
    units = units_of_epoch(args, data, 1)
    lengths, labels = data.lengths(), data.label_counts()
    ranks, parts = data_ranks(args), args.sequence_parallel_size
    most = Layout(1, 1, 1, on_cpu)
    for batch in plan_micro_batches(
        units, args.per_device_train_batch_size, args.gradient_accumulation_steps, ranks, 0
    ):
        chosen = lengths[batch.indices]
        learned = max(int(labels[batch.indices].sum()), 1)
        if args.padding == "free":
            length = -(-int(chosen.sum()) // parts)
            layout = Layout(1, length, min(learned, length), on_cpu, parts)
        else:
            length = args.max_seq_len if args.padding == "max_length" else int(chosen.max())
            layout = Layout(len(chosen), length, learned, on_cpu)
        if layout.rows * layout.length > most.rows * most.length:
            most = layout
    return most


# -------------------------------------------------------------------------------------------------- time


def untrained_bytes(foreseen: Foreseen) -> int:
    """CPU memory a rank needs to make the model in float32 before it goes to its device, or for offload."""
    return max(4 * foreseen.counts.parameters, foreseen.estimate.host)


def measure_time(
    model: torch.nn.Module,
    args: Namespace,
    ds_config: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    data: PromptDataset,
    device: torch.device,
    plan: RunPlan,
    groups: Namespace | None,
) -> str:
    """Train a few micro batches and say what the run takes; an untrained model is as slow as a trained one."""
    engine = initialize_engine(model, create_optimizer(model, args), ds_config, groups)
    padding = choose_layout(engine.module, args.padding, len(tokenizer), device, sequence_part(args))
    engine.train()
    collate = collate_for(padding, tokenizer.pad_token_id, args.max_seq_len, sequence_part(args))
    units = units_of_epoch(args, data, 1)
    on_cpu, ranks = device.type == "cpu", (data_rank(args), data_ranks(args))
    accumulation = args.gradient_accumulation_steps
    # On a CPU one sample a rank tells how many can be measured in the time there is.
    micro = 1 if on_cpu else args.per_device_train_batch_size
    seconds, tokens = _timed(engine, data, units, collate, micro, 1, ranks, device)
    if on_cpu:
        affordable = int(MEASURED_SECONDS / MEASURED_BATCHES / max(seconds, 1e-3))
        micro = max(1, min(args.per_device_train_batch_size, affordable))
    seconds, tokens = _timed(engine, data, units, collate, micro, MEASURED_BATCHES, ranks, device)
    speed = tokens / seconds
    total = plan.steps * float(units.tokens.mean()) * min(plan.global_batch, plan.units or plan.global_batch)
    if plan.units is not None:
        total = min(total, plan.epochs * float(units.tokens.sum()))
    note = "" if micro == args.per_device_train_batch_size else f", of {micro} sample(s) for want of time"
    return (
        f"Time: about {_words(total / speed)} for {total:.0f} tokens at {speed:.0f} tokens/s, from {MEASURED_BATCHES} "
        f"steps of one micro batch{note} (of {accumulation} a step), without evaluation and saving"
    )


def _timed(
    engine: Any,
    data: PromptDataset,
    units: Any,
    collate: Any,
    micro: int,
    steps: int,
    ranks: tuple[int, int],
    device: torch.device,
) -> tuple[float, float]:
    """(seconds, real tokens over all ranks) of some optimizer steps of one micro batch each.

    `ranks`: (this one's place among the data parallel ranks, their number).
    """
    batches = train_batches(data, units, collate, micro, 1, ranks[1], ranks[0], on_cpu=True)
    seconds = tokens = 0.0
    for _, batch in zip(range(steps), batches, strict=False):
        start = time.perf_counter()
        engine.set_gradient_accumulation_boundary(True)
        engine.backward(summed_loss(engine, to_device(batch.tensors, device)) * batch.weight)
        engine.step()
        get_accelerator().synchronize()
        seconds += time.perf_counter() - start
        tokens += batch.step.tokens
    return seconds, tokens


def _words(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
