"""What a run leaves behind: metrics.jsonl, run.json, loss.png, library.log, and TensorBoard's event files."""

import json
import logging
import math
import re
import signal

import pytest
import torch
from conftest import ROOT
from fork_runs import finished_run, start_run
from transformers import AutoModelForCausalLM

from utils.logging.library_log import LibraryLog
from utils.logging.loss_curve import draw_losses, running_mean
from utils.logging.metrics_file import MetricsFile, read_metrics
from utils.train.step_losses import StepLosses

STEP = {"epoch", "step", "loss", "token_accuracy", "learning_rate", "grad_norm"}
SPEED = {
    "epoch", "step", "tokens_per_second", "samples_per_second", "tflops_per_device", "peak_share", "padding_share",
    "memory_gb", "seconds",
}  # fmt: skip
EVALUATION = {"epoch", "step", "eval_loss", "perplexity", "eval_accuracy"}


@pytest.fixture(scope="module")
def padded_run(run_setting, tmp_path_factory):
    """20 steps, padded, every 4 of them logged, with TensorBoard: (its folder, what it printed)."""
    folder = tmp_path_factory.mktemp("run")
    report = ["--report_to", "tensorboard", "--tensorboard_path", folder / "events"]
    layout = ["--padding", "max_length", "--logging_steps", "4", "--disable_dropout"]
    return folder, finished_run([*run_setting, *layout, *report, "--output_dir", folder])


def test_records_have_the_documented_fields(padded_run):
    records = read_metrics(str(padded_run[0]))
    steps = [record for record in records if "loss" in record]
    assert all(set(record) == STEP for record in steps) and [r["step"] for r in steps] == list(range(1, 21))
    speeds = [record for record in records if "tokens_per_second" in record]
    assert all(set(record) == SPEED for record in speeds)
    # Every 4 steps, and before the evaluations after 10 and 20.
    assert [record["step"] for record in speeds] == [4, 8, 10, 12, 16, 20]
    evaluations = [record for record in records if "perplexity" in record]
    assert all(set(record) == EVALUATION for record in evaluations) and [r["step"] for r in evaluations] == [0, 10, 20]
    assert len(records) == len(steps) + len(speeds) + len(evaluations)
    documented = (ROOT / "docs" / "output.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in documented for name in STEP | SPEED | EVALUATION)


def test_speed_records_are_about_the_padding_there_was(padded_run):
    """77 samples of 2037 tokens, each padded to 64; an epoch's shares add up to that, whatever steps they cover."""
    speeds = [record for record in read_metrics(str(padded_run[0])) if "padding_share" in record]
    tokens = [record["tokens_per_second"] * record["seconds"] for record in speeds]
    samples = [record["samples_per_second"] * record["seconds"] for record in speeds]
    assert sum(samples) == pytest.approx(2 * 77)
    for share, count, number in zip((r["padding_share"] for r in speeds), tokens, samples, strict=True):
        assert share == pytest.approx(1 - count / (64 * number))
    assert all(record["peak_share"] is None and 0.1 < record["memory_gb"] < 50 for record in speeds)


def test_lines_without_a_terminal(padded_run):
    """The contract's lines, one with the figures every `--logging_steps`, and nothing that redraws itself."""
    printed = padded_run[1]
    for line in ("***** Running training *****", "***** Evaluating perplexity, Epoch 1/2 *****",
                 "Beginning of Epoch 2/2, Total Micro Batches 10", "saving the final model ..."):  # fmt: skip
        assert line in printed.splitlines()
    assert "Step 4/20, epoch 1/2: loss " in printed and "Step 5/20" not in printed
    assert len(re.findall(r"^Step \d+/20, .* left\. Throughput: \d+ real tokens/s", printed, re.MULTILINE)) == 6
    assert "\r" not in printed and "%|" not in printed


def test_run_file(padded_run):
    folder, _ = padded_run
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "finished" and run["arguments"]["logging_steps"] == 4
    assert run["data"]["train"] == {"samples": 77, "tokens": 2037, "label_tokens": 1960}
    assert run["data"]["eval"]["samples"] == 37 and "prompts_" in run["data"]["cache"]
    (start,) = run["starts"]
    assert start["versions"]["torch"] == torch.__version__ and start["ranks"] == 1 and start["last_step"] == 20
    last = read_metrics(str(folder))[-1]
    assert run["result"]["perplexity"] == last["perplexity"] and run["result"]["eval_loss"] == last["eval_loss"]
    assert run["result"]["perplexity_before"] > run["result"]["perplexity"]


def test_tensorboard_reads_the_events_back(padded_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = padded_run
    (events,) = (folder / "events").rglob("events.out.*")
    read = EventAccumulator(str(events))
    read.Reload()
    records = read_metrics(str(folder))
    for tag, name in [
        ("Train/Samples/train_loss", "loss"), ("Train/Samples/lr", "learning_rate"),
        ("Train/Samples/grad_norm", "grad_norm"), ("Train/Samples/token_accuracy", "token_accuracy"),
        ("Eval/Samples/token_accuracy", "eval_accuracy"), ("Train/Samples/tokens_per_second", "tokens_per_second"),
        ("Eval/Samples/loss", "eval_loss"), ("Eval/Samples/perplexity", "perplexity"),
    ]:  # fmt: skip
        wanted = [(8 * record["step"], record[name]) for record in records if name in record]
        found = [(event.step, event.value) for event in read.Scalars(tag)]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted], rel=1e-6)


