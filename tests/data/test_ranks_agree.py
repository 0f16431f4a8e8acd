"""All ranks train on the same data, or the run ends at once with both counts."""

import json
from pathlib import Path

import pytest
from fork_runs import finished_run, run_main

from utils.data import agreement
from utils.data.agreement import Content, check_ranks_agree
from utils.errors import UserError

SETTING = ["--max_seq_len", "64", "--dtype", "fp32", "--per_device_train_batch_size", "8", "--disable_dropout"]


def write_rows(folder: Path, rows: int, word: str = "It is") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    records = ({"prompt": f"What is {number}?", "response": f"{word} {number}."} for number in range(rows))
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def run_with_own_copy(argv: list[str]) -> None:
    """A rank on a node of its own: the second rank's path leads to another copy, its cache lies on another disk."""
    import os

    if os.environ.get("RANK") == "1":
        argv = [argument.replace("/node0/", "/node1/") for argument in argv]
    run_main(argv)


def start(model: Path, base: Path, *extra: str, status: int = 2) -> str:
    places = ["--model_name_or_path", model, "--data_path", base / "node0" / "set"]
    cache = ["--data_output_path", base / "node0" / "cache"]
    return finished_run([*places, *cache, *SETTING, *extra], ranks=2, status=status, program=run_with_own_copy)


@pytest.mark.parametrize("extra", [[], ["--streaming", "--max_steps", "3"]], ids=["prepared", "streamed"])
def test_different_copies_end_the_run(tiny_opt, tmp_path, extra):
    """One copy was cut off: status 2 on both ranks and both counts, and no step is taken."""
    write_rows(tmp_path / "node0" / "set", 1200)
    write_rows(tmp_path / "node1" / "set", 1120)
    printed = start(tiny_opt, tmp_path, *extra)
    assert "the ranks prepared different data, from other files: rank 0 (" in printed
    first, second = ("200", "120") if extra else ("1080", "1008")
    assert f"has {first} training samples" in printed
    assert f"has {second} training samples" in printed
    assert "Running training" not in printed


def test_equal_copies_train(tiny_opt, tmp_path):
    for node in ("node0", "node1"):
        write_rows(tmp_path / node / "set", 40)
    assert "Running training" in start(tiny_opt, tmp_path, status=0)


def test_equal_counts_with_other_words_differ(tiny_opt, tmp_path):
    write_rows(tmp_path / "node0" / "set", 40)
    write_rows(tmp_path / "node1" / "set", 40, "That is")
    assert "the ranks prepared different data, from other files" in start(tiny_opt, tmp_path)


def test_what_is_compared(monkeypatch):
    content = Content("key", 5, 2, 100, 7)
    check_ranks_agree(content)
    for other, words in (
        (content._replace(key="other"), "with other settings"),
        (content._replace(samples=4), "files"),
    ):
        monkeypatch.setattr(agreement, "gather_from_all", lambda own, other=other: [own, own, (other, "second")])
        with pytest.raises(UserError, match=rf"{words}.*rank 2 \(second\) has {other.samples} training samples"):
            check_ranks_agree(content)
