"""Experiment trackers (TensorBoard, Weights & Biases, Comet) through DeepSpeed's monitor: settings and records sent."""

import math
import os
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from utils.errors import UserError

if TYPE_CHECKING:
    import deepspeed

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
CHOICES = ("none", *PACKAGES)
PROJECT = "sft"
# Names of the trackers' curves, in the style of DeepSpeed's own; all are over the samples trained on so far.
EVENTS = {
    "loss": "Train/Samples/train_loss", "learning_rate": "Train/Samples/lr", "grad_norm": "Train/Samples/grad_norm",
    "tokens_per_second": "Train/Samples/tokens_per_second", "padding_share": "Train/Samples/padding_share",
    "peak_share": "Train/Samples/peak_share", "memory_gb": "Train/Samples/memory_gb",
    "token_accuracy": "Train/Samples/token_accuracy", "router_loss": "Train/Samples/router_loss",
    "eval_loss": "Eval/Samples/loss", "perplexity": "Eval/Samples/perplexity",
    "eval_accuracy": "Eval/Samples/token_accuracy",
}  # fmt: skip


def wanted_reports(report_to: Sequence[str], enable_tensorboard: bool) -> list[str]:
    """Return the services a run reports to; `--enable_tensorboard` is the older flag for one of them."""
    names = [name for name in PACKAGES if name in report_to]
    return names if "tensorboard" in names or not enable_tensorboard else ["tensorboard", *names]


def check_reports(report_to: Sequence[str], enable_tensorboard: bool) -> None:
    """Check that the services' packages are installed, and that `none` is not combined with a service.

    Raises:
        UserError: a package is missing, or `none` is combined with a service.
    """
    given = f"--report_to {' '.join(report_to)}"
    if "none" in report_to and len(report_to) > 1:
        raise UserError(f"{given}: none can't be combined with a service.")
    missing = [PACKAGES[name] for name in wanted_reports(report_to, enable_tensorboard)
               if find_spec(PACKAGES[name]) is None]  # fmt: skip
    if missing:
        raise UserError(f"{given}: not installed: pip install {' '.join(missing)}")


def check_monitors(settings: dict[str, Any]) -> None:
    """Check the services that a file of `--deepspeed_config` turns on: their packages, and the folders they write.

    Raises:
        UserError: a package is missing, or a folder can't be made.
    """
    for name in (*PACKAGES, "csv_monitor"):
        block = settings.get(name, {})
        if not block.get("enabled"):
            continue
        if name in PACKAGES and find_spec(PACKAGES[name]) is None:
            raise UserError(f"--deepspeed_config turns {name} on, which is not installed: pip install {PACKAGES[name]}")
        folder = block.get("output_path")
        existing = os.path.abspath(folder) if folder else os.getcwd()
        while not os.path.exists(existing):
            existing = os.path.dirname(existing)
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as err:
            raise UserError(
                f"--deepspeed_config: {name} can't write to output_path {folder} ({err}): give another folder."
            ) from err


def monitor_blocks(report_to: Sequence[str], enable_tensorboard: bool) -> dict[str, Any]:
    """Return the blocks of DeepSpeed's configuration that turn the wanted services on.

    Their other settings (team, workspace, `"comet": {"online": false}`) can be given by `--deepspeed_config`.
    """
    blocks = {
        "tensorboard": {"enabled": True},
        "wandb": {"enabled": True, "project": os.environ.get("WANDB_PROJECT", PROJECT)},
        # By default DeepSpeed sends to Comet only once in 100 samples.
        "comet": {"enabled": True, "samples_log_interval": 1},
    }
    return {name: blocks[name] for name in wanted_reports(report_to, enable_tensorboard)}


def send_texts(engine: "deepspeed.DeepSpeedEngine", step: int, texts: dict[str, str]) -> None:
    """Send texts by their names, as Markdown, to TensorBoard; the other services get none."""
    writer = getattr(getattr(engine.monitor, "tb_monitor", None), "summary_writer", None)
    for name, text in texts.items() if writer is not None else ():
        writer.add_text(name, text, step * engine.train_batch_size())


def send_record(engine: "deepspeed.DeepSpeedEngine", record: dict[str, Any]) -> None:
    """Send the figures of one record of metrics.jsonl, at the number of samples trained on up to its step.

    Those of the data sets of a blend have their names behind those of the whole.

    Records must be sent in the order of their steps: Weights & Biases drops earlier ones.
    """
    samples = int(record["step"]) * engine.train_batch_size()
    figures = {EVENTS[name]: value for name, value in record.items() if name in EVENTS}
    for source, of_source in record.get("sources", {}).items():
        figures |= {f"{EVENTS[name]}/{source.strip('/')}": value for name, value in of_source.items()}
    events = [(name, value, samples) for name, value in figures.items() if value is not None and math.isfinite(value)]
    if events:
        engine.monitor.write_events(events)
