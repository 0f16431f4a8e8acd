"""Ranks by the variables of srun and mpirun: with a process per rank each must not take itself for a run of its own."""

import pytest

from utils.distributed.launchers import adopt_launcher, tasks_per_node
from utils.errors import UserError

SLURM = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_JOB_ID": "15007", "SLURM_STEP_TASKS_PER_NODE": "4,2,1", "SLURM_STEP_NODELIST": "worker[3-5]",
}  # fmt: skip
MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
ADOPTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def adopted(given: dict[str, str]) -> tuple[str | None, ...]:
    environment = dict(given)
    adopt_launcher(environment)
    return tuple(environment.get(name) for name in ADOPTED)


@pytest.mark.parametrize(
    ("words", "expected"), [("1", [1]), ("8(x2)", [8, 8]), ("2(x3),1", [2, 2, 2, 1]), ("4,2,1", [4, 2, 1])]
)
def test_slurm_counts(words, expected):
    assert tasks_per_node(words) == expected


def test_slurm(tmp_path, monkeypatch):
    """The first host is asked of Slurm, the port is the job's own; both can be given."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames worker[3-5]" ] && printf "worker3\\nworker4\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert adopted(SLURM) == ("5", "7", "1", "2", "worker3", "29507")
    assert adopted({**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"})[4:] == ("10.0.0.1", "7")
    scontrol.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(UserError, match=r"worker\[3-5\].*set MASTER_ADDR"):
        adopted(SLURM)


def test_mpirun():
    with pytest.raises(UserError, match="MASTER_ADDR"):
        adopted(MPI)
    assert adopted({**MPI, "MASTER_ADDR": "a"}) == ("3", "4", "1", "2", "a", "29500")
    assert adopted({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"})[3:] == ("4", "127.0.0.1", "29500")
    assert adopted({"PMI_RANK": "1", "PMI_SIZE": "2"}) == ("1", "2", "1", "2", "127.0.0.1", "29500")


def test_others_stay_as_they_are():
    """A plain start, one task of Slurm (a shell within a job has its variables too), and what a launcher has set."""
    nothing = (None,) * len(ADOPTED)
    assert adopted({}) == adopted({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) == nothing
    assert adopted({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}) == nothing
    assert adopted({**SLURM, "RANK": "0", "WORLD_SIZE": "1"}) == ("0", "1", None, None, None, None)
