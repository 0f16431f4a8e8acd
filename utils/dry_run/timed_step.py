"""Time an optimizer step of one setting in a process of its own: `python -m utils.dry_run.timed_step JOB`.

`measured.py` starts it on every rank. The process group, the model with random weights, DeepSpeed's engine and all
memory end with the process, so the run that waits for it is what it was: its random states, its device, its libraries.
"""

from __future__ import annotations

import copy
import ctypes
import os
import pickle
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from utils.logging.library_log import quiet_libraries  # first: DeepSpeed prints while it is imported

# isort: split
import torch
from deepspeed.accelerator import get_accelerator

from utils.data.batching.batches import collate_for, train_batches
from utils.data.prompt_dataset import PromptDataset
from utils.distributed.ranks import gather_from_all
from utils.dry_run.dry_run import untrained_engine
from utils.ds_utils import build_ds_config
from utils.errors import UserError
from utils.files import write_json
from utils.logging.trackers import PACKAGES
from utils.model.tokenizer import create_tokenizer
from utils.module.remote_code import trust_remote_code
from utils.run_config import RunConfig
from utils.train.plan import units_of_epoch
from utils.train.start import start_run
from utils.train.step import micro_step

STEPS = 3  # after the first, which is not counted
OUT_OF_MEMORY = "ran out of memory"
_KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


class Job(NamedTuple):
    """What is to be timed."""

    config: RunConfig  # with the setting
    data: PromptDataset  # the samples of one optimizer step
    seconds: float  # that the steps may take
    result: str  # the file of the result


def main(path: str) -> None:
    """Time the job in the file `path`, and write {"seconds": ...} of a step, or {"problem": ...}."""
    with suppress(OSError, AttributeError):  # Linux alone
        ctypes.CDLL(None).prctl(_KILL_WITH_PARENT, signal.SIGKILL)
    with open(path, "rb") as file:
        job: Job = pickle.load(file)
    try:
        with quiet_libraries():
            found = {"seconds": step_seconds(job)}
    except (torch.OutOfMemoryError, MemoryError):
        found = {"problem": OUT_OF_MEMORY}
    except (UserError, RuntimeError, ValueError, OSError, AssertionError) as err:
        found = {"problem": " ".join(f"{type(err).__name__}: {err}".split())[:200]}
    write_json(job.result, found)


def step_seconds(job: Job) -> float:
    """Return the seconds of an optimizer step: the least of some, after one that is not counted."""
    args = copy.copy(job.config.args)
    args.output_dir, args.report_to, args.enable_tensorboard = None, ["none"], False
    trust_remote_code(args.trust_remote_code)
    _, groups = start_run(args)
    config = replace(job.config, args=args)
    tokenizer = create_tokenizer(args.model_name_or_path, config.eot_token)
    ds_config = build_ds_config(config)
    for name in (*PACKAGES, "csv_monitor"):  # of the file of --deepspeed_config
        ds_config.pop(name, None)
    engine, config = untrained_engine(config, ds_config, tokenizer, groups)
    collate = collate_for(config.layout, tokenizer.pad_token_id, args.max_seq_len, config.sequence_part)
    batches = []
    for batch in train_batches(job.data, units_of_epoch(config, job.data, 1), collate, config.batches):
        batches.append(batch)
        if batch.is_last:
            break

    def step() -> float:
        get_accelerator().synchronize()
        start = time.perf_counter()
        for batch in batches:
            micro_step(engine, batch, config.device)
        get_accelerator().synchronize()
        return time.perf_counter() - start

    first = max(gather_from_all(step()))  # every rank takes the same number of steps
    affordable = int(job.seconds / max(first, 1e-6))
    return min(step() for _ in range(max(1, min(STEPS, affordable))))


if __name__ == "__main__":
    main(sys.argv[1])
    os._exit(0)  # at once: ending a process group may wait for a rank that failed
