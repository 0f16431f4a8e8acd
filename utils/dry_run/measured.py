"""Time the best settings that fit, for `--fit`: a few real optimizer steps of each, in processes of their own."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from utils.data.batching.sampler import step_members
from utils.data.prompt_dataset import PromptDataset
from utils.distributed.launchers import free_port
from utils.distributed.ranks import answer_of_rank_0, gather_from_all, is_rank_0
from utils.dry_run.choices import Row, apply
from utils.dry_run.timed_step import OUT_OF_MEMORY, Job
from utils.engine.engine import build_kernels
from utils.logging.console import phase
from utils.machine.device import free_memory
from utils.run_config import BatchCut, RunConfig
from utils.train.plan import fit_micro_batches, units_of_epoch

CONTENDERS = 3
FACTOR = 1.5  # of the best estimate, within which settings are timed
SECONDS = 180.0  # for all of them
TIE = 1.05  # measured times this close count as equal: the estimate decides
STARTING = 15.0  # seconds until a process has imported everything and built an engine
WEIGHTS_A_SECOND = 1.5e8  # drawn at random
ROOT = Path(__file__).resolve().parents[2]


class Contest(NamedTuple):
    """What is to be timed, or why nothing is."""

    rows: list[Row]
    why_not: str | None = None


def contest(config: RunConfig, data: PromptDataset, rows: Sequence[Row], parameters: int) -> Contest:
    """Return the settings to time: of those that fit the best by estimate, but none that only adds work to another."""
    if config.gpus is not None:
        return Contest([], "the plan is for other GPUs than this machine's")
    if config.offload == "nvme":
        return Contest([], "with --offload nvme the disk would be filled for each")
    fitting = sorted((row for row in rows if row.fits), key=lambda row: row.order)
    names = {row.choice for row in fitting}
    chosen: list[Row] = []
    cuts: set[tuple] = set()
    for row in fitting:
        added = row.choice.gradient_checkpointing and row.choice._replace(gradient_checkpointing=False) in names
        run = (real_cut(config, data, row), row.choice[2:])  # on a CPU several cuts may be run as the same
        if not added and run not in cuts and row.seconds <= FACTOR * fitting[0].seconds:
            chosen.append(row)
            cuts.add(run)
    if len(chosen) < 2:
        return Contest([], f"nothing else that could be faster is estimated to be within {FACTOR:g} times its time")
    chosen = chosen[:CONTENDERS]
    return _affordable(chosen, parameters)


def _affordable(chosen: list[Row], parameters: int) -> Contest:
    """Leave out what there is no memory or time to try."""
    if 4 * parameters > free_memory():
        return Contest([], "the model with random weights, in float32, does not fit the CPU's free memory")
    building = STARTING + parameters / WEIGHTS_A_SECOND
    kept, total = [], 0.0
    for row in chosen:
        total += building + 2 * row.seconds
        if total <= SECONDS:
            kept.append(row)
    if len(kept) < 2:
        return Contest([], f"building the model and its steps are estimated to take more than {SECONDS:.0f} s")
    return Contest(kept)


def real_cut(config: RunConfig, data: PromptDataset, row: Row) -> BatchCut:
    """Return the micro batches that a run with this setting takes."""
    return fit_micro_batches(apply(config, row.choice), data, say=lambda line: None)


def time_steps(config: RunConfig, data: PromptDataset, rows: Sequence[Row]) -> list[Row]:
    """Return the rows with their measured times, the same on every rank; every rank must call it."""
    if not rows:
        return []
    build_kernels(row.choice.offload is not None for row in rows)  # once, and not in a process that may be ended
    deadline = time.monotonic() + SECONDS
    few = first_step(config, data)
    timed = []
    with phase("timing settings that fit") as show:
        for number, row in enumerate(rows):
            show(f"{number + 1}/{len(rows)}")
            left = (deadline - time.monotonic()) / (len(rows) - number)
            fitted = apply(config, row.choice)
            setting = replace(fitted, batches=fit_micro_batches(fitted, data, say=lambda line: None))
            timed.append(_agreed(row, gather_from_all(_one(setting, few, answer_of_rank_0(left)))))
    return timed


def first_step(config: RunConfig, data: PromptDataset) -> PromptDataset:
    """Return the samples of the first optimizer step, which are the same however it is cut, in memory."""
    units = units_of_epoch(config, data, 1)
    members = step_members(units, 0, min(config.batches.global_batch, len(units.tokens)))
    columns = data.table.with_format(None)[members]
    features = data.table.features
    return PromptDataset(datasets.Dataset.from_dict(columns, features=features), data.train_phase)


def _one(config: RunConfig, data: PromptDataset, seconds: float) -> dict[str, Any]:
    """Time a setting on this rank, together with the others; returns what `timed_step.main` wrote."""
    port = answer_of_rank_0(free_port() if is_rank_0() else None)
    environment = {**os.environ, "MASTER_PORT": str(port)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # torchrun's store is the run's own: these ranks meet apart
    with tempfile.TemporaryDirectory(prefix="sft_fit_") as folder:
        job, result = os.path.join(folder, "job"), os.path.join(folder, "result.json")
        with open(job, "wb") as file:
            pickle.dump(Job(config, data, seconds / 4, result), file)
        command = [sys.executable, "-m", "utils.dry_run.timed_step", job]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, env=environment, **quiet)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return {"problem": f"took more than {seconds:.0f} s", "too_slow": True}
        finally:
            process.kill()
            process.wait()
        if not os.path.isfile(result):
            killed = process.returncode < 0
            return {"problem": OUT_OF_MEMORY if killed else f"its process ended with status {process.returncode}"}
        with open(result, encoding="utf-8") as file:
            return json.load(file)


def _agreed(row: Row, found: list[dict[str, Any]]) -> Row:
    """Return the row with what all ranks found: the time of the slowest, or the first problem."""
    problems = [one["problem"] for one in found if "problem" in one]
    if problems:  # the rank that ran out of memory explains the others
        problem = OUT_OF_MEMORY if OUT_OF_MEMORY in problems else problems[0]
        slow = problem != OUT_OF_MEMORY and any(one.get("too_slow", False) for one in found)
        return row._replace(problem=problem, fits=problem != OUT_OF_MEMORY, too_slow=slow)
    return row._replace(measured=max(one["seconds"] for one in found))


def fastest(rows: Sequence[Row]) -> Row | None:
    """Return the best row as measured, among times that are nearly equal the best by estimate; None without times."""
    timed = [row for row in rows if row.measured is not None]
    if not timed:
        return None
    least = min(row.measured for row in timed)
    return min((row for row in timed if row.measured <= TIE * least), key=lambda row: row.order)
