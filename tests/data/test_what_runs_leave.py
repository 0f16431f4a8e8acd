"""What one run leaves to the next: the date that its template saw, and a chat template whose answers can be found."""

import datetime
import json
import re

import pytest
from conftest import make_tiny_opt
from transformers import AutoTokenizer

from tests.data.prepared_data import prepare
from tests.data.test_chat_format import INST, THINKING, labelled
from tests.data.test_turns_and_date import TEMPLATE
from utils.checkpoint import resume
from utils.model.tokenizer import load_hf_tokenizer

ROWS = [
    {"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": f"one {n}"},
                  {"role": "user", "content": "and?"}, {"role": "assistant", "content": f"two {n}"}]}
    for n in range(8)
]  # fmt: skip


def arguments(folder, model, out, *more) -> list[str]:
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return [
        "--model_name_or_path", model, "--data_path", folder / "train.jsonl", "--data_output_path", folder / "cache",
        "--max_seq_len", "128", "--dtype", "fp32", "--per_device_train_batch_size", "4", "--output_dir", out, *more,
    ]  # fmt: skip


class Clock:
    """A calendar that shows one day."""

    def __init__(self, day: str) -> None:
        self.day = datetime.date.fromisoformat(day)

    def today(self):
        return self.day


def test_a_resumed_run_keeps_its_date(tmp_path, run_inside, monkeypatch):
    model = make_tiny_opt(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)

    def run(day, out, *more):
        monkeypatch.setattr(resume, "date", Clock(day))
        return run_inside(arguments(tmp_path, model, tmp_path / out, "--num_train_epochs", "2", *more))

    status, out, err = run("2026-03-04", "a", "--save_steps", "2")
    assert status == 0 and "the template writes the date, which is 2026-03-04 in this run" in out, err
    assert json.loads((tmp_path / "a" / "run.json").read_text())["decisions"]["template_date"] == "2026-03-04"
    first = tmp_path / "a" / "checkpoints" / "step-000002"
    status, out, err = run("2026-03-05", "b", "--resume_from_checkpoint", first)
    assert status == 0, err
    assert "the template writes the date, which is 2026-03-04 in this run" in out
    assert "2026-03-04, when the run that is resumed began" in out and re.search(r"Data cache .*: hit", out)
    status, out, err = run("2026-03-05", "c", "--resume_from_checkpoint", first, "--template_date", "2026-03-05")
    assert status == 2 and "template_date: 2026-03-04 then, 2026-03-05 now" in " ".join(err.split())
    status, out, err = run("2026-03-05", "d", "--resume_from_checkpoint", first, "--template_date", "2026-03-04")
    assert status == 0 and re.search(r"Data cache .*: hit", out), err
    status, out, _ = run("2026-03-05", "e", "--dry_run")
    assert status == 0 and "which is 2026-03-05 in this run" in out, "a new run has its own date"


@pytest.mark.parametrize("form", ["human_assistant", "inst", "thinking"])
def test_the_saved_template_finds_every_answer(tmp_path, run_inside, form):
    """A model trained in any format is the next run's model, and all its answers are labelled."""
    (tmp_path / "t.jinja").write_text({"inst": INST}.get(form, THINKING))
    choice = form if form == "human_assistant" else tmp_path / "t.jinja"
    model = make_tiny_opt(tmp_path / "model")
    only = ["--completion_only_loss", "--max_steps", "1"]
    first = arguments(tmp_path, model, tmp_path / "a", *only, "--chat_template", choice)
    status, _, err = run_inside(first)
    assert status == 0, err
    status, out, err = run_inside(arguments(tmp_path, tmp_path / "a", tmp_path / "b", *only, "--dry_run"))
    assert status == 0 and "Data train: 8 samples" in out and "dropped" not in out, err
    assert "texts: the tokenizer's chat template" in out
    tokenizer = load_hf_tokenizer(str(tmp_path / "a"))
    train, _ = prepare([tmp_path / "train.jsonl"], tmp_path / "cache", tokenizer, 128, completion_only=True)
    found = sorted(labelled(train[number], tokenizer) for number in range(len(train)))
    assert [["one" in answer, f"two {n}" in last] for n, (answer, last) in enumerate(found)] == [[True, True]] * 8
    assert all("q" not in text and "and?" not in text for texts in found for text in texts)
