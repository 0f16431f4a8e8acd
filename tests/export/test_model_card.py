"""The card and the chat template of a saved model."""

import json

import pytest
from fork_runs import finished_run
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from utils.data.formats.chat_template import ChatFormat, render, render_prompt
from utils.export.model_card import card_header, chat_template, human_assistant_template

CONVERSATION = [
    {"role": "system", "content": "Be 'brief'."},
    {"role": "user", "content": "How many legs has a spider?"},
    {"role": "assistant", "content": "Eight."},
    {"role": "user", "content": "蜘蛛? \\n {{ x }}"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_opt):
    return AutoTokenizer.from_pretrained(tiny_opt)


@pytest.fixture(scope="module")
def saved(run_setting, tmp_path_factory):
    """The folder of a finished run that kept its best model."""
    folder = tmp_path_factory.mktemp("run")
    best = ["--load_best_model_at_end", "--lora_dim", "2"]
    finished_run([*run_setting, *best, "--output_dir", folder])
    return folder


def test_template_gives_what_training_saw_token_for_token(saved, json_data):
    """Against the data cache of the run itself: every sample that was not cut."""
    import datasets

    tokenizer = AutoTokenizer.from_pretrained(saved)
    run = json.loads((saved / "run.json").read_text())
    trained = {tuple(ids) for ids in datasets.load_from_disk(f"{run['data']['cache']}/train")["input_ids"]}
    compared = 0
    for record in json.loads((json_data / "train.json").read_text()):
        question = record["prompt"].removeprefix("Human: ").removesuffix(" Assistant:")
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": record["chosen"]}]
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        if len(ids) <= 64:
            assert tuple(ids) in trained
            compared += 1
    assert compared >= 70


def test_template_of_whole_conversations(tokenizer):
    template = human_assistant_template(tokenizer, tokenizer.eos_token)
    ids = tokenizer.apply_chat_template(CONVERSATION, chat_template=template, tokenize=True, return_dict=True)
    expected = [*tokenizer(render(ChatFormat(), CONVERSATION))["input_ids"], tokenizer.eos_token_id]
    assert ids["input_ids"] == expected
    asked = tokenizer.apply_chat_template(
        CONVERSATION[:-1], chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert asked["input_ids"] == tokenizer(render_prompt(ChatFormat(), CONVERSATION[:-1]))["input_ids"]


def test_which_template_is_saved(tokenizer, tmp_path, tiny_opt):
    own = AutoTokenizer.from_pretrained(tiny_opt)
    own.chat_template = "{{ messages[0]['content'] }}"
    given = tmp_path / "mine.jinja"
    given.write_text("{{ messages }}")
    assert chat_template("auto", own) is None, "the tokenizer's own stays"
    assert chat_template("none", tokenizer) is None
    assert chat_template(str(given), own) == "{{ messages }}"
    form = human_assistant_template(tokenizer, tokenizer.eos_token)
    assert chat_template("auto", tokenizer) == form
    assert chat_template("human_assistant", own) == form


def test_tokenizer_that_reads_a_template_in_another_way_gets_none(tokenizer, monkeypatch, capsys):
    rendered = type(tokenizer).apply_chat_template
    monkeypatch.setattr(
        type(tokenizer), "apply_chat_template",
        lambda *given, **named: {"input_ids": [5, *rendered(*given, **named)["input_ids"]]},
    )  # fmt: skip
    assert chat_template("auto", tokenizer) is None
    assert "Chat template: none is saved" in capsys.readouterr().out


def test_card(saved):
    card = (saved / "README.md").read_text(encoding="utf-8")
    header = ModelCard(card).data.to_dict()
    assert header == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["sft"]}
    records = [json.loads(line) for line in (saved / "metrics.jsonl").read_text().splitlines()]
    figures = {record["step"]: record["perplexity"] for record in records if "perplexity" in record}
    best = min(figures, key=figures.get)
    assert f"| 0 | {figures[0]:.4g} |" in card and f"| {best} | {figures[best]:.4g} |" in card
    assert "![training and evaluation loss over the optimizer steps](loss.png)" in card
    assert "| `learning_rate` | 0.001 |" in card and "| `lora_dim` | 2 |" in card
    assert "| `packing` | False |" in card and "(given:" not in card, "only what was decided otherwise shows both"
    assert (saved / "loss.png").is_file()


def test_header_names_what_the_hub_knows():
    sources = ["Dahoas/rm-static", "/no/such/folder", "mkqa-Chinese"]
    header = ModelCard(card_header("facebook/opt-125m", sources)).data.to_dict()
    assert header["base_model"] == "facebook/opt-125m" and header["datasets"] == ["Dahoas/rm-static"]
    assert "license" not in header
