"""`{output_dir}/run.json`: what a run was given, on what it ran, and how it ended."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import datasets
import deepspeed
import torch
import transformers

from utils.data.prompt_dataset import PromptDataset
from utils.distributed.ranks import global_rank, world_size
from utils.errors import UserError
from utils.logging.metrics_file import METRICS_FILE, curve, read_metrics
from utils.machine.device import device_label, peak_memory_gb
from utils.model.model_utils import count_parameters
from utils.train.plan import RunPlan
from utils.train.state import RunState
from utils.train.stop_request import Interrupted

RUN_FILE = "run.json"
ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def recorded_run(
    engine: deepspeed.DeepSpeedEngine,
    args: Namespace,
    train_data: PromptDataset,
    eval_data: PromptDataset,
    plan: RunPlan,
    state: RunState,
) -> Iterator[None]:
    """Write run.json at the start of what is within, and again at its end, however it ends.

    A run that goes on adds to the `starts` of the one before; a killed one stays "running".
    """
    if args.output_dir is None or global_rank() != 0:
        yield
        return
    began = time.perf_counter()
    start = describe_start(engine, state)
    run = {
        "status": "running",
        "arguments": plain_arguments(args),
        "data": {
            "cache": cache_folder(train_data), "train": data_sizes(train_data), "eval": data_sizes(eval_data)
        },
        "plan": {"steps": plan.steps, "epochs": plan.epochs, "samples_or_rows_per_step": plan.global_batch},
        "starts": [*(earlier_starts(args.output_dir) if state.step else []), start],
    }  # fmt: skip
    write_run_file(args.output_dir, run)

    def end(status: str, reason: str | None = None) -> None:
        start["seconds"] = round(time.perf_counter() - began, 3)
        start["status"] = run["status"] = status
        start["last_step"] = state.step
        start["peak_memory_gb"] = round(peak_memory_gb(engine.device), 3)
        if reason:
            start["reason"] = reason
        run["result"] = final_figures(args.output_dir)
        write_run_file(args.output_dir, run)

    try:
        yield
    except BaseException as err:
        with suppress(UserError, OSError, ValueError):  # what ended the run is what is to be heard of
            end("interrupted" if isinstance(err, (Interrupted, KeyboardInterrupt)) else "failed", str(err))
        raise
    end("finished" if plan.is_done(state) else "early stop")


def describe_start(engine: deepspeed.DeepSpeedEngine, state: RunState) -> dict[str, Any]:
    """One start of the program: when, how, on what."""
    modules = (torch, transformers, deepspeed, datasets)
    parameters, trained_parameters = count_parameters(engine.module)
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "first_step": state.step,
        "device": device_label(),
        "ranks": world_size(),
        "zero_stage": int(engine.zero_optimization_stage()),
        "parameters": parameters,
        "trained_parameters": trained_parameters,
        "versions": {"python": sys.version.split()[0], **{module.__name__: module.__version__ for module in modules}},
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """The commit this code is at, with "+changes" where files differ from it; None outside a checkout of it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:  # a copy inside another repository
            return None
        return git("rev-parse", "HEAD") + "+changes" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None


def cache_folder(data: PromptDataset) -> str | None:
    """The folder of the tokenised data; its name is its key."""
    files = data.table.cache_files
    return os.path.dirname(os.path.dirname(files[0]["filename"])) if files else None


def data_sizes(data: PromptDataset) -> dict[str, int]:
    """Samples, their tokens, and how many of those are labels."""
    if len(data) == 0:
        return {"samples": 0, "tokens": 0, "label_tokens": 0}
    return {
        "samples": len(data), "tokens": int(data.lengths().sum()), "label_tokens": int(data.label_counts().sum())
    }  # fmt: skip


def final_figures(output_dir: str) -> dict[str, float]:
    """What metrics.jsonl ends with: the last loss, and the perplexity before training, the last and the lowest."""
    if not os.path.isfile(os.path.join(output_dir, METRICS_FILE)):
        return {}
    records = read_metrics(output_dir)
    figures: dict[str, float] = {}
    if train := curve(records, "loss"):
        figures |= {"steps": train[-1][0], "loss": train[-1][1]}
    if evaluations := curve(records, "perplexity"):
        if evaluations[0][0] == 0:
            figures["perplexity_before"] = evaluations[0][1]
        figures["perplexity"] = evaluations[-1][1]
        figures["eval_loss"] = curve(records, "eval_loss")[-1][1]
        figures["best_step"], figures["best_perplexity"] = min(
            (point for point in evaluations if point[0] > 0 or len(evaluations) == 1), key=lambda point: point[1]
        )
    return figures


def earlier_starts(output_dir: str) -> list[dict[str, Any]]:
    """The starts of the run this one goes on from; none where its file is missing or unreadable."""
    try:
        with open(os.path.join(output_dir, RUN_FILE), encoding="utf-8") as file:
            return list(json.load(file)["starts"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def write_run_file(output_dir: str, run: dict[str, Any]) -> None:
    """Write run.json, whole or not at all; UserError when it can't be written."""
    path = os.path.join(output_dir, RUN_FILE)
    work = f"{path}.incomplete"
    try:
        os.makedirs(output_dir, exist_ok=True)
        with open(work, "w", encoding="utf-8") as file:
            json.dump(run, file, indent=2, ensure_ascii=False)
            file.write("\n")
        os.replace(work, path)
    except OSError as err:
        raise UserError(f"{path} can't be written ({err}): is the disk full, or the folder gone?") from err


def plain_arguments(args: Namespace) -> dict[str, Any]:
    """Every argument as a JSON file holds it."""
    values = {key: getattr(value, "value", value) for key, value in vars(args).items()}
    plain = (str, int, float, bool, list, type(None))
    return {key: value if isinstance(value, plain) else str(value) for key, value in values.items()}
