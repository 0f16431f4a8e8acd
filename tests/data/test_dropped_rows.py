"""Rows without a sample: each reason by its name and count, prepared and streamed; and what is said of other rows."""

import copy
import json

import pytest
from conftest import ROOT
from transformers import AutoTokenizer

from tests.data.prepared_data import SEED, prepare
from tests.data.test_chat_format import CHATML, THINKING, labelled
from tests.data.test_conversations import CALLS
from utils.data.formats.custom import own_options
from utils.data.open_sets import Preparation
from utils.data.streaming import create_prompt_stream
from utils.data.tokenization.tokenize_rows import SampleForm
from utils.errors import UserError

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
LONG = {"role": "user", "content": "word " * 200}
BLANK = {"role": "assistant", "content": " "}


@pytest.fixture(scope="module")
def tokenizer():
    made = AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CHATML
    return made


def write(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("train", rows), ("eval", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def talks(*rows):
    return [{"messages": list(row)} for row in rows]


def streamed(folder, tmp_path, tokenizer, size=100, **changes):
    sample = SampleForm(tokenizer, "</s>", 64, changes.pop("completion_only", True))
    own = own_options(tokenizer, sample.end_id)
    return create_prompt_stream([str(folder)], sample, own, Preparation(0, str(tmp_path / "s"), 1, SEED), size)


MIXED = [
    *talks([Q, A], [Q, A], [Q, BLANK], [Q], [Q, A | {"weight": 0}], [LONG, A]),
    {"messages": [LONG, A, Q, A]},
]
REASONS = (
    "5 dropped (2 no answer, 2 answer cut off entirely by --max_seq_len, 1 nothing to label)"
)  # fmt: skip


def test_reasons_are_told_apart(tmp_path, tokenizer, capsys):
    folder = write(tmp_path / "d", MIXED)
    train, _ = prepare([folder], tmp_path / "cache", tokenizer, 64, completion_only=True)
    out = capsys.readouterr().out
    assert len(train) == 2 and out.count(REASONS) == 2
    prepare([folder], tmp_path / "cache", tokenizer, 64, completion_only=True)
    assert out.splitlines()[-2:] == capsys.readouterr().out.splitlines()[-2:], "the cache has the same counts"
    stream, evaluation = streamed(folder, tmp_path, tokenizer)
    out = capsys.readouterr().out
    assert len(stream) == len(evaluation) == 2 and out.count(REASONS) == 2
    assert stream.table.column_names == train.table.column_names


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"text": "one"}, {"text": " \n"}, {"text": ""}], "2 dropped (2 blank text)"),
        ([{"prompt": "p", "response": "r"}, {"prompt": " ", "response": "r"}, {"prompt": "p", "response": ""}],
         "2 dropped (1 blank text, 1 no answer)"),
        ([{"prompt": "p", "chosen": [A]}, {"prompt": "p", "chosen": [BLANK]}], "1 dropped (1 no answer)"),
        ([{"input_ids": [1, 2, 3]}, {"input_ids": []}, {"input_ids": [4]},
          {"input_ids": [4, 5], "labels": [-100, -100]},
          {"input_ids": [5] * 70, "labels": [-100] * 64 + [5] * 6}],
         "4 dropped (1 blank text, 1 nothing to label, 1 answer cut off entirely by --max_seq_len, "
         "1 fewer than 2 tokens)"),
    ],
)  # fmt: skip
def test_reasons_of_every_format(tmp_path, tokenizer, rows, reason, capsys):
    train, _ = prepare([write(tmp_path / "d", rows)], tmp_path / "cache", tokenizer, 64, completion_only=True)
    assert len(train) == 1
    assert reason in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (talks([LONG, A])[0], ["18 answer cut off entirely by --max_seq_len", "Give a larger --max_seq_len"]),
        (talks([Q, A | {"train": False}])[0], ["18 nothing to label", "whose answers are to be learned"]),
        (talks([Q])[0], ["18 no answer", "--columns"]),
        ({"text": " "}, ["18 blank text", "--columns"]),
        ({"input_ids": [7]}, ["18 fewer than 2 tokens", "at least two tokens"]),
    ],
)
def test_nothing_left_names_the_true_reason(tmp_path, tokenizer, row, words):
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps(row) + "\n") * 20)
    with pytest.raises(UserError) as raised:
        prepare([path], tmp_path / "cache", tokenizer, 64, completion_only=True)
    folder = write(tmp_path / "d", [row] * 18)
    with pytest.raises(UserError) as of_stream:
        streamed(folder, tmp_path, tokenizer)
    for message in (str(raised.value), str(of_stream.value)):
        assert "all 18 training rows" in message and "share" not in message
        assert all(word in message for word in words), message


