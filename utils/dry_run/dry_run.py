"""`--dry_run`: print what a run would do: data, steps, memory, the first sample, and the time where the model fits."""

import itertools
import json
import os
import sys
import time
from argparse import Namespace
from dataclasses import replace
from typing import Any, NamedTuple

import deepspeed
import numpy as np
import pyarrow.compute as pc
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedTokenizerBase

from utils.data.batching.batches import collate_for, train_batches
from utils.data.batching.sampler import Units, plan_micro_batches
from utils.data.prompt_dataset import PromptDataset
from utils.data.tokenization.tokenize_rows import end_of_conversation_token
from utils.data.training_data import TrainingData
from utils.distributed.ranks import print_rank_0
from utils.dry_run.activation_memory import Layout
from utils.dry_run.memory import MemoryEstimate, describe, estimate_memory, memory_budget
from utils.engine.engine import create_engine
from utils.machine.device import free_memory
from utils.model.build import create_model, model_form
from utils.model.layout_check import choose_layout
from utils.model.learning_rate import advise_rate
from utils.model.model_utils import has_weights
from utils.model.special_tokens import token_rows
from utils.run_config import BatchCut, RunConfig
from utils.train.plan import RunPlan, make_plan, units_of_epoch
from utils.train.state import RunState
from utils.train.step import micro_step

BARS = 8
BAR_WIDTH = 40
SHOWN_TOKENS = 400
MEASURED_BATCHES = 3
MEASURED_SECONDS = 20.0
LABEL, RESET = "\033[32m", "\033[0m"


def dry_run(
    config: RunConfig,
    ds_config: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    data: TrainingData,
    groups: Namespace | None = None,
) -> None:
    """Print the plan of a run. Every rank must call it; nothing is written to `--output_dir`.

    The model is loaded, without weights, only where it fits this machine. `groups` of `start_sequence_parallel`.
    """
    args = config.args
    print_rank_0(describe_data(config, tokenizer, data))
    plan = make_plan(config, data.train, RunState())
    warmup = describe_warmup(args.learning_rate, args.num_warmup_steps, plan.steps)
    print_rank_0(f"Schedule: {args.lr_scheduler_type}, {warmup}")
    print_rank_0("First sample as the model sees it, tokens that are labels " + first_sample(data.train, tokenizer))
    estimate = estimate_memory(
        args.model_name_or_path, model_form(args, config.gradient_checkpointing), ds_config,
        largest_micro_batch(config, data.train),
        token_rows(tokenizer), config.ranks, config.layout != "max_length",
    )  # fmt: skip
    advise_rate(estimate.counts.trainable, args.learning_rate, args.lora_learning_rate, args.lora_dim)
    budget = memory_budget(config.gpus, config.device)
    print_rank_0(describe(estimate, budget))
    name = args.model_name_or_path
    if os.path.isdir(name) and not has_weights(name):
        print_rank_0(f"Weights: none in {name}, which is enough for a plan and not for a run")
    if config.gpus is not None:
        print_rank_0("Time: not measured, the plan is for other GPUs than this machine's")
    elif estimate.total.peak > budget.bytes_each or untrained_bytes(estimate) > free_memory():
        print_rank_0("Time: not measured, the model does not fit here")
    else:
        print_rank_0(measure_time(config, ds_config, tokenizer, data.train, plan, groups))
    print_rank_0(f"Arguments: {json.dumps(config.plain_arguments)}")
    print_rank_0(f"DeepSpeed configuration: {json.dumps(ds_config)}")
    print_rank_0("Dry run: everything is checked and the data prepared; nothing was trained or saved")


# -------------------------------------------------------------------------------------------------- data


