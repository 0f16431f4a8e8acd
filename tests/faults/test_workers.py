"""A signal that reaches every process of a run, worker processes included, still ends it with a checkpoint."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from fork_runs import checkpoint_steps, finished_run, losses, start_run

LONG = ["--num_train_epochs", "40", "--save_steps", "1000"]


def with_workers(argv: list[str]) -> None:
    """main.py that reads ahead in worker processes, as it does where a GPU trains."""
    import multiprocessing

    import main
    from utils.data import training_data
    from utils.data.batching import batches

    multiprocessing.current_process()._config["daemon"] = False  # or it could have no workers
    multiprocessing.set_start_method("fork", force=True)  # as in a process that no fork server has made
    load, stream = batches.load_batches, training_data.create_prompt_stream
    batches.load_batches = lambda dataset, plans, collate, on_cpu: load(dataset, plans, collate, False)
    training_data.create_prompt_stream = lambda *given: stream(*given[:5], True, *given[6:])
    main.run(argv)


@pytest.mark.parametrize(
    ("number", "more"),
    [
        (signal.SIGTERM, LONG),
        (signal.SIGUSR1, LONG),
        (signal.SIGHUP, LONG),
        (signal.SIGTERM, [*LONG, "--streaming", "40", "--max_steps", "2000"]),
    ],
    ids=["cache-SIGTERM", "cache-SIGUSR1", "cache-SIGHUP", "stream-SIGTERM"],
)
def test_every_process_gets_the_signal(number, more, run_setting, tmp_path):
    run = start_run([*run_setting, *more, "--output_dir", tmp_path, "--logging_steps", "1"], program=with_workers)
    run.wait_for("Step 3/")
    os.killpg(run.processes[0].pid, number)
    statuses = run.wait(120)
    assert statuses == [75], run.output()
    assert "To go on: the same command with --resume_from_checkpoint latest" in run.output()
    (step,) = checkpoint_steps(tmp_path)
    assert step >= 3 and "Traceback" not in run.output()


def test_a_run_with_workers_ends_by_itself(run_setting, tmp_path):
    """Workers that ignore signals still end with their run, which trains what one without workers trains."""
    finished_run([*run_setting, "--output_dir", tmp_path / "workers"], program=with_workers)
    finished_run([*run_setting, "--output_dir", tmp_path / "plain"])
    assert losses(tmp_path / "workers") == losses(tmp_path / "plain")


def test_the_time_of_a_run_is_measured_with_its_workers(run_setting):
    printed = finished_run([*run_setting, "--dry_run"], program=with_workers)
    assert "Time: about" in printed and "Dry run: everything is checked" in printed


def test_a_process_ends_though_its_reader_is_still_open():
    """Python terminates workers at its exit and waits for them: that SIGTERM must not be ignored."""
    code = (
        "import torch; from utils.data.batching.batches import ignore_stop_signals as ignore\n"
        "held = iter(torch.utils.data.DataLoader(range(9), num_workers=1, worker_init_fn=ignore)); print(next(held))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 and "tensor([0])" in done.stdout, done.stderr
