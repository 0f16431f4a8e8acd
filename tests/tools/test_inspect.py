"""`python -m tools.inspect_data`: what it counts is what is in the data, and what training then gets."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, write_json_data

from tools import inspect_data as inspect
from utils.data.data_utils import create_prompt_dataset
from utils.errors import UserError
from utils.model.tokenizer import load_hf_tokenizer

DEMO = str(ROOT / "demo" / "tiny_opt")


def pair(number: int, name: str = "a") -> dict:
    return {"prompt": f"{name} number {number}?", "chosen": f"it is {number}", "rejected": f"it is not {number}"}


TRAIN = [*(pair(number) for number in range(20)), {"prompt": "A  number 3?", "chosen": "IT is\n3"}]
TRAIN += [{"prompt": "p", "chosen": " "}, {"prompt": "long?", "chosen": "word " * 60, "note": 1}]
EVAL = [pair(5), {**pair(6), "chosen": "another"}, pair(0, "b"), pair(0, "b"), {"prompt": "long " * 60, "chosen": "c"}]


@pytest.fixture
def report(tmp_path, capsys):
    """The report on these paths, in lines without their margin."""

    def of(*paths, **flags) -> list[str]:
        words = ["--model_name_or_path", DEMO, "--data_path", *map(str, paths), "--max_seq_len", "40"]
        words += ["--data_output_path", str(tmp_path / "cache")]
        for name, value in flags.items():
            words += [f"--{name}", *([] if value is True else [str(value)])]
        capsys.readouterr()
        inspect.main(words)
        return [line.strip() for line in capsys.readouterr().out.splitlines()]

    return of


@pytest.fixture
def own(tmp_path):
    for name, rows in (("train", TRAIN), ("eval", EVAL)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "train.jsonl"


def test_counts(report, own, tmp_path):
    lines = report(own)
    assert f"=== {own}" in lines
    assert any("prompt, chosen, rejected; texts: the Human/Assistant form" in line for line in lines)
    assert "train: 23 rows, 1 of them with an empty answer or none (row 22)" in lines
    assert "eval: 5 rows, 0 of them with an empty answer or none" in lines
    assert "not used: note" in lines
    truncated = [line for line in lines if line.startswith("--max_seq_len")]
    assert truncated == [
        "--max_seq_len 40 truncates 1 rows (4.5%), 0 of them before the last answer",
        "--max_seq_len 40 truncates 1 rows (20.0%), 1 of them before the last answer",
    ]
    assert "duplicates: within train 1 (row 21); within eval 1 (row 4)" in lines
    assert "leaks: eval rows that are in train too: 1 (row 1); others with a prompt of train: 1 (row 2)" in lines, lines
    assert len([line for line in lines if line.startswith("sample, train row")]) == inspect.SAMPLES


def test_data_for_evaluation_alone(report, own, tmp_path):
    """All rows of --eval_data_path, with one that the training rows hold too; none of the others is for evaluation."""
    rows = [pair(number, "c") for number in range(30)] + [TRAIN[2]]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = report(own, eval_data_path=tmp_path / "other" / "held_out.jsonl")
    assert [line.split(",")[0] for line in lines if " rows, " in line and line[:4] in ("trai", "eval")] == [
        "train: 23 rows", "eval: 31 rows",
    ]  # fmt: skip
    together = lines[lines.index("=== the 2 data sets together") :]
    assert "leaks: eval rows that are in train too: 1; others with a prompt of train: 0" in together
    assert any("evaluation: the data of --eval_data_path" in line for line in lines)


@pytest.mark.parametrize(("split", "weight"), [("2,4,4", 1), ("10,0,0", 0.5)])
def test_phases_are_what_training_gets(report, own, tmp_path, split, weight):
    """Rows and usable rows of every phase, against the data sets themselves; lengths against the sum of tokens."""
    lines = report(f"{own}:{weight}", data_split=split)
    for phase, share in zip((1, 2, 3), split.split(","), strict=True):
        line = next(line for line in lines if line.startswith(f"phase {phase}"))
        if share == "0":
            assert line.startswith(f"phase {phase}: train 0 rows, 0 usable; eval 0 rows")
            continue
        name = f"{own}:{weight}" if phase == 1 else str(own)
        data = create_prompt_dataset(
            0, [name], split, str(tmp_path / "cache"), phase, 1234, load_hf_tokenizer(DEMO), 40, "</s>"
        )
        counts = [int(word) for word in line.replace(",", "").split() if word.isdigit()]
        assert [counts[1], counts[3]] == [len(part) for part in data], line
    tokens = next(line for line in lines if line.startswith("tokens"))
    whole, _ = create_prompt_dataset(
        0, [str(own)], "1,0,0", str(tmp_path / "cache"), 1, 1234, load_hf_tokenizer(DEMO), 999, "</s>"
    )
    assert tokens.startswith(f"tokens: {whole.lengths().sum()}; ")
    assert tokens.endswith(f"longest {whole.lengths().max()}")


def test_samples_show_special_tokens_and_what_is_learned(report, own):
    lines = report(own, completion_only_loss=True, data_split="10,0,0")
    shown = [lines[place + 1] for place, line in enumerate(lines) if line.startswith("sample, train row")]
    assert len(shown) == 3
    assert all(text.startswith("</s> Human: ") and text.endswith("</s>⟧") and " Assistant:⟦ " in text for text in shown)
    assert not any("⟦" in line for line in report(own))


def test_several_sets_are_compared_with_each_other_too(report, own, tmp_path):
    known = write_json_data(
        tmp_path, [{"prompt": "Human: b number 0? Assistant:", "chosen": "it is 0"}], [{"prompt": "x", "chosen": "y"}]
    )
    lines = report(own, known)
    assert "Data local/jsonfile: known by its name" in lines
    together = lines[lines.index("=== the 2 data sets together") :]
    assert "duplicates: within train 1; within eval 1" in together
    assert "leaks: eval rows that are in train too: 3; others with a prompt of train: 1" in together


def test_a_row_that_a_template_refuses_is_named(report, own, tmp_path):
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{% if 'number 7' in m['content'] %}{{ raise_exception('no 7') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"train\.jsonl, record 8: .*no 7"):
        report(own, chat_template=tmp_path / "t.jinja")


def test_as_a_command(tmp_path):
    """A mistake is one message and status 2; nothing but the report on standard output."""
    words = [sys.executable, "-m", "tools.inspect_data", "--model_name_or_path", DEMO, "--data_output_path", tmp_path]

    def start(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run([*words, "--data_path", *more], capture_output=True, text=True, cwd=ROOT, timeout=120)

    good = start("local/jsonfile")
    assert good.returncode == 0 and "train: 2194 rows" in good.stdout, good.stderr
    bad = start("nowhere.csv", "--dropout", "3")
    assert bad.returncode == 2 and "--dropout must be" in bad.stderr and "Traceback" not in bad.stderr
