"""Real data load without a flag, and conversations become the ids that their tokenizer's own template gives."""

import gzip
import json

import pytest
from conftest import SHARED, needs_shared

from tests.data.prepared_data import prepare
from tests.data.template_kinds import parts_of, tokenizer_of
from tests.data.test_own_formats import open_own, write
from utils.model.tokenizer import load_hf_tokenizer

LARGE = SHARED / "large"
TALKS = LARGE / "medicalgpt.sharegpt_zh_1K.jsonl.gz"
SPEAKERS = {"human": "user", "gpt": "assistant"}
# Turns of one word and of many lines, white space at every border, other scripts, words that look like markers.
SMALL = [
    [("human", "Hi"), ("gpt", "Hello.")],
    [("human", " Two\n\nlines \n"), ("gpt", "\n one \n"), ("human", "天气 🇩🇪"), ("gpt", "e\u0301 שלום")],
    [("human", "x " * 300), ("gpt", "y\n" * 200), ("human", "What does </s> mean?"), ("gpt", "The end; <s> begins.")],
    [("human", "first"), ("gpt", "one"), ("human", "left out")],
    [("human" if place % 2 == 0 else "gpt", f"turn {place}") for place in range(60)],
]


def own_ids(turns: list[dict], tokenizer) -> list[int]:
    """What transformers makes of a conversation up to its last answer: ended by one end token."""
    messages = [{"role": SPEAKERS[turn["from"]], "content": turn["value"]} for turn in turns]
    while messages and (messages[-1]["role"] == "user" or not messages[-1]["content"].strip()):
        messages.pop()
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    end, bare = tokenizer.eos_token_id, list(ids)
    while not tokenizer.decode(bare[-1:]).strip():
        bare.pop()
    return bare if bare[-1] == end else [*ids, end]


def assert_ids(path, cache, rows: list[list[dict]], kind: str, folder: str = "") -> None:
    tokenizer = tokenizer_of(kind, folder)
    parts = parts_of(path, cache, kind, 1_000_000, folder, completion_only=kind == "qwen")  # the same ids either way
    found = [ids for part in parts for ids in part.table.with_format(None)["input_ids"]]
    assert sorted(found) == sorted(own_ids(row, tokenizer) for row in rows)


@pytest.mark.parametrize("kind", ["qwen", "llama", "gemma"])
def test_ids_are_those_of_the_template(tmp_path, kind):
    rows = [[{"from": who, "value": said} for who, said in talk] for talk in SMALL]
    path = write(tmp_path / "t.jsonl", [{"conversations": row} for row in rows])
    assert_ids(path, tmp_path / "cache", rows, kind)


@needs_shared
@pytest.mark.parametrize(("kind", "name"), [("qwen", "gpt2"), ("llama", "gpt-neox-20b"), ("gemma", "opt-350m")])
def test_ids_are_those_of_the_template_on_every_real_row(tmp_path, kind, name):
    """All but the one conversation of a thousand that holds no answer; up to 330 turns in one."""
    with gzip.open(TALKS, "rt", encoding="utf-8") as file:
        rows = [json.loads(line)["conversations"] for line in file]
    rows = [row for row in rows if any(turn["from"] == "gpt" and turn["value"].strip() for turn in row)]
    assert len(rows) == 999
    assert_ids(TALKS, tmp_path, rows, kind, str(SHARED / "tokenizers" / name))


# File: what is recognized, rows for training and evaluation, and how many of them are dropped.
COUNTS = {
    TALKS.name: ("conversations", 900, 1, 100, 0),
    "gsm8k.test.jsonl.gz": ("question, answer", 1187, 0, 132, 0),
    "hc3-en.open_qa.jsonl.gz": ("question, human_answers", 1068, 0, 119, 0),
}


@needs_shared
@pytest.mark.parametrize("name", COUNTS)
def test_real_files_load_without_a_flag(tmp_path, name, capsys):
    columns, train, train_dropped, evaluation, dropped = COUNTS[name]
    both = prepare([LARGE / name], tmp_path, load_hf_tokenizer(str(SHARED / "tokenizers" / "opt-350m")), 512)
    printed = capsys.readouterr().out
    assert (
        f"Data {LARGE / name}: {columns}; texts: the Human/Assistant form; evaluation: a tenth of the rows" in printed
    )
    assert ("not used: chatgpt_answers\n" in printed) == ("hc3" in name)
    assert [len(data) for data in both] == [train - train_dropped, evaluation - dropped]
    assert f"{train} of {train} training rows are for this phase" in printed
    assert printed.count(" dropped (") == (train_dropped > 0) + (dropped > 0)


@needs_shared
def test_alpaca_loads_without_a_flag(tmp_path):
    """52,002 rows, of which 28 have a blank answer; a task with an input has it below."""
    raw = open_own(LARGE / "alpaca_data.json.gz", tmp_path)
    texts = [raw.get_prompt_and_chosen(row) for row in raw.raw_datasets["train"].dataset]
    assert len(texts) == 52_002 and texts.count(None) == 28
    assert (len(raw.get_train_data()), len(raw.get_eval_data())) == (46_802, 5_200)
    assert raw.describe().startswith(f"Data {raw.source}: instruction, output, input; texts: ")
    with gzip.open(LARGE / "alpaca_data.json.gz", "rt", encoding="utf-8") as file:
        row = next(row for row in json.load(file) if row["input"])
    assert f" Human: {row['instruction']}\n{row['input']} Assistant: {row['output']}" in texts
