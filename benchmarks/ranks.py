"""Processes of one measurement, one a rank, each of which prints `RESULT` and an object of JSON."""

import json
import os
import socket
import subprocess
import sys
from typing import Any


def environments_of_ranks(ranks: int, environment: dict[str, str]) -> list[dict[str, str]]:
    """The environment of each rank of one process group on this machine: this process's, with `environment` over it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, **environment, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    common |= {"LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def results_of_ranks(command: list[str], ranks: int, environment: dict[str, str], timeout: float = 300) -> list[Any]:
    """Run a Python command once a rank, in one process group; returns what each printed as its result.

    Raises:
        RuntimeError: one printed none; the message ends with what it said.
    """
    processes = [
        subprocess.Popen([sys.executable, *command], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=own)
        for own in environments_of_ranks(ranks, environment)
    ]
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            if "RESULT " not in out:
                raise RuntimeError(f"{' '.join(command)}: {out[-2000:]}{err[-2000:]}")
            results.append(json.loads(out.split("RESULT ")[1].splitlines()[0]))
    finally:
        for process in processes:
            process.kill()
    return results
