"""Processes of the GPU check (`check.py`), each with a time limit, and the figures read from their output."""

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
KEPT_LINES = 3  # last lines of a failed process's output that its result shows
RIGHT, WRONG, REFUSED, OUT_OF_MEMORY = "right", "wrong", "refused", "out of memory"


@dataclass
class Outcome:
    """The result of a check: a verdict, a sentence where the verdict needs one, and figures by name."""

    verdict: str
    words: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Finished:
    """A process that has ended; its status is None when it was stopped at its time limit."""

    status: int | None
    output: str
    seconds: float

    def failure(self) -> Outcome | None:
        """Return the outcome of a process that failed; None for one that succeeded."""
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
        """Return the losses that `--print_loss` prints: of every optimizer step, where a step is one micro batch."""
        lines = re.findall(r"^Epoch: \d+, Step: \d+, Rank: 0, loss = (\S+)$", self.output, re.MULTILINE)
        return [float(loss) for loss in lines]

    def evaluations(self) -> list[float]:
        """Return every evaluation loss."""
        return [float(loss) for loss in re.findall(r"^ppl: \S+, loss: (\S+)$", self.output, re.MULTILINE)]

    def found(self, pattern: str) -> str | None:
        """Return the first group of the last match at the beginning of a line; None without a match."""
        found = re.findall(f"^{pattern}", self.output, re.MULTILINE)
        return found[-1] if found else None

    def cases(self) -> list[dict[str, Any]]:
        """Return the cases that `kernel_checks.py` printed."""
        return [json.loads(line[5:]) for line in self.output.splitlines() if line.startswith("CASE ")]

    def watched(self) -> dict[str, Any] | None:
        """Return the figures that `watched_run.py` printed; None where it printed none."""
        lines = [line for line in self.output.splitlines() if line.startswith("WATCHED ")]
        return json.loads(lines[-1][8:]) if lines else None


def memory_figures(seen: dict[str, Any]) -> dict[str, Any]:
    """Return peak device memory and its estimate in GB (1e9 bytes); the estimate alone where the run ended early."""
    figures: dict[str, Any] = {}
    if "estimate" in seen:
        figures["estimated GB"] = round(seen["estimate"] / 1e9, 2)
    if "estimate_error" in seen:
        figures["estimate failed"] = seen["estimate_error"]
    if "allocated" in seen:
        figures |= {"peak GB": round(seen["allocated"] / 1e9, 2), "reserved GB": round(seen["reserved"] / 1e9, 2)}
        if seen.get("finished") and "estimate" in seen:
            figures["estimate off by"] = f"{seen['estimate'] / seen['allocated'] - 1:+.1%}"
    return figures


def environment(device: str) -> dict[str, str]:
    """Return the environment of a child process: without the hub, without a launcher's ranks, and on `device`."""
    ours = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    ours |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    ours["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{ours['PATH']}"  # its ninja builds the kernels
    if device == "cpu":
        ours |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    else:
        ours.pop("DS_ACCELERATOR", None)
    return ours


def note_failure(log: Path | None, command: list[Any], done: Finished) -> None:
    """Append the whole output of a process that did not succeed to the log, under its command."""
    if log is None or done.status == 0:
        return
    state = "stopped at its limit" if done.status is None else f"exit status {done.status}"
    with log.open("a", encoding="utf-8") as file:
        file.write(f"===== {' '.join(map(str, command))}\n===== {state} after {done.seconds:.0f} s\n{done.output}\n")


def run_process(command: list[Any], device: str, limit: float, log: Path | None = None) -> Finished:
    """Run a command by this Python until it ends, or kill it and its children at the limit in seconds.

    log: gets the output of a command that did not succeed.
    """
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
                os.killpg(process.pid, signal.SIGKILL)  # data loaders and compilers may outlive their run
            process.wait()
        output.seek(0)
        done = Finished(status, output.read(), time.perf_counter() - start)
    note_failure(log, command, done)
    return done