def test_former_name_of_tensorboard(run_inside, run_arguments, tmp_path):
    places = ["--enable_tensorboard", "--tensorboard_path", tmp_path, "--max_steps", "2"]
    status, _, error = run_inside([*run_arguments, *places])
    assert status == 0, error
    assert list((tmp_path / "ds_tensorboard_logs" / "step1_model_tensorboard").glob("events.out.*"))


def test_missing_package_is_named_before_the_model_is_loaded(run_inside, run_arguments, monkeypatch):
    monkeypatch.setattr("utils.logging.trackers.find_spec", lambda name: None)
    status, printed, error = run_inside([*run_arguments, "--report_to", "wandb", "comet"])
    assert status == 2 and "not installed: pip install wandb comet_ml" in error and "Model:" not in printed


def test_interrupted_run_is_recorded_and_goes_on_in_the_same_file(run_setting, tmp_path):
    command = [*run_setting, "--output_dir", tmp_path, "--resume_from_checkpoint"]
    run = start_run(command)
    run.wait_for("Step: 3,")
    run.kill(signal.SIGTERM)
    assert run.wait() == [75]
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["status"] == "interrupted" and (tmp_path / "loss.png").stat().st_size > 10_000
    stopped = record["starts"][0]["last_step"]
    finished_run(command)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["status"] == "finished"
    assert [start["status"] for start in record["starts"]] == ["interrupted", "finished"]
    assert record["starts"][1]["first_step"] == stopped


# ------------------------------------------------------------------------------------- gradient norms


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (1, 2), (2, 3)])
def test_gradient_norm_is_that_of_the_mean_loss(ranks, stage, run_setting, tiny_opt, json_data, tmp_path):
    """Of the first step, by plain torch on the same samples: the whole epoch is one step, so no order matters."""
    one_step = ["--per_device_train_batch_size", -(-77 // ranks), "--max_steps", "1", "--disable_dropout"]
    finished_run([*run_setting, *one_step, "--zero_stage", stage, "--output_dir", tmp_path], ranks)
    (recorded,) = [r["grad_norm"] for r in read_metrics(str(tmp_path)) if "grad_norm" in r]
    assert recorded == pytest.approx(plain_gradient_norm(tiny_opt, json_data), rel=1e-4)


def plain_gradient_norm(model_folder, data_folder) -> float:
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    sums, labels = zip(*plain_losses(model, model_folder, data_folder), strict=True)
    (sum(sums) / sum(labels)).backward()
    return math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))


