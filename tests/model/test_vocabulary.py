"""Tokenizers with more entries than the model has rows: what is added is said, and what stays random."""

import json
import shutil

import pytest
from conftest import make_tiny_opt
from transformers import AutoTokenizer

NEW = ["<|turn|>", "<|end_of_turn|>"]


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A model whose folder has a tokenizer with two more tokens than the embedding has rows."""
    folder = make_tiny_opt(tmp_path_factory.mktemp("grown") / "opt")
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    filler = [f"<|{number}|>" for number in range(rows - len(tokenizer))]
    tokenizer.add_special_tokens({"additional_special_tokens": [*filler, *NEW]})
    tokenizer.save_pretrained(folder)
    return folder, rows


@pytest.mark.parametrize("flags", [[], ["--lora_dim", "2", "--lora_module_name", "auto", "--only_optimize_lora"]])
def test_new_rows_are_said_and_that_they_do_not_train(flags, grown, run_arguments, run_inside):
    folder, rows = grown
    command = [*run_arguments, "--model_name_or_path", folder, "--max_steps", "1", "--per_device_train_batch_size", "8"]
    status, out, err = run_inside([*command, *flags])
    assert status == 0, err
    assert f"Embedding: {rows} rows become {rows + 8}, a multiple of 8 for the tokenizer's {rows + 2} entries" in out
    assert "2 tokens that the model never saw begin with random weights ('<|turn|>', '<|end_of_turn|>')" in out
    assert ("so the rows of 2 tokens of the tokenizer that the model never saw stay random" in out) == bool(flags)


def test_a_model_with_enough_rows_says_nothing(run_arguments, run_inside):
    status, out, err = run_inside([*run_arguments, "--max_steps", "1", "--per_device_train_batch_size", "8"])
    assert status == 0 and "Embedding:" not in out, err


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"chat_template": 3}, "chat_template is 3, not a text"),
        ({"model_max_length": "512"}, "model_max_length is '512', not a number"),
    ],
)
def test_settings_of_another_type(entry, words, run_arguments, run_inside, tiny_opt, tmp_path):
    folder = shutil.copytree(tiny_opt, tmp_path / "number")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entry}))
    status, _, error = run_inside([*run_arguments, "--model_name_or_path", folder])
    assert status == 2 and words in error, error
