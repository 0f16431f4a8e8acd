"""When a run evaluates, saves and stops, and which model it ends with."""

import json

import pytest
import torch
from fork_runs import checkpoint_steps
from transformers import AutoModelForCausalLM

from utils.files import replace_folder
from utils.train.plan import RunPlan, is_checkpoint_due, is_evaluation_due, plan_run
from utils.train.state import RunState

# A rate at which the tiny model first learns and then breaks: the lowest evaluation loss is not the last.
BREAKS = ["--learning_rate", "3e-2", "--lr_scheduler_type", "constant", "--num_train_epochs", "3", "--eval_steps", "2"]


def evaluations(folder) -> dict[int, float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}


@pytest.mark.parametrize(
    ("state", "epochs", "max_steps", "steps", "last_epoch"),
    [
        (RunState(), 2, None, 20, 2),
        (RunState(), 2, 7, 7, 1),
        (RunState(), 1, 10, 10, 1),
        (RunState(), 1, 11, 11, 2),
        (RunState(step=4, units_done=32), 2, None, 20, 2),
        (RunState(step=10, epoch=2), 2, None, 20, 2),
        (RunState(step=20, epoch=3), 2, None, 20, 2),
        (RunState(step=12, epoch=2, units_done=16), 2, 25, 25, 3),
        (RunState(step=3, units_done=30), 2, None, 3 + 6 + 10, 2),  # other batches before: 47 units are left
    ],
)
def test_plan(state, epochs, max_steps, steps, last_epoch):
    """77 units in steps of 8: 10 steps an epoch, wherever the run stands."""
    plan = plan_run(77, 8, epochs, max_steps, state)
    assert (plan.steps, plan.epochs) == (steps, last_epoch)
    while not plan.is_done(state):
        state.advance(min(8, 77 - state.units_done), 77)
    assert state.step == steps and state.epochs_begun == last_epoch


def test_what_is_due_after_a_step():
    plan = RunPlan(units=77, global_batch=8, epochs=2, steps=20)
    state, evaluated, saved = RunState(), [], {"steps": [], "epoch": [], "no": []}
    while not plan.is_done(state):
        state.advance(min(8, 77 - state.units_done), 77)
        evaluated += [state.step] if is_evaluation_due(state, plan, 6) else []
        for strategy, steps in saved.items():
            steps += [state.step] if is_checkpoint_due(state, strategy, 7) else []
    assert evaluated == [6, 10, 12, 18, 20]
    assert saved == {"steps": [7, 14], "epoch": [10, 20], "no": []}


@pytest.fixture(scope="module")
def broken_run(run_setting, tmp_path_factory):
    """A run whose evaluation loss rises in the end: (folder, its evaluations, what it printed)."""
    from fork_runs import finished_run

    folder = tmp_path_factory.mktemp("broken")
    saving = ["--save_strategy", "epoch", "--save_total_limit", "2", "--load_best_model_at_end"]
    printed = finished_run([*run_setting, "--disable_dropout", *BREAKS, *saving, "--output_dir", folder])
    return folder, evaluations(folder), printed


def test_best_model_is_the_one_saved(broken_run, run_setting, run_inside, tmp_path):
    folder, losses, printed = broken_run
    assert sorted(losses) == sorted({0, *range(2, 31, 2)})
    best = min((loss, step) for step, loss in losses.items() if step)
    assert best[1] < 30, "the last model is not the best: otherwise this test shows nothing"
    assert f"Saved to {folder}: the model of step {best[1]}, evaluation loss {best[0]:.6g}" in printed
    again = [*run_setting, "--model_name_or_path", folder, "--max_steps", "1", "--output_dir", tmp_path]
    status, _, error = run_inside(again)
    assert status == 0, error
    assert evaluations(tmp_path)[0] == pytest.approx(best[0], abs=1e-6)
    assert not (folder / "best.json").exists() and not list(folder.glob(".incomplete*"))


def test_epochs_are_saved_and_the_oldest_dropped(broken_run):
    folder, _, printed = broken_run
    assert checkpoint_steps(folder) == [20, 30]
    assert printed.count("Checkpoint: ") == 3


def test_early_stop(broken_run, run_setting, run_inside, tmp_path):
    """Two evaluations in a row above the lowest: the run ends four steps after it, and still saves."""
    _, losses, _ = broken_run
    patience = ["--early_stopping_patience", "2", "--output_dir", tmp_path]
    status, printed, _ = run_inside([*run_setting, "--disable_dropout", *BREAKS, *patience])
    assert status == 0
    steps = sorted(losses)[1:]
    expected = next(
        steps[i] for i in range(2, len(steps)) if min(losses[s] for s in steps[i - 1 : i + 1]) >= min(
            losses[s] for s in steps[: i - 1])
    )  # fmt: skip
    assert max(evaluations(tmp_path)) == expected < 30
    assert f"Early stop after step {expected}: 2 evaluation(s) in a row without a loss below" in printed
    assert printed.count("Early stop") == 1
    assert (tmp_path / "config.json").exists()


def test_models_alone_can_be_saved_on_the_way(run_setting, run_inside, tmp_path):
    saving = ["--max_steps", "4", "--save_steps", "2", "--save_only_model", "--output_dir", tmp_path]
    status, printed, _ = run_inside([*run_setting, *saving])
    assert status == 0 and "Plan: 4 optimizer steps = 1 epoch(s)" in printed
    assert checkpoint_steps(tmp_path) == [2, 4]
    half, full = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints" / f"step-{n:06d}").state_dict() for n in (2, 4)
    )
    final = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(full[name], final[name]) for name in final)
    assert not torch.equal(half["lm_head.weight"], final["lm_head.weight"])
    status, _, error = run_inside([*run_setting, "--resume_from_checkpoint", tmp_path / "checkpoints" / "step-000002"])
    assert status == 2 and "holds a model alone (--save_only_model)" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--save_steps", "2"], "--save_strategy steps needs --output_dir."),
        (["--save_strategy", "steps"], "--save_strategy steps needs --save_steps N."),
        (["--save_strategy", "epoch", "--save_steps", "3"], "--save_steps 3 and --save_strategy epoch contradict"),
        (["--resume_from_checkpoint"], "--resume_from_checkpoint needs --output_dir."),
        (["--load_best_model_at_end"], "--load_best_model_at_end needs --output_dir."),
        (["--save_only_model"], "--save_only_model needs --save_steps N or --save_strategy epoch."),
        (["--max_steps", "0"], "--max_steps must be at least 1, not 0."),
        (["--early_stopping_patience", "0"], "--early_stopping_patience must be at least 1, not 0."),
    ],
)
def test_contradictions_are_refused(arguments, words, run_arguments, run_inside):
    status, _, error = run_inside([*run_arguments, *arguments])
    assert status == 2 and words in error


def test_a_folder_is_replaced_over_what_a_killed_writer_left(tmp_path):
    """The kill came when the new folder was in place and the old one was not yet removed."""
    for name, text in ((".incomplete-best", "new"), ("best", "old"), (".incomplete-best-replaced", "older")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").write_text(text)
    replace_folder(str(tmp_path / ".incomplete-best"), str(tmp_path / "best"))
    assert {path.name: (path / "model").read_text() for path in tmp_path.iterdir()} == {"best": "new"}
