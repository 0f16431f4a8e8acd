"""`--train_turns` and `--template_date`, from the command line to the ids and labels that training gets."""

import json

import pytest
import torch
from conftest import make_tiny_opt
from transformers import AutoTokenizer

from utils.arguments.parser import parse_args
from utils.arguments.values import check_values
from utils.data.training_data import load_training_data
from utils.model.tokenizer import load_hf_tokenizer
from utils.run_config import RunConfig

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + strftime_now('%d %b %Y') + ': ' + m['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant {{ strftime_now('%d %b %Y') }}: {% endif %}"
)
ROW = {"messages": [{"role": who, "content": said} for who, said in
                    (("user", "q"), ("assistant", "one"), ("user", "r"), ("assistant", "two"))]}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_tiny_opt(tmp_path_factory.mktemp("dated") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def loaded(model, tmp_path, *more: str):
    """(text, labelled text) of the first sample."""
    (tmp_path / "t.jsonl").write_text((json.dumps(ROW) + "\n") * 3)
    given = ["--model_name_or_path", str(model), "--data_path", str(tmp_path / "t.jsonl"), "--completion_only_loss"]
    args = parse_args([*given, "--data_output_path", str(tmp_path / "cache"), "--dtype", "fp32", *more])
    assert check_values(args) == []
    tokenizer = load_hf_tokenizer(str(model))
    sample = load_training_data(RunConfig.resolve(args, torch.device("cpu")), tokenizer).train[0]
    return tokenizer.decode(sample["input_ids"]), tokenizer.decode(sample["labels"][sample["labels"] >= 0])


def test_all_answers_or_the_last(model, tmp_path):
    _, every = loaded(model, tmp_path)
    text, last = loaded(model, tmp_path, "--train_turns", "last")
    assert "one" in every and "two" in every
    assert "two" in last and "one" not in last and "one" in text


def test_the_date_is_the_one_given(model, tmp_path, capsys):
    text, _ = loaded(model, tmp_path, "--template_date", "2024-07-26")
    assert text.count("26 Jul 2024") == 4
    assert "the template writes the date, which is 2024-07-26 in this run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--template_date", "26 Jul 2024"], "--template_date 26 Jul 2024: write a date as YYYY-MM-DD"),
        (["--train_turns", "last"], "--train_turns says what --completion_only_loss labels"),
    ],
)
def test_what_means_nothing_is_refused(more, words):
    assert any(words in problem for problem in check_values(parse_args(["--model_name_or_path", "m", *more])))
