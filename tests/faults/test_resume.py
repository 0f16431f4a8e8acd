"""A run that is stopped goes on as if nothing had been: bit for bit in its own layout, within rounding in another."""

import json
import signal

import pytest
from conftest import ROOT
from fork_runs import checkpoint_steps, copy_at_step, finished_run, losses, outcome, start_run

LORA = ["--lora_dim", "4", "--only_optimize_lora"]
CASES = {
    "plain": (1, [], signal.SIGTERM),
    "packing": (1, ["--packing", "--gradient_accumulation_steps", "2", "--num_train_epochs", "6"], signal.SIGINT),
    "bf16, ZeRO 0": (1, ["--dtype", "bf16", "--max_steps", "12"], signal.SIGTERM),
    "two ranks": (2, ["--eval_steps", "3"], signal.SIGUSR1),
    "two ranks, ZeRO 1, offload": (2, ["--zero_stage", "1", "--offload"], signal.SIGTERM),
    "two ranks, ZeRO 3, LoRA": (2, ["--zero_stage", "3", *LORA], signal.SIGUSR1),
}


@pytest.mark.parametrize("case", CASES)
def test_interrupted_run_goes_on_bit_for_bit(case, run_setting, tmp_path):
    """Stopped twice by a signal to one rank, once early and once late."""
    ranks, extra, number = CASES[case]
    setting = [*run_setting, *extra, "--logging_steps", "1"]
    finished_run([*setting, "--output_dir", tmp_path / "whole"], ranks)
    command = [*setting, "--output_dir", tmp_path / "stopped", "--resume_from_checkpoint"]
    for words in ("Step 1/", "Step 7/"):
        run = start_run(command, ranks)
        run.wait_for(words)
        run.kill(number, ranks=[ranks - 1])
        assert run.wait() == [75] * ranks, run.output()
        assert "To go on: the same command with --resume_from_checkpoint latest" in run.output()
    steps = checkpoint_steps(tmp_path / "stopped")
    assert 1 <= steps[0] < 7 <= steps[1] <= 10
    printed = finished_run(command, ranks)
    assert f"Resuming from {tmp_path}/stopped/checkpoints/step-{steps[1]:06d}" in printed
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


# --------------------------------------------------------------------------------- another layout


