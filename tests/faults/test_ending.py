"""How runs end that can't go on: bad steps, a full disk, a rank that dies."""

import os
import signal
import subprocess
import time

import pytest
from fork_runs import checkpoint_steps, finished_run, losses, start_run

SAVING = ["--save_steps", "2", "--save_total_limit", "0"]


@pytest.mark.parametrize(("ranks", "zero_stage"), [(1, 0), (2, 0), (2, 2), (1, 3)])
def test_bad_steps_are_skipped_named_and_end_the_run(ranks, zero_stage, run_setting, tmp_path):
    """A learning rate of 1e30 makes the second loss infinite or undefined; from then on no step is good."""
    command = [*run_setting, "--learning_rate", "1e30", "--output_dir", tmp_path, "--save_steps", "1"]
    command += ["--zero_stage", str(zero_stage), "--max_bad_steps", "2"]
    printed = finished_run(command, ranks, status=2)
    assert "Step 2 skipped: its loss is nan. Its samples, by position in the training data: " in printed
    assert "Step 3 skipped" in printed and "Step 4 skipped" not in printed
    assert "error: 2 steps in a row, the last step 3, had a loss or gradients that are not finite" in printed
    assert f"The last good checkpoint is {tmp_path}/checkpoints/step-" in printed and "Traceback" not in printed
    assert not (tmp_path / "config.json").exists()


def test_one_bad_step_leaves_the_weights_alone(tiny_opt, run_setting, tmp_path):
    """Weights that are bad from the start: every step is skipped, and the limit not reached is no end."""
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    subprocess.run(["cp", "-r", tiny_opt, model], check=True)
    weights = load_file(model / "model.safetensors")
    weights["model.decoder.final_layer_norm.bias"][0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    command = [*run_setting, "--model_name_or_path", model, "--max_steps", "2", "--output_dir", tmp_path / "out"]
    printed = finished_run([*command, "--save_steps", "2"], status=2)
    assert "is not the trained one" in printed, "the check of the saved model does not take NaN for equal"
    assert "Step 2 skipped" in printed
    import torch

    saved = torch.load(tmp_path / "out/checkpoints/step-000002/mp_rank_00_model_states.pt", weights_only=False)
    for name, tensor in weights.items():
        assert torch.equal(saved["module"][name].nan_to_num(9), tensor.nan_to_num(9)), name
    assert saved["skipped_steps"] == 2


# --------------------------------------------------------------------------------------- full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB: room for two checkpoints and not for three."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_full_disk_leaves_the_last_checkpoint_usable(ranks, run_setting, small_disk):
    command = [*run_setting, "--output_dir", small_disk / "run", "--zero_stage", "1"]
    run = start_run([*command, *SAVING], ranks)
    statuses = run.wait()
    assert statuses[0] == 2 and "Traceback" not in run.output(), run.output()
    steps = checkpoint_steps(small_disk / "run")
    assert steps and steps[-1] < 10
    last = f"{small_disk}/run/checkpoints/step-{steps[-1]:06d}"
    assert f"error: the checkpoint of step {steps[-1] + 2} can't be written" in run.output()
    assert f"The last good checkpoint is {last}" in run.output() and "GB are free there" in run.output()
    assert not list((small_disk / "run/checkpoints").glob(".incomplete*"))
    for step in steps[:-1]:
        subprocess.run(["rm", "-r", f"{small_disk}/run/checkpoints/step-{step:06d}"], check=True)
    printed = finished_run([*command, "--resume_from_checkpoint"], ranks)
    assert f"Resuming from {last}" in printed
    assert list(losses(small_disk / "run")) == list(range(1, 1 + max(losses(small_disk / "run"))))


@pytest.mark.parametrize("background", [[], ["--save_in_background"]])
def test_file_that_may_not_grow_ends_the_run_in_words(background, run_setting, tmp_path):
    """A limit on the size of files strikes in the middle of a shard, as a disk that fills up meanwhile does."""
    run = start_run([*run_setting, "--output_dir", tmp_path, *SAVING, *background], file_limits={0: 900_000})
    assert run.wait() == [2], run.output()
    assert f"error: the checkpoint of step 2 can't be written below {tmp_path}/checkpoints" in run.output()
    assert "There is no earlier checkpoint" in run.output() and "Traceback" not in run.output()
    assert os.listdir(tmp_path / "checkpoints") == []


def test_folder_lost_while_running(run_setting, tmp_path):
    output = tmp_path / "out"
    run = start_run([*run_setting, "--num_train_epochs", "200", "--output_dir", output, "--save_steps", "5"])
    run.wait_for("Checkpoint: ")
    os.rename(output, tmp_path / "moved")
    output.write_text("a file where the folder was")
    assert run.wait() == [2] and "Traceback" not in run.output(), run.output()
    assert str(output) in run.output()
    assert checkpoint_steps(tmp_path / "moved")


# -------------------------------------------------------------------------------------- dead ranks


@pytest.fixture
def launched(run_setting, tmp_path):
    """A long run on two ranks under DeepSpeed's own launcher, three steps in: (process, its log, its folder)."""
    from conftest import ROOT, deepspeed_ranks

    output, log = tmp_path / "out", tmp_path / "log"
    command = [*deepspeed_ranks(2), str(ROOT / "main.py"), *run_setting, "--num_train_epochs", "10000"]
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*command, "--output_dir", output], stdout=file, stderr=file, cwd=tmp_path, start_new_session=True
        )
    deadline = time.monotonic() + 300
    while "Step: 3," not in log.read_text():
        assert time.monotonic() < deadline and process.poll() is None, log.read_text()
        time.sleep(0.1)
    yield process, log, output
    subprocess.run(["pkill", "-KILL", "-f", str(output)], check=False)


def test_dead_rank_ends_the_others_and_the_launcher(launched):
    """Rank 1 is killed: everything ends within a minute, with a status that says so."""
    process, log, output = launched
    rank = subprocess.run(["pgrep", "-f", f"main.py --local_rank=1 .*{output}"], capture_output=True, check=True)
    os.kill(int(rank.stdout.split()[0]), signal.SIGKILL)
    assert process.wait(timeout=60) not in (0, 75), log.read_text()
    time.sleep(1)
    assert subprocess.run(["pgrep", "-f", str(output)], check=False).returncode == 1, "no rank is left"


def test_ctrl_c_under_the_launcher_saves(launched):
    """Ctrl-C goes to launcher and ranks alike: the launcher ends by it, the ranks with a checkpoint."""
    process, log, output = launched
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=60)
    deadline = time.monotonic() + 120
    while subprocess.run(["pgrep", "-f", str(output)], check=False, capture_output=True).returncode == 0:
        assert time.monotonic() < deadline, f"a rank did not end:\n{log.read_text()}"
        time.sleep(0.1)
    (step,) = checkpoint_steps(output)
    assert f"Stopped at step {step}" in log.read_text()


def test_first_error_is_shown_last(run_setting, tmp_path):
    """Rank 1 alone can't write its shard; rank 0, which only loses its connection, repeats what rank 1 said."""
    command = [*run_setting, "--output_dir", tmp_path / "out", "--zero_stage", "1", *SAVING]
    run = start_run(command, ranks=2, file_limits={1: 400_000})
    assert run.wait(60) == [1, 2], run.output()
    own, other = (log.read_text().rstrip().splitlines() for log in run.logs)
    assert own[-1].startswith("stopped: rank 1 failed first: the checkpoint of step 2 can't be written below")
    assert other[-1].startswith("[rank 1] error: the checkpoint of step 2 can't be written below")
    assert not any("Traceback" in line for line in own + other)
