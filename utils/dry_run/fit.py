"""`--fit`: the fastest way to run the same optimizer steps that fits the memory of a device.

Micro batch and accumulation, gradient checkpointing, ZeRO stage and offload change no step: its samples, their order
and its mathematics stay. What was typed is left as it is; of the rest every setting's memory is estimated and its time
compared (`choices.py`, `step_time.py`), and the few best are timed (`measured.py`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedTokenizerBase

from utils.data.prompt_dataset import PromptDataset
from utils.distributed.ranks import answer_of_rank_0, is_rank_0, print_rank_0
from utils.dry_run.choices import Choice, Limits, Row, Table, apply, choices, samples_each
from utils.dry_run.measured import FACTOR, SECONDS, TIE, Contest, contest, fastest, time_steps
from utils.dry_run.memory import USABLE, memory_budget, size_words
from utils.dry_run.timed_step import OUT_OF_MEMORY, STEPS
from utils.errors import UserError
from utils.machine.device import free_memory
from utils.model.special_tokens import token_rows
from utils.notation import parse_fit
from utils.run_config import RunConfig
from utils.train.plan import fit_micro_batches

GB = 1e9
HINT = "lower --max_seq_len, train with --lora_dim or --quantize_base, use more devices, or type fewer settings"


class LastFit:
    """What this process chose last, for stepping down from it."""

    row: Row | None = None


class Found(NamedTuple):
    """What the estimates say."""

    limits: Limits
    rows: list[Row]
    contest: Contest
    kept: Row | None = None  # what the earlier run had


def fit_to_memory(
    config: RunConfig, data: PromptDataset, tokenizer: PreTrainedTokenizerBase, earlier: dict[str, Any] | None
) -> RunConfig:
    """Return the configuration with the settings that `--fit` chooses; without the flag, with its batches alone.

    Every rank must call it, and gets the same choice.

    Args:
        earlier: the decisions of the run that is resumed, or of `--like`'s; kept where they fit.

    Raises:
        UserError: nothing fits.
    """
    if config.args.fit is not None:
        found = answer_of_rank_0(_look(config, data, token_rows(tokenizer), earlier) if is_rank_0() else None)
        LastFit.row = found.kept or _decide(config, data, found)
        config = apply(config, LastFit.row.choice)
    return replace(config, batches=fit_micro_batches(config, data))


def _look(config: RunConfig, data: PromptDataset, entries: int, earlier: dict[str, Any] | None) -> Found:
    """Return all settings as estimated, and which of them are worth timing."""
    limits = limits_of(config)
    table = Table(config, data, entries, limits)
    kept = earlier_choice(config, earlier)
    if kept is not None:
        row = table.row(kept)
        if row.fits:
            print_rank_0(f"Fit: {kept.words}, as the earlier run; takes {row.memory} of {limits.words}")
            return Found(limits, [row], Contest([]), row)
        print_rank_0(f"Fit: what the earlier run had ({kept.words}) takes {row.memory}: chosen anew")
    rows = table.rows()
    return Found(limits, rows, contest(config, data, rows, table.parameters))


def _decide(config: RunConfig, data: PromptDataset, found: Found) -> Row:
    """Return the fastest row that fits, as measured where that was possible, and print the table."""
    timed = {row.choice: row for row in time_steps(config, data, found.contest.rows)}
    rows = [timed.get(row.choice, row) for row in found.rows]
    best, why = choose(rows)
    print_rank_0("\n".join(describe(rows, best, why, found)))
    if best is None:
        least = min(rows, key=lambda row: row.peak)
        smallest = f"the smallest, {least.choice.words}, takes {least.memory}"
        raise UserError(f"--fit: no setting fits {found.limits.words}: {smallest}: {HINT}.")
    return best


def choose(rows: list[Row]) -> tuple[Row | None, str]:
    """Return the row to run with and why; None where no row fits.

    Measured times decide, but not where the best by estimate could not be measured for a reason of its own.
    """
    first = min((row for row in rows if row.fits), key=lambda row: row.order, default=None)
    measured = fastest(rows)
    if first is None or measured is None or (first.problem is not None and not first.too_slow):
        of_all = first is not None and first.seconds == min(row.seconds for row in rows)
        why = "the fastest of all" if of_all else "the fastest that fits"
        return first, f"{why} by estimated memory and relative time"
    if measured.measured > min(row.measured for row in rows if row.measured is not None):
        return measured, f"the best estimate, and within {TIE - 1:.0%} of the fastest as measured"
    return measured, "the fastest as measured"


def limits_of(config: RunConfig) -> Limits:
    """Return the memory a rank may use: as `--fit` says, else the planned GPUs', else what is free now."""
    budget = memory_budget(config.gpus, config.device)
    device, words = budget.bytes_each, f"{size_words(budget.bytes_each)} each of {budget.device}"
    asked = parse_fit(config.args.fit)
    if asked is not None:
        device, words = asked * GB, f"{asked:g} GB (--fit)"
    elif config.gpus is None and config.device.type != "cpu":
        device = USABLE * get_accelerator().available_memory()
        words = f"{size_words(device)}, {USABLE:.0%} of what is free of {budget.device}"
    host = float("inf") if config.gpus is not None else free_memory()
    return Limits(device, host, words)


def earlier_choice(config: RunConfig, earlier: dict[str, Any] | None) -> Choice | None:
    """Return the choice among an earlier run's decisions; None where they make other steps, or are typed otherwise."""
    if earlier is None or not set(Choice._fields) <= earlier.keys():
        return None
    choice = Choice(**{name: earlier[name] for name in Choice._fields})
    same = choice.per_device_train_batch_size * choice.gradient_accumulation_steps == samples_each(config)
    return choice if same and choice[2:] in {possible[2:] for possible in choices(config)} else None


def describe(rows: list[Row], best: Row | None, why: str, found: Found) -> list[str]:
    """Return the table, its fastest settings first: what was timed, and of each kind the largest micro batch that fits.

    Where none of a kind fits it is the smallest. Times are relative to the fastest setting that was looked at, in the
    table or not.
    """
    fitting = {row.choice[2:]: row for row in reversed(rows) if row.fits}
    largest = {row.choice[2:]: row for row in rows} | fitting
    tried = [row for row in rows if row.measured is not None or row.problem is not None]
    shown = {row.choice: row for row in (*largest.values(), *tried)}.values()
    least = min(row.seconds for row in rows)
    lines = [f"Fit: settings of the same optimizer steps, for {found.limits.words}"]
    for row in sorted(shown, key=lambda row: row.order):
        parts = [f"{row.choice.words}: {row.memory}", f"time {row.seconds / least:.2f}"]
        if row.measured is not None:
            parts.append(f"{1000 * row.measured:.4g} ms measured")
        elif row.problem is not None:
            parts.append(f"not measured: {row.problem}")
        mark = "*" if row == best else " "
        tight = row.problem == OUT_OF_MEMORY or not row.fits
        lines.append(f"  {mark} {', '.join(parts)}, {'too much' if tight else 'fits'}")
    if found.contest.rows:
        lines.append(
            f"Fit: timed up to {STEPS} steps of each of the {len(found.contest.rows)} settings estimated to be within "
            f"{FACTOR:g} times the best, with random weights in processes of their own (at most {SECONDS:.0f} s)"
        )
    elif best is not None:
        lines.append(f"Fit: nothing was timed: {found.contest.why_not}")
    if best is not None:
        lines.append(f"Fit: {best.choice.words}, {why}")
    return lines
