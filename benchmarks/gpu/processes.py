"""Processes that `gpu_check.py` starts, each with a time limit, and what their output says."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KEPT_LINES = 3  # of the end of a failed process's output
RIGHT, WRONG, REFUSED, OUT_OF_MEMORY = "right", "wrong", "refused", "out of memory"


@dataclass
class Outcome:
    """What a check found: a verdict, one sentence where it needs one, and figures by name."""

    verdict: str
    words: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Finished:
    """A process that has ended; status None when it was stopped at its time limit."""

    status: int | None
    output: str
    seconds: float

    def failure(self) -> Outcome | None:
        """The outcome of a process that did not do its work; None where it did."""
        if self.status == 0:
            return None
        figures = {} if self.watched() is None else memory_figures(self.watched())
        if self.status is None:
            return Outcome(WRONG, f"stopped at its time limit of {self.seconds:.0f} s", figures)
        lines = [line for line in self.output.splitlines() if line.strip() and not line.startswith("WATCHED ")]
        if re.search(r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED", self.output, re.IGNORECASE):
            return Outcome(OUT_OF_MEMORY, "", figures)
        refusals = [line for line in lines if line.startswith("error: ")]
        if self.status == 2 and refusals:
            return Outcome(REFUSED, refusals[-1].removeprefix("error: ")[:300], figures)
        return Outcome(WRONG, f"exit status {self.status}: {' / '.join(lines[-KEPT_LINES:])[-500:]}", figures)

    def losses(self) -> list[float]:
        """The loss of every optimizer step (`--print_loss`)."""
        return [float(loss) for loss in re.findall(r"^Epoch: \d+, Step: \d+, loss = (\S+)$", self.output, re.MULTILINE)]

    def evaluations(self) -> list[float]:
        """Every evaluation loss."""
        return [float(loss) for loss in re.findall(r"^ppl: \S+, loss: (\S+)$", self.output, re.MULTILINE)]

    def found(self, pattern: str) -> str | None:
        """The first group of the last match, at the beginning of a line."""
        found = re.findall(f"^{pattern}", self.output, re.MULTILINE)
        return found[-1] if found else None

    def cases(self) -> list[dict[str, Any]]:
        """What `kernel_checks.py` found."""
        return [json.loads(line[5:]) for line in self.output.splitlines() if line.startswith("CASE ")]

    def watched(self) -> dict[str, Any] | None:
        """What `watched_run.py` saw."""
        lines = [line for line in self.output.splitlines() if line.startswith("WATCHED ")]
        return json.loads(lines[-1][8:]) if lines else None


def memory_figures(seen: dict[str, Any]) -> dict[str, Any]:
    """Peak device memory and its estimate in GB (1e9 bytes); the estimate alone where the run ended early."""
    figures: dict[str, Any] = {}
    if "estimate" in seen:
        figures["foreseen GB"] = round(seen["estimate"] / 1e9, 2)
    if "estimate_error" in seen:
        figures["estimate failed"] = seen["estimate_error"]
    if "allocated" in seen:
        figures |= {"peak GB": round(seen["allocated"] / 1e9, 2), "reserved GB": round(seen["reserved"] / 1e9, 2)}
        if seen.get("finished") and "estimate" in seen:
            figures["estimate off by"] = f"{seen['estimate'] / seen['allocated'] - 1:+.1%}"
    return figures


def environment(device: str) -> dict[str, str]:
    """Of a child: no hub, no launcher's ranks, and no GPU where the CPU is meant."""
    ours = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    ours |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    ours["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{ours['PATH']}"  # its ninja compiles the kernels
    if device == "cpu":
        ours |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    else:
        ours.pop("DS_ACCELERATOR", None)
    return ours


def run_process(command: list[Any], device: str, limit: float) -> Finished:
    """Run a command of this Python to its end, or kill it and its children at the limit (seconds)."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT,
            env=environment(device), start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # readers of data and compilers may outlive their run
            process.wait()
        output.seek(0)
        return Finished(status, output.read(), time.perf_counter() - start)
