"""Launchers: the rank and number of ranks that deepspeed, torchrun, srun or mpirun gave this process."""

import os
import re
import socket
import subprocess
import time
from collections.abc import Iterable, MutableMapping

from utils.errors import UserError
from utils.logging.console import say

# mpirun's variables for the rank, the number of ranks, the rank within the node, and the number of ranks of the node.
MPI_NAMES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH and Intel MPI
)
LOCAL_NAMES = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
DEFAULT_PORT = 29500  # torch's and DeepSpeed's default too
LAST_PORT = 65535
PATIENCE = 20.0  # seconds for the first node's name, which a cluster may not know yet while nodes start
SLURM_PORTS = 15000  # ports to choose from by the job's number: jobs that share a node must not share a port


def adopt_launcher(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables torch reads from those of srun or mpirun, and print which launcher it was.

    They are RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without them each process
    of srun or mpirun would be a run of one rank. Where deepspeed or torchrun has set them nothing changes, and a
    MASTER_ADDR or MASTER_PORT that is set is kept. Kubeflow sets all but the local ones: `start_process_group` adds
    them.

    Raises:
        UserError: only some of the variables are set, mpirun over several nodes has no MASTER_ADDR, or Slurm can't list
            its hosts.
    """
    if "RANK" in environment:
        _check_variables(environment)
        return
    counts = ("SLURM_STEP_NUM_TASKS", *(names[1] for names in MPI_NAMES))
    _check_numbers(environment, (*counts, "MASTER_PORT", *LOCAL_NAMES))
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        launcher = "srun"
        _adopt_slurm(environment)
    elif found := [names for names in MPI_NAMES if int(environment.get(names[1], 1)) > 1]:
        launcher = "mpirun"
        _adopt_mpi(environment, *found[0])
    else:
        if environment.get("WORLD_SIZE", "1") != "1":
            raise UserError(
                f"WORLD_SIZE is {environment['WORLD_SIZE'] or 'empty'} and RANK is not set: each process would be a "
                "run of its own. Start with deepspeed, torchrun, srun or mpirun, or unset WORLD_SIZE for a run of one "
                "process."
            )
        return
    if environment["RANK"] == "0":
        meeting = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        say(f"Launcher: {launcher}, {environment['WORLD_SIZE']} ranks that meet at {meeting}")


def _check_variables(environment: MutableMapping[str, str]) -> None:
    """Check what a launcher set; a single rank meets nobody."""
    needed = ("WORLD_SIZE", *(("MASTER_ADDR", "MASTER_PORT") if environment.get("WORLD_SIZE") != "1" else ()))
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        raise UserError(
            f"RANK is {environment['RANK'] or 'empty'} and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set: start with deepspeed, torchrun, srun or mpirun, which "
            "set them all, or unset RANK for a run of one process."
        )
    _check_numbers(environment, ("RANK", "WORLD_SIZE", "MASTER_PORT", *LOCAL_NAMES))
    if int(environment["RANK"]) >= int(environment["WORLD_SIZE"]):
        raise UserError(
            f"RANK is {environment['RANK']} and WORLD_SIZE {environment['WORLD_SIZE']}: ranks count from 0, so the "
            f"last is {int(environment['WORLD_SIZE']) - 1}."
        )


def _check_numbers(environment: MutableMapping[str, str], names: Iterable[str]) -> None:
    """Check that these variables are numbers where they are set, and the port one of a machine's."""
    for name in names:
        if not environment.get(name, "0").isdecimal():
            raise UserError(f"{name} is {environment[name]!r}, not a number from 0 up: a launcher sets it, or you do.")
    if int(environment.get("MASTER_PORT", 0)) > LAST_PORT:
        raise UserError(f"MASTER_PORT is {environment['MASTER_PORT']}: ports go up to {LAST_PORT}.")


def free_port() -> int:
    """Return a port of this machine that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def await_address(address: str, patience: float = PATIENCE) -> None:
    """Wait until the name of the first node has an address, and print that it has none yet.

    Without this torch would try for minutes and say nothing.

    Raises:
        UserError: it has none after `patience` seconds.
    """
    start, is_told = time.monotonic(), False
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except (OSError, UnicodeError) as err:  # UnicodeError: a part of the name is longer than names may be
            reason = getattr(err, "strerror", None) or str(err)
        if time.monotonic() - start >= patience:
            raise UserError(
                f"the ranks can't meet: the name MASTER_ADDR {address!r} has no address here ({reason}). Give the "
                "first node's name or address as this machine knows it (--master_addr of deepspeed or torchrun, else "
                "the variable MASTER_ADDR)."
            )
        if not is_told:
            say(f"MASTER_ADDR {address!r} has no address yet ({reason}): trying for {patience:.0f} s")
            is_told = True
        time.sleep(1)


def launched_rank() -> int:
    """Return this process's rank over all nodes by the launcher, also before the process group is started."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0


def launched_ranks() -> int:
    """Return the number of ranks over all nodes by the launcher, also before the process group is started."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def _check_given(
    environment: MutableMapping[str, str], launcher: str, numbers: Iterable[str], texts: Iterable[str]
) -> None:
    """Check that what a launcher sets for each process is there, as numbers where it has to be."""
    missing = [name for name in (*numbers, *texts) if not environment.get(name)]
    if missing:
        raise UserError(
            f"{launcher} has not set {', '.join(missing)}, which tell the processes of a run apart: start the run with "
            f"{launcher} itself, without changing its variables, or with deepspeed or torchrun."
        )
    _check_numbers(environment, numbers)


def _adopt_slurm(environment: MutableMapping[str, str]) -> None:
    numbers = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID")
    _check_given(environment, "srun", numbers, ("SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST"))
    per_node = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    if int(environment["SLURM_NODEID"]) >= len(per_node):
        raise UserError(
            f"SLURM_NODEID is {environment['SLURM_NODEID']} and SLURM_STEP_TASKS_PER_NODE "
            f"{environment['SLURM_STEP_TASKS_PER_NODE']}: that node is none of the step's. Start the run with srun."
        )
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["LOCAL_WORLD_SIZE"] = str(per_node[int(environment["SLURM_NODEID"])])
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = _first_host(environment["SLURM_STEP_NODELIST"])
    environment.setdefault("MASTER_PORT", str(DEFAULT_PORT + int(environment["SLURM_JOB_ID"]) % SLURM_PORTS))


def tasks_per_node(text: str) -> list[int]:
    """Parse Slurm's number of tasks of each node: `2(x3),1` is [2, 2, 2, 1]."""
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in groups for _ in range(int(times or 1))]


def _first_host(hosts: str) -> str:
    """Return the first host of a Slurm list such as `node[01-04]`."""
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as err:
        raise UserError(f"Slurm's hosts {hosts} can't be listed ({err}): set MASTER_ADDR to the first one.") from err
    return done.stdout.split()[0]


def _adopt_mpi(environment: MutableMapping[str, str], rank: str, size: str, local_rank: str, local_size: str) -> None:
    _check_given(environment, "mpirun", [rank, size], [])
    _check_numbers(environment, [local_rank, local_size])
    on_node = environment.get(local_size, environment[size])
    if "MASTER_ADDR" not in environment and on_node != environment[size]:
        raise UserError(
            "mpirun on several nodes needs MASTER_ADDR, the address of the first node: mpirun -x MASTER_ADDR=... (with "
            "deepspeed's own launchers: in .deepspeed_env)."
        )
    environment.update(RANK=environment[rank], WORLD_SIZE=environment[size], LOCAL_WORLD_SIZE=on_node)
    environment["LOCAL_RANK"] = environment.get(local_rank, environment[rank])
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    environment.setdefault("MASTER_PORT", str(DEFAULT_PORT))
