"""Labels on the response alone: the same ids, the boundary where the response begins."""

import json

import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer

from tests.data.prepared_data import prepare
from tests.data.test_chat_format import labelled
from utils.data.batching.collate import collate_free, collate_padded


def build(folder, records, max_seq_len=64, completion_only=True):
    data = folder / "local" / "jsonfile"
    data.mkdir(parents=True, exist_ok=True)
    for name in ("train", "eval"):
        (data / f"{name}.json").write_text(json.dumps(records))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt")
    train, _ = prepare([data], folder / "cache", tokenizer, max_seq_len, completion_only=completion_only)
    return tokenizer, train


RECORDS = [
    {"prompt": "Human: What is the capital of France? Assistant:", "chosen": "The capital of France is Paris."},
    {"prompt": "Human: Say it in Chinese. Assistant:", "chosen": "巴黎是法国的首都。"},
    {"prompt": "Human: One word? Assistant:", "chosen": "Yes"},
]


def test_only_the_response_and_the_end_are_labelled(tmp_path):
    tokenizer, only = build(tmp_path / "a", RECORDS)
    _, everything = build(tmp_path / "b", RECORDS, completion_only=False)
    assert len(only) == 3
    responses = set()
    for index in range(3):
        ids, labels = only[index]["input_ids"], only[index]["labels"]
        assert torch.equal(ids, everything[index]["input_ids"])  # the boundary is not allowed to change an id
        labelled = labels != -100
        first = int(labelled.nonzero()[0])
        assert labelled[first:].all() and torch.equal(labels[first:], ids[first:])
        responses.add(tokenizer.decode(ids[first:]))
        assert tokenizer.decode(ids[:first]).endswith("Assistant:")
        assert everything.label_counts()[index] == len(ids) - 1
        assert only.label_counts()[index] == labelled.sum()
    assert responses == {f" {record['chosen']}</s>" for record in RECORDS}


@pytest.mark.parametrize("collate", [collate_free, lambda samples: collate_padded(samples, 1, 64)])
def test_layouts_agree_on_the_labels(tmp_path, collate):
    _, only = build(tmp_path, RECORDS)
    batch = collate([only[index] for index in range(3)])
    assert len(batch["targets"]) == only.label_counts().sum()
    flat = batch["input_ids"].flatten()
    # Every position predicts the token after it.
    assert torch.equal(flat[batch["positions"] + 1], batch["targets"])


def test_a_prompt_longer_than_max_seq_len_leaves_no_label_and_is_counted(tmp_path, capsys):
    records = [*RECORDS, {"prompt": "Human: " + "very " * 100 + "long? Assistant:", "chosen": "No."}]
    _, only = build(tmp_path, records)
    assert len(only) == 3
    assert "1 dropped (1 answer cut off entirely by --max_seq_len)" in capsys.readouterr().out
    assert (only.label_counts() > 0).all()


def test_an_empty_evaluation_part_has_the_same_columns(tmp_path):
    """Half of one row is none: the part is empty, and still says where responses would begin."""
    data = tmp_path / "local" / "jsonfile"
    data.mkdir(parents=True)
    (data / "train.json").write_text(json.dumps(RECORDS))
    (data / "eval.json").write_text(json.dumps(RECORDS[:1]))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt")
    train, evaluation = prepare([data], tmp_path / "cache", tokenizer, 64, "4,6,0", completion_only=True)
    assert len(evaluation) == 0 and len(evaluation.label_counts()) == 0
    assert evaluation.table.column_names == train.table.column_names


def test_an_end_token_of_the_tokenizers_own_is_no_part_of_an_earlier_answer(tmp_path):
    """Some tokenizers append eos to every text; it stands nowhere in the text, and must not stretch a label to it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt")
    eos = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"$A {eos[0]}", special_tokens=[eos])
    talk = [("user", "one two"), ("assistant", "three"), ("user", "four five six"), ("assistant", "seven")]
    row = {"messages": [{"role": role, "content": words} for role, words in talk]}
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    train, _ = prepare([path], tmp_path / "cache", tokenizer, 64, completion_only=True)
    runs = labelled(train[0], tokenizer)
    assert [words.split()[0].removesuffix(eos[0]) for words in runs] == ["three", "seven"]
    assert train[0]["input_ids"].tolist().count(eos[1]) == 1 and runs[1].endswith(eos[0])
    assert "four" not in "".join(runs)
