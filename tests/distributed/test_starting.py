"""Starts that go wrong, or that only look as if they did: one message before anything is loaded."""

import os
import socket
from functools import partial

import pytest
from fork_runs import finished_run, losses

from utils.distributed.launchers import adopt_launcher, await_address
from utils.errors import UserError

STEP = {
    "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "n1", "MASTER_ADDR": "n1",
}  # fmt: skip
LOCAL = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


def as_kubeflow_starts(argv: list[str]) -> None:
    """main.py with the variables of a PyTorchJob: none that tells the place within a node."""
    import main

    for name in LOCAL:
        os.environ.pop(name)
    main.run(argv)


def on_a_taken_port(argv: list[str]) -> None:
    """main.py that is to meet where another program listens."""
    import main

    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = str(other.getsockname()[1])
        os.environ.update(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        main.run(argv)


def where_nobody_knows_the_first_node(argv: list[str]) -> None:
    """main.py with a first node whose name has no address, and little patience."""
    import main
    from utils.distributed import process_group

    process_group.await_address = partial(await_address, patience=0.5)
    os.environ.update(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="no-such-host.invalid", MASTER_PORT="29511")
    main.run(argv)


def with_rank_alone(argv: list[str]) -> None:
    """main.py where only RANK is set."""
    import main

    os.environ["RANK"] = "0"
    main.run(argv)


def test_kubeflow_trains_on_two_ranks(run_arguments, tmp_path):
    command = [*run_arguments, "--max_steps", "2", "--per_device_train_batch_size", "4"]
    printed = finished_run([*command, "--output_dir", tmp_path / "pods"], ranks=2, program=as_kubeflow_starts)
    assert printed.count("WORLD_SIZE 2 without LOCAL_RANK, as Kubeflow starts it: one process a node") == 1
    finished_run([*command, "--output_dir", tmp_path / "launched"], ranks=2)
    assert losses(tmp_path / "pods") == pytest.approx(losses(tmp_path / "launched"), rel=1e-6)


def test_a_taken_port_is_named(run_arguments, tmp_path):
    printed = finished_run([*run_arguments, "--output_dir", tmp_path / "out"], status=2, program=on_a_taken_port)
    assert "error: port " in printed and "is taken by another program" in printed and "--master_port" in printed
    assert "Traceback" not in printed and printed.count("error:") == 1


def test_a_first_node_without_an_address_is_named(run_arguments, tmp_path):
    command = [*run_arguments, "--output_dir", tmp_path / "out"]
    printed = finished_run(command, status=2, program=where_nobody_knows_the_first_node)
    assert "MASTER_ADDR 'no-such-host.invalid' has no address yet" in printed
    assert "error: the ranks can't meet: the name MASTER_ADDR 'no-such-host.invalid' has no address here" in printed
    assert "Traceback" not in printed and not (tmp_path / "out").exists()


def test_a_name_that_is_known_later_is_waited_for(monkeypatch, capsys):
    answers = iter([socket.gaierror(-3, "Temporary failure in name resolution"), []])

    def look_up(*_):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    await_address("first-pod")
    assert (
        "MASTER_ADDR 'first-pod' has no address yet (Temporary failure in name resolution)" in capsys.readouterr().out
    )


def test_rank_alone(run_arguments, tmp_path):
    printed = finished_run([*run_arguments, "--output_dir", tmp_path / "out"], status=2, program=with_rank_alone)
    assert "error: RANK is 0 and WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set" in printed
    assert "Traceback" not in printed and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "the last is 1"),
        (
            {"RANK": "one", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "RANK is 'one', not a number from 0 up",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "x"},
            "MASTER_PORT is 'x', not a number from 0 up",
        ),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4 and RANK is not set"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is empty and RANK is not set"),
        ({"RANK": ""}, "RANK is empty and WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set"),
        ({"MASTER_PORT": "port"}, "MASTER_PORT is 'port', not a number from 0 up"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "99999"}, "ports go up to 65535"),
        ({"SLURM_STEP_NUM_TASKS": ""}, "SLURM_STEP_NUM_TASKS is '', not a number from 0 up"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun has not set OMPI_COMM_WORLD_RANK, which tell"),
        ({"PMI_SIZE": "2", "PMI_RANK": "-1"}, "PMI_RANK is '-1', not a number from 0 up"),
        (
            {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"},
            "srun has not set SLURM_LOCALID, SLURM_NODEID, SLURM_JOB_",
        ),
        ({**STEP, "SLURM_PROCID": "x"}, "SLURM_PROCID is 'x', not a number from 0 up"),
        ({**STEP, "SLURM_NODEID": "5"}, "SLURM_NODEID is 5 and SLURM_STEP_TASKS_PER_NODE 2: that node is none"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', not a number from 0 up"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK is '', not a number from 0 up"),
        ({"LOCAL_WORLD_SIZE": "-1"}, "LOCAL_WORLD_SIZE is '-1', not a number from 0 up"),
        ({"RANK": "-1", "WORLD_SIZE": "1"}, "RANK is '-1', not a number from 0 up"),
        ({"PMI_SIZE": "two"}, "PMI_SIZE is 'two', not a number from 0 up"),
    ],
)
def test_variables_that_are_no_launchers(environment, words):
    with pytest.raises(UserError) as caught:
        adopt_launcher(dict(environment))
    assert words in str(caught.value)


@pytest.mark.parametrize("rank", [{}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_one_rank_meets_nobody_whatever_address_is_set(rank, run_arguments, run_inside, monkeypatch):
    """A cluster's variables stay in the environment of a shell, or name a pod that is reachable from others alone."""
    for name in LOCAL:
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for name, value in {**rank, "MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        status, _, error = run_inside([*run_arguments, "--dry_run"])
    assert status == 0, error


def test_one_rank_needs_no_meeting(run_arguments, run_inside, monkeypatch):
    for name in (*LOCAL, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    status, _, error = run_inside([*run_arguments, "--dry_run"])
    assert status == 0, error