@pytest.fixture(scope="module")
def sources(run_setting, tmp_path_factory):
    """Finished runs without dropout that wrote a checkpoint at step 4, by layout; each made when asked for."""
    made = {}

    def source(ranks: int, zero_stage: int):
        if (ranks, zero_stage) not in made:
            folder = tmp_path_factory.mktemp("source")
            layout = ["--per_device_train_batch_size", str(16 // ranks), "--zero_stage", str(zero_stage)]
            saving = ["--output_dir", folder, "--save_steps", "4", "--save_total_limit", "0"]
            finished_run([*run_setting, "--disable_dropout", *layout, *saving], ranks)
            made[ranks, zero_stage] = folder
        return made[ranks, zero_stage]

    return source


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 0), (2, 0)), ((1, 0), (2, 2)), ((2, 1), (1, 1)), ((2, 1), (2, 3)), ((2, 3), (1, 0)), ((1, 0), (1, 3))],
)
def test_resume_in_another_layout(before, after, run_setting, sources, tmp_path):
    """(ranks, ZeRO stage) of the two parts; the samples of a step stay the same, so its loss does."""
    folder = copy_at_step(sources(*before), tmp_path / "run", step=4)
    ranks, zero_stage = after
    layout = ["--per_device_train_batch_size", str(16 // ranks), "--zero_stage", str(zero_stage)]
    command = [*run_setting, "--disable_dropout", *layout, "--output_dir", folder, "--resume_from_checkpoint"]
    finished_run(command, ranks)
    whole, resumed = losses(sources(*before)), losses(folder)
    assert list(resumed) == list(whole) == list(range(1, 11))
    assert resumed == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, "0", "bf16"), (1, "0", "bf16")), ((1, "0", "bf16"), (1, "2", "bf16")),
        ((1, "3", "bf16"), (1, "0", "bf16")), ((1, "0", "fp32"), (1, "0", "bf16")),
        ((1, "0", "bf16"), (1, "0", "fp32")),
    ],
)  # fmt: skip
def test_bf16_without_zero_resumes_in_another_layout(before, after, run_setting, tmp_path):
    """(ranks, ZeRO stage, precision): without ZeRO, DeepSpeed keeps 16 bits' states in one flat tensor a group.

    A rate of 1e-2, so that a part that stayed as the model began would show.
    """
    whole, part = tmp_path / "whole", tmp_path / "part"
    common = [*run_setting, "--disable_dropout", "--learning_rate", "1e-2", "--lr_scheduler_type", "constant"]

    def command(ranks: int, stage: str, dtype: str, folder) -> list:
        layout = ["--per_device_train_batch_size", str(16 // ranks), "--zero_stage", stage, "--dtype", dtype]
        return [*common, *layout, "--output_dir", folder]

    finished_run([*command(*before, whole), "--save_steps", "4", "--save_total_limit", "0"], before[0])
    copy_at_step(whole, part, step=4)
    printed = finished_run([*command(*after, part), "--resume_from_checkpoint", "--save_steps", "4"], after[0])
    assert "Resuming from " in printed
    assert losses(part) == pytest.approx(losses(whole), abs=0.02)
    assert losses(whole)[10] < losses(whole)[5] - 0.1, "or the comparison shows nothing"


# ------------------------------------------------------------------------------- what is refused


def test_changed_arguments_are_named_and_refused(run_setting, sources, tmp_path):
    folder = copy_at_step(sources(1, 0), tmp_path / "run", step=4)
    command = [*run_setting, "--disable_dropout", "--per_device_train_batch_size", "16", "--output_dir", folder]
    changed = [*command, "--learning_rate", "1e-4", "--seed", "7"]
    printed = finished_run([*changed, "--resume_from_checkpoint"], status=2)
    assert "seed: 1234 then, 7 now; learning_rate: 0.001 then, 0.0001 now" in printed
    assert "--resume_anyway" in printed and "Traceback" not in printed
    printed = finished_run([*command, "--learning_rate", "1e-4", "--resume_from_checkpoint", "--resume_anyway"])
    rates = [json.loads(line).get("learning_rate") for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [rate for rate in rates if rate is not None]
    assert rates[3] > 5e-4 and max(rates[4:]) < 1e-4, "the schedule goes on at the new rate"


def test_new_run_does_not_mix_with_an_old_ones_checkpoints(run_setting, sources, tmp_path):
    folder = copy_at_step(sources(1, 0), tmp_path / "run", step=8)
    command = [*run_setting, "--disable_dropout", "--per_device_train_batch_size", "16", "--output_dir", folder]
    earlier = folder / "checkpoints" / "step-000004"
    for extra in ([], ["--resume_from_checkpoint", earlier]):
        printed = finished_run([*command, *extra], status=2)
        assert f"holds checkpoints of an earlier run, the last {folder}/checkpoints/step-000008" in printed
    assert checkpoint_steps(folder) == [4, 8]


def test_damaged_checkpoint_is_passed_over(run_setting, sources, tmp_path):
    folder = copy_at_step(sources(1, 0), tmp_path / "run", step=8)
    shard = folder / "checkpoints" / "step-000008" / "mp_rank_00_model_states.pt"
    shard.write_bytes(shard.read_bytes()[:-1])
    command = [*run_setting, "--disable_dropout", "--per_device_train_batch_size", "16", "--output_dir", folder]
    printed = finished_run([*command, "--resume_from_checkpoint", shard.parent], status=2)
    assert "is damaged: mp_rank_00_model_states.pt has" in printed
    printed = finished_run([*command, "--resume_from_checkpoint"])
    assert f"Not used: {shard.parent} is damaged" in printed
    assert f"Resuming from {folder}/checkpoints/step-000004" in printed
    assert outcome(folder) == outcome(sources(1, 0))


def test_path_that_is_no_checkpoint_is_refused(run_inside, run_arguments, tmp_path):
    status, _, error = run_inside([*run_arguments, "--output_dir", tmp_path, "--resume_from_checkpoint", ROOT])
    assert status == 2 and "is no complete checkpoint: it has no complete.json" in error


def test_second_interrupt_stops_at_once(run_setting, tmp_path):
    run = start_run([*run_setting, "--num_train_epochs", "1000", "--output_dir", tmp_path])
    run.wait_for("Step: 2,")
    run.kill(signal.SIGSTOP)
    run.kill(signal.SIGINT)
    run.kill(signal.SIGCONT)
    run.wait_for("SIGINT: stopping after this step")
    run.kill(signal.SIGINT)
    (status,) = run.wait(10)
    assert status in (-signal.SIGINT, 75), "75 where the step was done before the second one came"
