"""Both models are measured on the very texts that training used, or it is said that they are not."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import prompt_eval
from utils.errors import UserError
from utils.prompt_eval.same_texts import describe_training, training_date

JINJA = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "set" / "qa.jsonl"
    path.parent.mkdir()
    records = ({"question": f"What eats {number}?", "answer": f"Number {number} eats."} for number in range(60))
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def figures(printed: str, start: str) -> list[list[float]]:
    """The numbers of all lines with a perplexity."""
    lines = [line.split(start)[-1] for line in printed.splitlines() if start in line]
    return [[float(part.split()[-1]) for part in line.split(",")] for line in lines]


@pytest.fixture
def compare(run_inside, tiny_opt, tmp_path, capfd):
    """Train with these flags, then measure with those: (training's perplexities, both models', what was printed)."""

    def run(trained: list, measured: list | None = None):
        common = ["--data_output_path", tmp_path / "cache", "--max_seq_len", "64"]
        training = ["--model_name_or_path", tiny_opt, "--dtype", "fp32", "--learning_rate", "1e-2", "--disable_dropout"]
        status, printed, err = run_inside([*training, *common, *trained, "--output_dir", tmp_path / "out"])
        assert status == 0, err
        models = ["--model_name_or_path_baseline", tiny_opt, "--model_name_or_path_finetune", tmp_path / "out"]
        arguments = [*models, *common, *(trained if measured is None else measured), "--max_new_tokens", "2"]
        prompt_eval.main([str(argument) for argument in arguments])
        shown = capfd.readouterr().out
        return figures(printed, "ppl: "), figures(shown, ": ppl: "), shown

    return run


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--chat_template", "none"],
        ["--chat_template", "FILE", "--completion_only_loss"],
        ["--add_eot_token", "--eot_token", "<|end|>"],
        ["--data_split", "2,4,4"],
    ],
    ids=" ".join,
)
def test_both_perplexities_are_those_of_training(compare, rows, tmp_path, flags):
    """A base model without a chat template: the trained one has one, which must not change the texts."""
    (tmp_path / "form.jinja").write_text(JINJA)
    flags = [str(tmp_path / "form.jinja") if flag == "FILE" else flag for flag in flags]
    trained, shown, printed = compare(["--data_path", rows, "--columns", "prompt=question,chosen=answer", *flags])
    assert len(trained) == len(shown) == 2
    for before, after in zip(trained, shown, strict=True):
        assert before == pytest.approx(after, rel=1e-6)
    assert "samples, the same for both models" in printed
    assert "not as in the training" not in printed


DATED = (
    "{% for m in messages %}{{ m.role + strftime_now(' %d %b %Y: ') + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' + strftime_now(' %d %b %Y: ') }}{% endif %}"
)


def test_the_date_and_the_turns_are_those_of_training(compare, tmp_path):
    (tmp_path / "dated.jinja").write_text(DATED)
    talks = ([{"role": ("user", "assistant")[turn % 2], "content": f"{turn} of {row}"} for turn in range(4)]
             for row in range(40))  # fmt: skip
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    given = ["--data_path", path, "--chat_template", tmp_path / "dated.jinja", "--completion_only_loss"]
    as_trained = ["--train_turns", "last", "--template_date", "2024-07-26"]
    trained, shown, printed = compare([*given, *as_trained])
    assert np.array(trained) == pytest.approx(np.array(shown), rel=1e-6) and len(shown) == 2
    assert "not as in the training" not in printed and "which is 2024-07-26 in this run" in printed
    names = ["--model_name_or_path_baseline", "x", "--model_name_or_path_finetune", tmp_path / "out"]
    said = describe_training(str(tmp_path / "out"), prompt_eval.parse_args([str(word) for word in [*names, *given]]))
    assert "train_turns last then, all now" in said and "template_date" not in said  # that of training is taken
    assert training_date(str(tmp_path / "out")) == "2024-07-26" and training_date(str(tmp_path)) is None
    other = prompt_eval.parse_args([*map(str, [*names, *given]), "--template_date", "2025-01-01"])
    assert "template_date 2024-07-26 then, 2025-01-01 now" in describe_training(str(tmp_path / "out"), other)


def test_data_for_this_phase_alone_and_for_evaluation(compare, rows, tmp_path):
    columns = ["--columns", "prompt=question,chosen=answer"]
    trained, shown, _ = compare(["--data_path", "--sft_only_data_path", rows, *columns])
    assert np.array(trained) == pytest.approx(np.array(shown), rel=1e-6)
    other = tmp_path / "other.jsonl"
    other.write_text(rows.read_text().splitlines()[0] + "\n")
    trained, shown, printed = compare(["--data_path", rows, "--eval_data_path", other, *columns])
    assert np.array(trained) == pytest.approx(np.array(shown), rel=1e-6)
    assert "Evaluation: 1 samples" in printed


def test_what_is_not_as_in_training_is_said(compare, rows):
    common = ["--data_path", rows, "--columns", "prompt=question,chosen=answer"]
    _, _, printed = compare([*common, "--chat_template", "none"], [*common, "--seed", "7"])
    assert "Evaluation: not as in the training of" in printed
    assert "chat_template none then, auto now; seed 1234 then, 7 now" in printed
    ends = ["--add_eot_token", "--eot_token", "<|end|>"]
    _, _, printed = compare([*common, *ends], common)
    assert "the samples of the two models differ (they end in '</s>' and '<|end|>'" in printed


def test_wrong_flags_are_said_before_anything_is_loaded():
    models = ["--model_name_or_path_baseline", "a", "--model_name_or_path_finetune", "b"]
    with pytest.raises(UserError, match=r'--columns "x"'):
        prompt_eval.parse_args([*models, "--columns", "x"])
    with pytest.raises(UserError, match=r"--template_date tomorrow.*\n.*--train_turns"):
        prompt_eval.parse_args([*models, "--template_date", "tomorrow", "--train_turns", "last"])
    with pytest.raises(UserError, match="has a weight"):
        prompt_eval.parse_args([*models, "--eval_data_path", f"{ROOT}:2"])