def describe_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase, data: TrainingData) -> str:
    """Return samples, tokens, a histogram of lengths, the number of truncated samples, and each layout's padding."""
    args, train = config.args, data.train
    lengths, labels = train.lengths(), train.label_counts()
    median, most = np.percentile(lengths, (50, 90))
    end_token = end_of_conversation_token(tokenizer, config.eot_token, args.model_name_or_path)
    truncated = int((last_tokens(train) != tokenizer.convert_tokens_to_ids(end_token)).sum())
    longest = padded_tokens(config, train)
    title = "Training data, the first window of the stream" if config.is_streaming else "Training data"
    lines = [
        f"{title}: {len(lengths)} samples, {lengths.sum()} tokens, {labels.sum()} of them labels "
        f"({labels.sum() / lengths.sum():.1%}); evaluation data: {len(data.evaluation)} samples, "
        f"{data.evaluation.lengths().sum()} tokens",
        f"Lengths: mean {lengths.mean():.1f}, median {median:.0f}, 90% up to {most:.0f}, longest {lengths.max()}; "
        f"--max_seq_len {args.max_seq_len} cuts {truncated} samples ({truncated / len(lengths):.1%})",
        *histogram(lengths),
        f"Padding: {1 - lengths.sum() / (len(lengths) * args.max_seq_len):.1%} of all tokens with --padding "
        f"max_length, {1 - lengths.sum() / longest:.1%} with longest, 0% with free; this run: {config.layout}",
    ]
    return "\n".join(lines)


def last_tokens(data: PromptDataset) -> np.ndarray:
    """Return the last token of each sample, [samples]."""
    lists = data.table.with_format("arrow")[:]["input_ids"]
    return pc.list_flatten(lists).to_numpy()[np.cumsum(data.lengths()) - 1]