def test_blank_and_unanswered_turns_are_counted_over_all_rows(tmp_path, tokenizer, capsys):
    """Beyond the rows that are looked at before; a stream counts its windows."""
    rows = talks(*[[Q, A]] * 101, [Q, BLANK, Q, A], [Q, A, Q], [Q, A, Q, BLANK], [Q | {"content": ""}, A])
    folder = write(tmp_path / "d", rows)
    train, _ = prepare([folder], tmp_path / "cache", tokenizer, 64, completion_only=True)
    out = capsys.readouterr().out
    assert len(train) == 105 and "dropped" not in out
    assert "2 of 210 rows have a blank answer before the last" in out
    assert "4 of 210 rows have turns after the last answer: not used" in out
    assert "2 of 210 rows have a blank turn that is no answer" in out
    streamed(folder, tmp_path, tokenizer, size=200)
    out = capsys.readouterr().out
    assert "Stream window 1: 2 of 105 rows have turns after the last answer: not used" in out


UNSTABLE = CHATML.replace("m['content']", "(m['content'] | upper if loop.last else m['content'])")


def test_a_sample_for_each_answer_is_said(tmp_path, tokenizer, capsys):
    """Rows become more samples than rows, and the number of dropped ones stays right."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = UNSTABLE
    rows = talks(*[[Q, A, Q, A, Q, A]] * 3, [Q, BLANK], [LONG, A, Q, A])
    folder = write(tmp_path / "d", rows)
    train, _ = prepare([folder], tmp_path / "cache", tokenizer, 64, completion_only=True)
    out = capsys.readouterr().out
    assert len(train) == 9 and all(len(labelled(train[i], tokenizer)) == 1 for i in range(9))
    assert "Data train: 9 samples" in out
    assert "3 dropped (2 answer cut off entirely by --max_seq_len, 1 no answer)" in out
    assert "8 of 10 rows became 22 samples, one for each answer" in out
    streamed(folder, tmp_path, tokenizer)
    assert "Stream window 1: 4 of 5 rows became 11 samples, one for each answer" in capsys.readouterr().out


NO_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")


@pytest.mark.parametrize(
    ("template", "rows", "words"),
    [
        (CALLS, [[Q, A | {"reasoning_content": "why"}, Q, A], [Q, A]], "2 of 4 rows have reasoning"),
        (NO_SYSTEM, [[{"role": "system", "content": "Be brief."}, Q, A], [Q, A], [Q, A]],
         "2 of 6 rows have a system turn"),
        (THINKING, [[Q, A], [Q, A]], None),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_is_counted(tmp_path, template, rows, words, capsys):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt", chat_template=template)
    train, _ = prepare([write(tmp_path / "d", talks(*rows))], tmp_path / "c", tokenizer, 128, completion_only=True)
    out = capsys.readouterr().out
    assert len(train) == len(rows)
    assert (f"{words} that the chat template leaves out\n" in out) if words else ("leaves out" not in out)


def test_a_set_of_which_nothing_is_left_beside_another(tmp_path, tokenizer, capsys):
    good, bad = write(tmp_path / "good", talks([Q, A])), write(tmp_path / "bad", talks([Q]))
    train, _ = prepare([good, bad], tmp_path / "cache", tokenizer, 64)
    assert len(train) == 1
    out = capsys.readouterr().out
    assert f"Data {bad}: none of its 2 rows gave a sample (2 no answer)" in out
    assert out.count("gave a sample") == 1


def test_token_ids_without_labels_of_answers_alone(tmp_path, tokenizer):
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [5]}]
    train, _ = prepare([write(tmp_path / "d", rows)], tmp_path / "cache", tokenizer, 64)
    assert len(train) == 1 and train[0]["labels"].tolist() == [5, 6, 7]
