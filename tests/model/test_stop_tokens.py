"""Where generation stops: the end tokens of checkpoint, training and data, and the rows of tokens that are new."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_opt
from fork_runs import finished_run
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from utils.model.learning_rate import rate_advice
from utils.model.model_utils import create_hf_model, embedding_rows
from utils.model.special_tokens import closing_ids, end_ids, token_rows
from utils.model.tokenizer import load_hf_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SETTING = ["--max_seq_len", "64", "--dtype", "fp32", "--max_steps", "1", "--per_device_train_batch_size", "4"]


def make_llama(folder: Path, tokenizer, stops: list[int] | int | None = None, **changes) -> Path:
    """A tiny Llama with this tokenizer, whose generation configuration stops at `stops`."""
    settings = {
        "vocab_size": 8 * -(-token_rows(tokenizer) // 8), "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None,
        "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if stops is not None:
        GenerationConfig(eos_token_id=stops).save_pretrained(folder)
    return folder


def qwen_tokenizer(tiny_opt: Path, template: str | None = CHATML, eos: str = "<|endoftext|>"):
    """The special tokens of a Qwen: a base model's tokenizer ends texts with one, its template turns with another."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_opt)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]},
        replace_extra_special_tokens=False,
    )
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = eos, "<|endoftext|>", template
    return tokenizer


@pytest.fixture
def data(tmp_path) -> Path:
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A spider."}]
    rows = [{"messages": turns * (1 + number % 2)} for number in range(20)]
    path = tmp_path / "set" / "train.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def saved_stops(folder: Path) -> tuple:
    """What the configuration, the generation configuration and the tokenizer of a saved model say."""
    generation = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    return AutoConfig.from_pretrained(folder).eos_token_id, generation, AutoTokenizer.from_pretrained(folder).eos_token


# -------------------------------------------------------------------------------------------- the checkpoint's own


def test_a_list_of_end_ids_is_kept_after_the_end_token_of_training(tmp_path, tiny_opt):
    tokenizer = qwen_tokenizer(tiny_opt, eos="<|im_end|>")
    first, last = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    folder = make_llama(tmp_path / "model", tokenizer, [first, last], eos_token_id=first)
    model = create_hf_model(AutoModelForCausalLM, str(folder), tokenizer)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == [last, first]
    assert model.config.end_token_id == last


def test_a_default_of_the_family_is_no_end_token(tmp_path, tiny_opt):
    """LlamaConfig's eos id is 2 wherever none is said; in most tokenizers that is a piece of text."""
    tokenizer = qwen_tokenizer(tiny_opt)
    folder = make_llama(tmp_path / "model", tokenizer, eos_token_id=40)
    model = LlamaForCausalLM.from_pretrained(folder)
    assert end_ids(tokenizer, model) == [tokenizer.eos_token_id]


# ----------------------------------------------------------------------------------------------- the data's own


def test_a_base_model_trained_on_chatml_is_stopped_where_turns_end(tmp_path, tiny_opt, data):
    tokenizer = qwen_tokenizer(tiny_opt)
    first, last = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    folder = make_llama(tmp_path / "model", tokenizer)
    places = ["--model_name_or_path", folder, "--data_path", data, "--data_output_path", tmp_path / "cache"]
    printed = finished_run([*places, *SETTING, "--output_dir", tmp_path / "out"])
    assert "Stop tokens: answers in the data end with '<|im_end|>', which generation did not stop at: added" in printed
    assert saved_stops(tmp_path / "out") == ([first, last], [first, last], "<|endoftext|>")


def test_nothing_is_added_where_generation_stops_there_already(tmp_path, tiny_opt, data):
    tokenizer = qwen_tokenizer(tiny_opt, eos="<|im_end|>")
    first, last = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    folder = make_llama(tmp_path / "model", tokenizer, [last, first])
    places = ["--model_name_or_path", folder, "--data_path", data, "--data_output_path", tmp_path / "cache"]
    printed = finished_run([*places, *SETTING, "--output_dir", tmp_path / "out"])
    assert "did not stop at" not in printed
    assert "Stop tokens: generation stops at '<|im_end|>', '<|endoftext|>'" in printed
    assert saved_stops(tmp_path / "out") == ([last, first], [last, first], "<|im_end|>")


def test_what_closes_an_answer(tiny_opt):
    tokenizer = qwen_tokenizer(tiny_opt)
    end, last = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    words = tokenizer("A spider.", add_special_tokens=False)["input_ids"]
    line = tokenizer("\n", add_special_tokens=False)["input_ids"]
    closed, plain, cut = [*words, last, *line, end], [*words, end], [*words, last]
    assert closing_ids([closed, plain], end, tokenizer) == [last]
    assert closing_ids([plain, cut], end, tokenizer) == []
    assert closing_ids([closed] + [plain] * 20, end, tokenizer) == []
    assert closing_ids([], end, tokenizer) == []


# ---------------------------------------------------------------------------------------------- --add_eot_token


