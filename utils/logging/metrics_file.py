"""The records of a run: metrics.jsonl, the loss of every optimizer step, evaluations, and speed; samples.jsonl."""

import json
import math
import os
from typing import Any

from utils.errors import UserError

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"  # answers to the prompts of --sample_prompts


class MetricsFile:
    """Appends one JSON object per record to `{output_dir}/metrics.jsonl`; does nothing without a folder."""

    def __init__(self, output_dir: str | None, is_writer: bool, keep_bytes: int = 0) -> None:
        """Empty the file or, for a resumed run, truncate it to the length it had at the checkpoint.

        Args:
            output_dir: the run's folder; None for a run that writes nothing.
            is_writer: this is the one rank that writes.
            keep_bytes: the file's length at the checkpoint; 0 for a new run.
        """
        self.path = os.path.join(output_dir, METRICS_FILE) if output_dir and is_writer else None
        if self.path:
            os.makedirs(output_dir, exist_ok=True)
            with open(self.path, "ab") as file:
                file.truncate(min(keep_bytes, file.tell()))

    def size(self) -> int:
        """Return the bytes written so far."""
        return os.path.getsize(self.path) if self.path else 0

    def write(self, **record: float | int | str) -> None:
        """Append one record: `epoch`, `step`, and the figures of one kind of record, which the docs list.

        A figure that is not finite becomes null: JSON has no other value for it.

        Raises:
            UserError: the file can't be written.
        """
        if self.path:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(_finite(record)) + "\n")
            except OSError as err:
                raise UserError(
                    f"{self.path} can't be written any more ({err}): is the folder still there and the disk not full? "
                    "Checkpoints written so far are as they were."
                ) from err


def _finite(value: Any) -> Any:
    """Return a record with null in place of what is not finite."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(output_dir: str) -> list[dict[str, float]]:
    """Return the records of a run, in the order they were written."""
    with open(os.path.join(output_dir, METRICS_FILE), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_samples(folder: str) -> list[dict[str, Any]]:
    """Return the records of a run's samples.jsonl; none without that file, and those before a line that was cut."""
    records: list[dict[str, Any]] = []
    try:
        with open(os.path.join(folder, SAMPLES_FILE), encoding="utf-8") as file:
            for line in file:
                records.append(json.loads(line))
    except (OSError, ValueError):
        pass
    return records


def curve(records: list[dict[str, float]], name: str) -> list[tuple[float, float]]:
    """Return (step, value) of every record that has a finite value of this name."""
    return [(record["step"], record[name]) for record in records if record.get(name) is not None]
