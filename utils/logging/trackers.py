"""TensorBoard, Weights & Biases and Comet through DeepSpeed's monitor: its configuration, and what is sent."""

import math
import os
from argparse import Namespace
from importlib.util import find_spec
from typing import Any

import deepspeed

from utils.errors import UserError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
CHOICES = ("none", *PACKAGES)
PROJECT = "sft"
# The names DeepSpeed's own events have; all are over the samples trained on so far, as those are.
EVENTS = {
    "loss": "Train/Samples/train_loss", "learning_rate": "Train/Samples/lr", "grad_norm": "Train/Samples/grad_norm",
    "tokens_per_second": "Train/Samples/tokens_per_second", "padding_share": "Train/Samples/padding_share",
    "peak_share": "Train/Samples/peak_share", "memory_gb": "Train/Samples/memory_gb",
    "eval_loss": "Eval/Samples/loss", "perplexity": "Eval/Samples/perplexity",
}  # fmt: skip


def wanted_reports(args: Namespace) -> list[str]:
    """The services this run reports to; `--enable_tensorboard` is the former name of one of them."""
    names = [name for name in PACKAGES if name in args.report_to]
    return names if "tensorboard" in names or not args.enable_tensorboard else ["tensorboard", *names]


def check_reports(args: Namespace) -> None:
    """UserError when a service's package is not installed, or `none` stands beside others."""
    if "none" in args.report_to and len(args.report_to) > 1:
        raise UserError(f"--report_to {' '.join(args.report_to)}: none beside others says two things.")
    missing = [PACKAGES[name] for name in wanted_reports(args) if find_spec(PACKAGES[name]) is None]
    if missing:
        raise UserError(f"--report_to {' '.join(args.report_to)}: not installed: pip install {' '.join(missing)}")


def monitor_blocks(args: Namespace) -> dict[str, Any]:
    """The blocks of DeepSpeed's configuration that turn the wanted services on.

    Whatever else they have (team, workspace, `"comet": {"online": false}`) is given by `--deepspeed_config`.
    """
    blocks = {
        "tensorboard": {"enabled": True},
        "wandb": {"enabled": True, "project": os.environ.get("WANDB_PROJECT", PROJECT)},
        # By default it would send only every 100 samples' worth.
        "comet": {"enabled": True, "samples_log_interval": 1},
    }
    return {name: blocks[name] for name in wanted_reports(args)}


def send_record(engine: deepspeed.DeepSpeedEngine, record: dict[str, float | None]) -> None:
    """Send the figures of one record of metrics.jsonl, at the samples its step has behind it.

    Records must come in the order of their steps: Weights & Biases drops what is late.
    """
    samples = int(record["step"]) * engine.train_batch_size()
    events = [
        (EVENTS[name], value, samples)
        for name, value in record.items()
        if name in EVENTS and value is not None and math.isfinite(value)
    ]
    if events:
        engine.monitor.write_events(events)