def test_an_added_end_token_is_that_of_all_three(tmp_path, tiny_opt, json_data):
    arguments = [
        "--model_name_or_path", tiny_opt, "--data_path", json_data, "--data_output_path", tmp_path / "cache", *SETTING,
        "--add_eot_token", "--eot_token", "<|done|>", "--output_dir", tmp_path / "out",
    ]  # fmt: skip
    printed = finished_run(arguments)
    new = AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<|done|>")
    assert saved_stops(tmp_path / "out") == (new, new, "<|done|>")
    assert "every sample ends with '<|done|>'; padding is '<pad>'" in printed


def test_an_added_end_token_comes_before_those_of_a_list(tmp_path, tiny_opt):
    plain = qwen_tokenizer(tiny_opt, None, "<|im_end|>")
    stops = plain.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    folder = make_llama(tmp_path / "model", plain, stops)
    tokenizer = load_hf_tokenizer(str(folder), add_special_tokens="<|done|>")
    model = create_hf_model(AutoModelForCausalLM, str(folder), tokenizer)
    expected = [tokenizer.convert_tokens_to_ids("<|done|>"), *stops]
    assert model.config.eos_token_id == model.generation_config.eos_token_id == expected


def test_special_tokens_are_extended(tmp_path, tiny_opt):
    qwen_tokenizer(tiny_opt).save_pretrained(tmp_path)
    before = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = load_hf_tokenizer(str(tmp_path), add_special_tokens="<|done|>")
    assert {*before.all_special_tokens, "<|done|>"} == set(tokenizer.all_special_tokens)
    assert "<|im_end|>" in tokenizer.extra_special_tokens
    assert tokenizer.eos_token == "<|done|>"
    assert tokenizer.decode(before("<|im_start|>a<|im_end|>")["input_ids"], skip_special_tokens=True).strip() == "a"
    assert load_hf_tokenizer(str(tmp_path), add_special_tokens=["<|done|>"]).eos_token == "<|endoftext|>"


@pytest.mark.parametrize("name", ["auto", "auto,lm_head"])
@pytest.mark.parametrize("only", [True, False])
def test_a_new_row_that_stays_frozen_is_refused(run_inside, tmp_path, tiny_opt, json_data, only, name):
    tokenizer = qwen_tokenizer(tiny_opt, None)
    folder = make_llama(tmp_path / "model", tokenizer, vocab_size=len(tokenizer))
    name = name if name == "auto" else "layers,lm_head"
    arguments = [
        "--model_name_or_path", folder, "--data_path", json_data, "--data_output_path", tmp_path / "cache", *SETTING,
        "--lora_dim", "2", "--lora_module_name", name, *["--only_optimize_lora"] * only, "--add_eot_token",
    ]  # fmt: skip
    status, _, err = run_inside([*arguments, "--eot_token", "<|done|>", "--dry_run"])
    frozen = only or "lm_head" in name
    assert (status == 2) == frozen, err
    if frozen:
        assert "--add_eot_token adds '<|done|>', a token the model never saw" in err
        assert ("--only_optimize_lora its row" if only else "--lora_module_name layers,lm_head its row") in err
    status, _, err = run_inside([*arguments, "--eot_token", "<|im_end|>", "--dry_run"])
    assert status == 0, err
    make_llama(folder, tokenizer, vocab_size=len(tokenizer) + 8)
    status, out, err = run_inside([*arguments, "--eot_token", "<|done|>", "--dry_run"])
    assert status == 0, err
    assert ("the model has a spare row for '<|done|>', but with" in out) == frozen


# ------------------------------------------------------------------------------------------------------- rows


def test_there_is_a_row_for_the_highest_id(tmp_path, tiny_opt):
    """Ids that are left out between others: as many entries as before, and a higher last one."""
    path = make_tiny_opt(tmp_path / "model", vocab_size=1816)
    content = json.loads((path / "tokenizer.json").read_text())
    token = {"id": 1830, "content": "<|far|>", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}  # fmt: skip
    content["added_tokens"].append(token)
    content["model"]["vocab"]["<|far|>"] = 1830
    (path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_hf_tokenizer(str(path))
    assert tokenizer("<|far|>", add_special_tokens=False)["input_ids"] == [1830]
    assert token_rows(tokenizer) == 1831 > len(tokenizer)
    assert embedding_rows(create_hf_model(AutoModelForCausalLM, str(path), tokenizer)) == 1832


# ------------------------------------------------------------------------------------------------ learning rates


@pytest.mark.parametrize(
    ("trained", "rate", "words"),
    [
        (1_300_000_000, 1e-3, "0.001 is high for full training of 1.3 billion weights: 1e-05 is usual"),
        (7_000_000_000, 1e-4, "0.0001 is high"),
        (1_300_000_000, 2e-5, None),
        (7_000_000_000, 1e-8, "1e-08 is low"),
        (1_000_000, 1e-3, None),
        (1_300_000_000, 0.0, None),
    ],
)
def test_a_rate_far_from_the_usual_is_said(trained, rate, words):
    line = rate_advice(trained, rate)
    assert words in line if words else line is None