def plain_losses(model, model_folder, data_folder):
    """(summed loss, label tokens) of every training sample, by plain torch."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    for record in json.loads((data_folder / "train.json").read_text()):
        ids = [*tokenizer(f" {record['prompt']} {record['chosen']}")["input_ids"], tokenizer.eos_token_id][:64]
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        yield torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"), len(ids) - 1


# --------------------------------------------------------------------------- the losses of micro batches

LOSS_LINE = re.compile(r"^Epoch: (\d+), Step: (\d+), Rank: (\d+), loss = (\S+)$", re.MULTILINE)


def test_every_rank_prints_the_mean_loss_of_each_micro_batch(run_setting, tiny_opt, json_data):
    """Micro batches of one sample, all in one step: the losses of the samples before training, by plain torch."""
    cut = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "39", "--max_steps", "1"]
    printed = LOSS_LINE.findall(finished_run([*run_setting, *cut, "--disable_dropout", "--zero_stage", "2"], 2))
    # The second rank's last micro batch holds no sample of its own: 77 are an odd number.
    numbers = {rank: [int(step) for epoch, step, r, _ in printed if (epoch, r) == ("0", rank)] for rank in "01"}
    assert numbers == {"0": list(range(39)), "1": list(range(38))} and len(printed) == 77
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tiny_opt).eval()
        wanted = [(total / labels).item() for total, labels in plain_losses(model, tiny_opt, json_data)]
    assert sorted(float(loss) for *_, loss in printed) == pytest.approx(sorted(wanted), rel=1e-5)


def test_micro_batches_are_numbered_from_zero_in_each_epoch_also_in_a_run_that_goes_on(run_setting, tmp_path):
    """Two micro batches a step; the run is stopped within its second epoch."""
    cut = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    command = [*run_setting, *cut, "--output_dir", tmp_path, "--resume_from_checkpoint"]
    run = start_run(command)
    run.wait_for("Epoch: 1, Step: 5,")
    run.kill(signal.SIGTERM)
    assert run.wait() == [75]
    found = [LOSS_LINE.findall(text) for text in (run.output(), finished_run(command))]
    numbers = [(int(epoch), int(step)) for lines in found for epoch, step, *_ in lines]
    assert numbers == [(epoch, step) for epoch in range(2) for step in range(20)] and all(found)


# --------------------------------------------------------------------------------------- by themselves


def test_running_mean():
    assert running_mean([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]
    assert running_mean([], 3) == []


@pytest.mark.parametrize("steps", [0, 1, 200])
def test_curves_of_any_length(steps, tmp_path):
    metrics = MetricsFile(str(tmp_path), True)
    metrics.write(epoch=0, step=0, eval_loss=math.nan, perplexity=math.nan)
    for step in range(1, steps + 1):
        metrics.write(epoch=1, step=step, loss=5 / step, learning_rate=0.1, grad_norm=None)
    (tmp_path / "model").mkdir()
    assert draw_losses(str(tmp_path), str(tmp_path / "model")) == str(tmp_path / "model" / "loss.png")


def test_a_picture_that_can_not_be_drawn_ends_no_run(tmp_path, monkeypatch):
    """It says why in the place of its path, and the model's folder goes without."""
    MetricsFile(str(tmp_path), True).write(epoch=1, step=1, loss=2.0, learning_rate=0.1, grad_norm=1.0)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: 1 / 0)
    assert draw_losses(str(tmp_path)) == "not drawn (ZeroDivisionError: division by zero)"
    assert not (tmp_path / "loss.png").exists()


def test_losses_are_brought_over_only_when_asked(monkeypatch):
    """Adding steps reads no value off the device."""
    losses = StepLosses(torch.device("cpu"))
    for name in ("item", "tolist", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a value was read"))
    for _ in range(3):
        losses.add(torch.ones(()), True)
        losses.finish_step(2)
    monkeypatch.undo()
    assert [step["loss"] for step in losses.collect()] == [0.5] * 3


def test_library_log_keeps_what_came_before_it_was_opened(tmp_path, capsys):
    log = LibraryLog()
    record = logging.LogRecord("lib", logging.WARNING, __file__, 1, "early words", None, None)
    log.handle(record)
    log.open(str(tmp_path))
    log.handle(logging.LogRecord("lib", logging.ERROR, __file__, 1, "bad words", None, None))
    text = (tmp_path / "library.log").read_text()
    assert "early words" in text and "bad words" in text
    shown = capsys.readouterr().err
    assert "bad words" in shown and "early words" not in shown


def test_library_log_without_a_folder_shows_warnings(capsys):
    log = LibraryLog()
    log.open(None)
    for level in (logging.INFO, logging.WARNING):
        log.handle(logging.LogRecord("lib", level, __file__, 1, f"level {level}", None, None))
    shown = capsys.readouterr().err
    assert "level 30" in shown and "level 20" not in shown
