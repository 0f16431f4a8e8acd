"""Runs of main.py in processes of their own, forked from one that has imported everything: seconds instead of ten.

Real processes, real process groups over gloo, killed with real signals; only the import of torch is shared.
"""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 600  # seconds: the first run on a new machine waits for the compiler, which may have to share two cores


def run_main(argv: list[str]) -> None:
    """What `python main.py` does."""
    import main

    main.run(argv)


def _child(
    program: Callable[[list[str]], None], argv: list[str], environment: dict[str, str], log: str, file_limit: int | None
) -> None:
    """What a forked process does: become rank `RANK`, write to `log`, run."""
    if file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    os.setpgrp()
    try:
        program(argv)
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of a process group whose peers were killed must not keep a test waiting


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.fork_preload"])  # found from the repository's root, where pytest runs
    return context


@dataclass
class ForkedRun:
    """A run in progress: one process a rank."""

    processes: list
    logs: list[Path]
    port: int  # of its process group, where it has several ranks; a single rank takes a free one itself

    def kill(self, number: int, ranks: list[int] | None = None) -> None:
        """Send a signal to these ranks (all of them unless given)."""
        for rank in ranks if ranks is not None else range(len(self.processes)):
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)

    def wait(self, timeout: float = PATIENCE) -> list[int]:
        """Exit statuses, negative for signals; a run that does not end is killed and fails the test."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        stuck = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        if any(process.exitcode < 0 for process in self.processes):  # killed: no rank could remove the names
            for name in self.shared_memory():
                name.unlink()
        assert not stuck, f"ranks {stuck} did not end within {timeout} s:\n{self.output()}"
        return [process.exitcode for process in self.processes]

    def shared_memory(self) -> list[Path]:
        """Return the names of shared memory that this run's ranks have left."""
        return list(Path("/dev/shm").glob(f"deepspeed_*_{self.port}_*")) if len(self.processes) > 1 else []

    def output(self) -> str:
        """What all ranks printed, rank after rank."""
        return "\n".join(log.read_text(errors="replace") for log in self.logs if log.exists())

    def wait_for(self, words: str, timeout: float = PATIENCE) -> None:
        """Wait until rank 0 has printed `words`."""
        deadline = time.monotonic() + timeout
        while words not in self.output():
            assert time.monotonic() < deadline, f"{words!r} never came:\n{self.output()}"
            assert any(process.is_alive() for process in self.processes), self.output()
            time.sleep(0.01)


def free_port() -> int:
    """Return a free port below those that the system gives to outgoing connections, which could take it meanwhile."""
    while True:
        port = random.SystemRandom().randint(15000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def start_run(
    argv: list,
    ranks: int = 1,
    file_limits: dict[int, int] | None = None,
    program: Callable[[list[str]], None] = run_main,
) -> ForkedRun:
    """Start main.py with `argv` on so many ranks; those in `file_limits` can't write larger files (bytes).

    `program` is a function of a test module that runs in its place.
    """
    context = _context()
    folder = Path(tempfile.mkdtemp(prefix="forked_run_"))
    port = free_port()
    processes, logs = [], []
    for rank in range(ranks):
        own = {}
        if ranks > 1:
            own = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        logs.append(folder / f"rank_{rank}.log")
        arguments = ([str(argument) for argument in argv], own, str(logs[-1]), (file_limits or {}).get(rank))
        processes.append(context.Process(target=_child, args=(program, *arguments), daemon=True))
        processes[-1].start()
    return ForkedRun(processes, logs, port)


def finished_run(argv: list, ranks: int = 1, status: int = 0, program: Callable[[list[str]], None] = run_main) -> str:
    """Run to the end, which must have this exit status on every rank; returns what was printed."""
    run = start_run(argv, ranks, program=program)
    statuses = run.wait()
    assert statuses == [status] * ranks, f"{statuses}\n{run.output()}"
    assert not run.shared_memory(), f"shared memory is left behind: {run.shared_memory()}"
    return run.output()


# ------------------------------------------------------------------------------------- what a run left


def losses(folder: Path) -> dict[int, float]:
    """Loss of every optimizer step."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def outcome(folder: Path) -> tuple[str, bytes]:
    """What two equal runs share bit for bit: all records but those of their speed, and the weights."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = "\n".join(line for line in lines if "tokens_per_second" not in line)
    return records, (folder / "model.safetensors").read_bytes()


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints of a run."""
    return sorted(int(marker.parent.name[5:]) for marker in (folder / "checkpoints").glob("step-*/complete.json"))


def copy_at_step(source: Path, target: Path, step: int) -> Path:
    """A copy of a run's folder as it was when it wrote this checkpoint and no later one."""
    shutil.copytree(source, target)
    for folder in (target / "checkpoints").glob("step-*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    for name in ("config.json", "model.safetensors"):
        (target / name).unlink()
    return target