def histogram(lengths: np.ndarray) -> list[str]:
    """Return a line for each of at most 8 equal ranges of lengths."""
    width = max(1, -(-int(lengths.max()) // BARS))
    counts = np.bincount((lengths - 1) // width)
    return [
        f"  {number * width + 1:>6} to {(number + 1) * width:<6} {'#' * -(-BAR_WIDTH * count // counts.max())} {count}"
        for number, count in enumerate(counts.tolist())
    ]


def padded_tokens(config: RunConfig, data: PromptDataset) -> int:
    """Count the tokens of one epoch, padding included, when every micro batch is padded to its longest sample."""
    cut, lengths = config.batches, data.lengths()
    units = units_of_epoch(replace(config, packing=False), data, 1)
    # Counted for rank 0, whose share of real tokens stands for the other ranks'.
    padded = real = 0
    for batch in plan_micro_batches(units, cut.micro_batch, cut.accumulation, cut.ranks, 0):
        real += lengths[batch.indices].sum()
        padded += lengths[batch.indices].max() * len(batch.indices)
    return int(padded * (lengths.sum() / real))


def describe_warmup(learning_rate: float, warmup_steps: int, steps: int) -> str:
    """Return how the learning rate begins, in words."""
    if warmup_steps == 0:
        return f"peak rate {learning_rate:g} from the first step"
    late = "; MORE than the run has, its peak is never reached" if warmup_steps >= steps else ""
    return f"{warmup_steps} warm-up steps ({warmup_steps / steps:.1%}) to the peak rate {learning_rate:g}{late}"


def first_sample(data: PromptDataset, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the first training sample with its special tokens, labels green in a terminal and in ⟦ ⟧ elsewhere."""
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


def largest_micro_batch(config: RunConfig, data: PromptDataset) -> Layout:
    """Return the micro batch of the first epoch that takes most memory."""
    cut, parts = config.batches, config.args.sequence_parallel_size
    on_cpu = config.gpus is None and config.device.type == "cpu"
    units, lengths, labels = units_of_epoch(config, data, 1), data.lengths(), data.label_counts()
    most = Layout(1, 1, 1, on_cpu)
    for batch in plan_micro_batches(units, cut.micro_batch, cut.accumulation, cut.ranks, 0):
        chosen = lengths[batch.indices]
        learned = max(int(labels[batch.indices].sum()), 1)
        if config.layout == "free":
            length = -(-int(chosen.sum()) // parts)
            layout = Layout(1, length, min(learned, length), on_cpu, parts)
        else:
            length = config.args.max_seq_len if config.layout == "max_length" else int(chosen.max())
            layout = Layout(len(chosen), length, learned, on_cpu)
        if layout.rows * layout.length > most.rows * most.length:
            most = layout
    return most


# -------------------------------------------------------------------------------------------------- time


class TimedRun(NamedTuple):
    """What a few optimizer steps are measured on."""

    engine: deepspeed.DeepSpeedEngine
    data: PromptDataset
    units: Units
    config: RunConfig


def untrained_bytes(estimate: MemoryEstimate) -> int:
    """Return the CPU memory a rank needs to make the model in float32 before it goes to its device, or for offload."""
    return max(4 * estimate.counts.parameters, estimate.total.host)


def untrained_engine(
    config: RunConfig, ds_config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, groups: Namespace | None
) -> tuple[deepspeed.DeepSpeedEngine, RunConfig]:
    """Return the engine of an untrained model, as slow as a trained one, and the configuration with its layout."""
    args = config.args
    form = model_form(args, config.gradient_checkpointing)
    model = create_model(args.model_name_or_path, form, tokenizer, ds_config, untrained=True)
    engine = create_engine(config, model, ds_config, groups)
    layout = choose_layout(
        engine.module, config.layout, len(tokenizer), config.device, config.sequence_part, args.max_seq_len
    )
    engine.train()
    return engine, config.with_layout(layout)


def measure_time(
    config: RunConfig,
    ds_config: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    data: PromptDataset,
    plan: RunPlan,
    groups: Namespace | None,
) -> str:
    """Train a few micro batches of an untrained model and return what the run will take."""
    engine, laid_out = untrained_engine(config, ds_config, tokenizer, groups)
    units = units_of_epoch(laid_out, data, 1)
    timed = TimedRun(engine, data, units, laid_out)
    cut = config.batches
    # On a CPU one sample a rank tells how many samples can be measured in the time there is.
    first = replace(cut, micro_batch=1 if cut.on_cpu else cut.micro_batch, accumulation=1)
    seconds, tokens = _timed(timed, first, tokenizer.pad_token_id, 1)
    micro = first.micro_batch
    if cut.on_cpu:
        affordable = int(MEASURED_SECONDS / MEASURED_BATCHES / max(seconds, 1e-3))
        micro = max(1, min(cut.micro_batch, affordable))
    seconds, tokens = _timed(timed, replace(first, micro_batch=micro), tokenizer.pad_token_id, MEASURED_BATCHES)
    speed = tokens / seconds
    total = plan.steps * float(units.tokens.mean()) * min(plan.global_batch, plan.units or plan.global_batch)
    if plan.units is not None:
        total = min(total, plan.epochs * float(units.tokens.sum()))
    note = "" if micro == cut.micro_batch else f", of {micro} sample(s) for want of time"
    return (
        f"Time: about {_words(total / speed)} for {total:.0f} tokens at {speed:.0f} tokens/s, from {MEASURED_BATCHES} "
        f"steps of one micro batch{note} (of {cut.accumulation} a step), without evaluation and saving"
    )


def _timed(timed: TimedRun, cut: BatchCut, pad_token_id: int, steps: int) -> tuple[float, float]:
    """Return (seconds, real tokens over all ranks) of some optimizer steps of one micro batch each.

    Batches are read as in a run, by a worker process where a GPU trains: the clock starts at the first one, and runs
    while the next ones are waited for.
    """
    config = timed.config
    collate = collate_for(config.layout, pad_token_id, config.args.max_seq_len, config.sequence_part)
    batches = train_batches(timed.data, timed.units, collate, cut)
    start, tokens = None, 0.0
    for _, batch in zip(range(steps), batches, strict=False):
        start = start or time.perf_counter()
        micro_step(timed.engine, batch, config.device)
        tokens += batch.step.tokens
    get_accelerator().synchronize()
    return time.perf_counter() - (start or 0.0), tokens


def _words(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
