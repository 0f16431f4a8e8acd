"""`{output_dir}/run.json`: the arguments and decisions of a run, its machine, and how it ended."""

import os
import subprocess
import sys
import time
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
from utils.data.training_data import TrainingData
from utils.distributed.failures import Interrupted
from utils.distributed.ranks import is_rank_0, world_size
from utils.errors import UserError
from utils.files import RUN_FILE, read_run_file, write_json
from utils.logging.metrics_file import METRICS_FILE, curve, read_metrics
from utils.machine.device import device_label, peak_memory_gb
from utils.model.model_utils import count_parameters
from utils.run_config import RunConfig
from utils.train.plan import RunPlan
from utils.train.sources import read_sources, say_what_differs, sources_of
from utils.train.state import RunState

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def recorded_run(
    engine: deepspeed.DeepSpeedEngine, config: RunConfig, data: TrainingData, state: RunState, plan: RunPlan
) -> Iterator[None]:
    """Write run.json at the start of the block, and again at its end, however it ends.

    A resumed run adds to the `starts` of the run before; a killed one stays "running".
    """
    output_dir = config.args.output_dir
    if output_dir is None or not is_rank_0():
        yield
        return
    began = time.perf_counter()
    start = describe_start(engine, state)
    sources = sources_of(config.args)
    if config.args.like is not None:
        say_what_differs(config.args.like, read_sources(config.args.like), sources)
    run = {
        "status": "running",
        "arguments": config.plain_arguments,
        "decisions": config.decisions,
        "sources": sources,
        "data": {
            "cache": cache_folder(data.train), "train": data_sizes(data.train), "eval": data_sizes(data.evaluation),
        },
        "plan": {"steps": plan.steps, "epochs": plan.epochs, "samples_or_rows_per_step": plan.global_batch},
        "starts": [*(earlier_starts(output_dir) if state.step else []), start],
    }  # fmt: skip
    write_run_file(output_dir, run)

    def end(status: str, reason: str | None = None) -> None:
        start["seconds"] = round(time.perf_counter() - began, 3)
        start["status"] = run["status"] = status
        start["last_step"] = state.step
        start["peak_memory_gb"] = round(peak_memory_gb(engine.device), 3)
        if reason:
            start["reason"] = reason
        run["result"] = final_figures(output_dir)
        write_run_file(output_dir, run)

    try:
        yield
    except BaseException as err:
        with suppress(UserError, OSError, ValueError):  # the error that ended the run is the one to report
            end("interrupted" if isinstance(err, (Interrupted, KeyboardInterrupt)) else "failed", str(err))
        raise
    end("finished" if plan.is_done(state) else "early stop")


def describe_start(engine: deepspeed.DeepSpeedEngine, state: RunState) -> dict[str, Any]:
    """Describe one start of the program: time, command, device, versions."""
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
    """Return the commit of this code, with "+changes" where files differ from it; None outside a checkout of it."""

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
    """Return the folder of the tokenized-data cache; its name is its key."""
    files = data.table.cache_files
    return os.path.dirname(os.path.dirname(files[0]["filename"])) if files else None


def data_sizes(data: PromptDataset) -> dict[str, int]:
    """Count samples, their tokens, and the label tokens among them."""
    if len(data) == 0:
        return {"samples": 0, "tokens": 0, "label_tokens": 0}
    return {
        "samples": len(data), "tokens": int(data.lengths().sum()), "label_tokens": int(data.label_counts().sum())
    }  # fmt: skip


def final_figures(output_dir: str) -> dict[str, float]:
    """Return the last loss of metrics.jsonl, and the perplexity before training, the last and the lowest."""
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
        if accuracy := curve(records, "eval_accuracy"):
            figures["eval_accuracy"] = accuracy[-1][1]
        if sources := curve(records, "sources"):
            figures["sources"] = sources[-1][1]
        figures["best_step"], figures["best_perplexity"] = min(
            (point for point in evaluations if point[0] > 0 or len(evaluations) == 1), key=lambda point: point[1]
        )
    return figures


def earlier_starts(output_dir: str) -> list[dict[str, Any]]:
    """Return the starts of the run that is resumed; none where its file is missing or unreadable."""
    starts = read_run_file(output_dir).get("starts")
    return starts if isinstance(starts, list) else []


def write_run_file(output_dir: str, run: dict[str, Any]) -> None:
    """Write run.json, whole or not at all; UserError when it can't be written."""
    path = os.path.join(output_dir, RUN_FILE)
    try:
        write_json(path, run)
    except OSError as err:
        raise UserError(f"{path} can't be written ({err}): is the disk full, or the folder gone?") from err
