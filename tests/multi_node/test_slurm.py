"""The Slurm script under a real Slurm on two hosts: warned, requeued, preempted, requeued, then as one node."""

import os
import subprocess
import time
from pathlib import Path

import pytest
import slurm
from conftest import ROOT
from fork_runs import checkpoint_steps, finished_run, outcome
from hosts import missing, two_hosts

from utils.machine.compile_locks import extension_folder

SCRIPT = "training_scripts/multi_node/run_66b_slurm.sh"
OWN = [
    "--gradient_checkpointing", "--lora_dim", "4", "--learning_rate", "1e-3", "--per_device_eval_batch_size", "16",
    "--zero_stage", "1",
]  # fmt: skip
WHY_NOT = missing() or slurm.missing()


def wait_for(log: Path, words: str, start: int = 0, seconds: float = 180) -> int:
    """Wait until the log says so behind `start`; returns its length then."""
    deadline = time.monotonic() + seconds
    while not log.exists() or words not in log.read_text()[start:]:
        assert time.monotonic() < deadline, log.read_text() if log.exists() else f"no {log}"
        time.sleep(0.02)
    return len(log.read_text())


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
def test_a_job_goes_back_into_the_queue_and_ends_as_one_node(run_setting, tmp_path):
    """scancel, SIGUSR1 (the time limit comes) and a requeue (preemption) in mid-run; the records and weights are the
    undisturbed run's on one node."""
    finished_run([*run_setting, *OWN, "--output_dir", tmp_path / "one_node"], ranks=2)
    output, log = tmp_path / "slurm", tmp_path / "slurm" / "training.log"
    with two_hosts(tmp_path / "hosts") as hosts, slurm.slurm(hosts) as conf:
        environment = {
            **os.environ, "SLURM_CONF": str(conf), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "eth0", "TORCH_EXTENSIONS_DIR": extension_folder(),
        }  # fmt: skip

        def on_host(*words: str) -> str:
            command = ["sh", "-c", 'cd "$0" && exec "$@"', ROOT, *words]
            done = subprocess.run(hosts.command(command), env=environment, capture_output=True, text=True, check=True)
            return done.stdout

        small = ["--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", f"--output={tmp_path}/job.log"]
        submit = ["sbatch", "--parsable", *small, SCRIPT, output, "1", *run_setting, *OWN, "--save_steps", "3"]
        cancelled = on_host(*submit).strip()
        wait_for(log, "Step: 0,")
        on_host("scancel", cancelled)
        start = wait_for(log, "Stopped at step")
        job = on_host(*submit).strip()
        start = wait_for(log, "Epoch:", start)
        on_host("scancel", "--signal=USR1", job)
        start = wait_for(log, "status 75: back into the queue", start)
        stop = checkpoint_steps(output)[-1]
        start = wait_for(log, "***** Running training", start)
        on_host("scontrol", "requeue", job)
        wait_for(log, "and verified", start)
    text = log.read_text()
    assert "Launcher: srun, 2 ranks that meet at sfthost1:" in text
    assert f"Resuming from {output}/checkpoints/step-{stop:06d}" in text
    assert text.count("Resuming from") == 3, "after scancel by hand, the other two by themselves"
    assert text.count("back into the queue") == 1, "neither the cancelled job nor the one Slurm itself put back"
    assert outcome(output) == outcome(tmp_path / "one_node")
