"""Conversations from every shape and file format: the same ids and labels, and nothing left out without a word."""

import json

import datasets
import pytest
from conftest import ROOT
from transformers import AutoTokenizer

from tests.data.prepared_data import prepare
from tests.data.test_chat_format import labelled
from tests.data.test_own_formats import open_own, write
from utils.data.formats.custom import OwnFormatDataset
from utils.errors import UserError

# As Qwen's: tools, calls, reasoning of the last answer alone.
CALLS = (
    "{% if tools %}{{ '<|im_start|>system\nTools:' }}{% for t in tools %}{{ '\n' + (t | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if loop.last and m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}"
    '{{ \'<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' + (c.function.arguments | tojson) + \'}'
    "\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"town": {"type": "string"}}}}}


def call(number: int, as_text: bool = False) -> dict:
    arguments = {"town": f"town {number}"} if number % 2 else {"place": f"place {number}", "day": 3}
    arguments = json.dumps(arguments) if as_text else arguments
    return {"id": f"call{number}", "type": "function", "function": {"name": "weather", "arguments": arguments}}


def talk(number: int, as_text: bool = False, **called) -> list[dict]:
    return [
        {"role": "user", "content": f"Weather in {number}?"},
        {"role": "assistant", "tool_calls": [call(number, as_text)], **called},
        {"role": "tool", "content": f"{number} degrees", "tool_call_id": f"call{number}"},
        {"role": "assistant", "content": f"It is {number}."},
    ]


@pytest.fixture(scope="module")
def tokenizer():
    made = AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CALLS
    return made


def samples(path, tmp_path, tokenizer, **changes):
    settings = {"completion_only": True, **changes}
    train = prepare([path], tmp_path / "cache", tokenizer, 512, **settings)[0]
    found = [(train[i]["input_ids"].tolist(), labelled(train[i], tokenizer)) for i in range(len(train))]
    return sorted(found)


def rows_of(make, count=4) -> list[dict]:
    return [{"messages": make(number), "tools": [TOOL], "id": number} for number in range(count)]


@pytest.mark.parametrize("name", ["t.json", "t.jsonl", "t.jsonl.gz", "t.parquet", "t.csv", "saved"])
def test_every_file_format_gives_the_same_ids_and_labels(tmp_path, tokenizer, name, capsys):
    rows = rows_of(lambda number: talk(number, content=""), 12)
    wanted = samples(write(tmp_path / "a" / "w.jsonl", rows), tmp_path, tokenizer)
    expected = {
        tuple(tokenizer.apply_chat_template(row["messages"], tools=[TOOL], return_dict=True)["input_ids"])
        for row in rows
    }
    assert {tuple(ids[: len(ids) - (ids[-1] == 2)]) for ids, _ in wanted} <= expected
    assert "not used: id" in capsys.readouterr().out
    if name.endswith(".csv"):
        rows = [{key: json.dumps(value) for key, value in row.items()} for row in rows]
    assert samples(write(tmp_path / "b" / name, rows), tmp_path, tokenizer) == wanted
    call_text, answer = wanted[0][1]
    assert call_text.startswith('<tool_call>\n{"name": "weather", "arguments": {')
    assert call_text.endswith("}\n</tool_call><|im_end|>") and answer.endswith(".<|im_end|>\n</s>")


@pytest.mark.parametrize("changes", [{"content": None}, {}, {"content": "", "as_text": True}])
def test_forms_of_a_call(tmp_path, tokenizer, changes):
    """Content null, missing or blank; arguments as an object or as JSON text."""
    wanted = samples(write(tmp_path / "w.jsonl", rows_of(lambda n: talk(n, content=""))), tmp_path, tokenizer)
    rows = rows_of(lambda number: talk(number, **changes))
    assert samples(write(tmp_path / "t.jsonl", rows), tmp_path, tokenizer) == wanted


def test_a_conversation_may_end_in_a_call(tmp_path, tokenizer):
    rows = rows_of(lambda number: talk(number, content=None)[:2])
    for name in ("t.jsonl", "t.parquet"):
        for _, labels in samples(write(tmp_path / name, rows), tmp_path, tokenizer):
            assert len(labels) == 1 and labels[0].startswith("<tool_call>") and labels[0].endswith("<|im_end|>\n</s>")


def test_sharegpt_is_the_same_conversation(tmp_path, tokenizer):
    wanted = samples(write(tmp_path / "w.jsonl", rows_of(lambda n: talk(n, content=""))), tmp_path, tokenizer)
    rows = []
    for number in range(4):
        named = [("human", f"Weather in {number}?"), ("function_call", json.dumps(call(number)["function"]))]
        named += [("observation", f"{number} degrees"), ("gpt", f"It is {number}.")]
        turns = [{"from": who, "value": said} for who, said in named]
        rows.append({"conversations": turns, "tools": json.dumps([TOOL])})
    assert samples(write(tmp_path / "t.jsonl", rows), tmp_path, tokenizer) == wanted


Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM, B = {"role": "system", "content": "s"}, {"role": "assistant", "content": "b"}
PLAIN = " Human: q Assistant: a"


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, PLAIN),
        ({"question": "q", "answer": "a"}, PLAIN),
        ({"question": "q", "human_answers": ["a", "other"], "index": 1}, PLAIN),
        ({"instruction": "q", "context": "", "response": "a", "category": "x"}, PLAIN),
        ({"instruction": "q", "context": "c", "response": "a"}, " Human: q\nc Assistant: a"),
        ({"instruction": "", "input": "q", "output": "a"}, PLAIN),
        ({"prompt": [Q], "completion": [A]}, PLAIN),
        ({"prompt": [Q], "chosen": [A], "rejected": [B]}, PLAIN),
        ({"chosen": [Q, A], "rejected": [Q, B]}, PLAIN),
        ({"prompt": "q", "chosen": [Q, A], "rejected": [Q, B]}, PLAIN),
        ({"messages": [{"role": who, "content": [{"type": "text", "text": text}]}
                       for who, text in (("user", "q"), ("assistant", "a"))]}, PLAIN),
        ({"messages": [{"role": "developer", "content": "s"}, Q, A]}, " System: s" + PLAIN),
        ({"messages": [Q, A], "system": "s"}, " System: s" + PLAIN),
        ({"messages": [SYSTEM, Q, A], "system": "s"}, " System: s" + PLAIN),
        ({"messages": [Q, A, Q, {"role": "assistant", "content": " "}]}, PLAIN),
        ({"instruction": "q", "output": "a", "system": "s", "history": [["x", "y"]]},
         " System: s Human: x Assistant: y" + PLAIN),
        ({"prompt": "q", "response": "a", "system": "s"}, " System: s" + PLAIN),
        ({"text": "### Human: q\n### Assistant: a"}, "### Human: q\n### Assistant: a"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])
def test_formats_people_bring(tmp_path, row, text, name):
    raw = open_own(write(tmp_path / name, [row, row]), tmp_path)
    sample = raw.raw_datasets["train"].dataset[0]
    assert raw.get_prompt_and_chosen(sample) == text
    if "rejected" in row:
        assert raw.get_prompt_and_rejected(sample) == " Human: q Assistant: b"


def test_whole_texts_are_labelled_whole(tmp_path, tokenizer):
    for only in (True, False):
        ids, labels = samples(write(tmp_path / "t.jsonl", [{"text": f"t {i}"} for i in range(2)]), tmp_path, tokenizer,
                              completion_only=only)[0]  # fmt: skip
        assert ids[0] == ids[-1] == 2 and labels == [tokenizer.decode(ids[1:])]


def test_token_ids_are_used_as_given(tmp_path, tokenizer):
    row = {"input_ids": [2, 10, 11, 12, 13], "labels": [-100, -100, 11, -100, 13]}
    path = write(tmp_path / "t.parquet", [row, row])
    ids, labels = samples(path, tmp_path, tokenizer)[0]
    assert ids == row["input_ids"] and labels == [tokenizer.decode([11]), tokenizer.decode([13])]
    with pytest.raises(UserError, match=r"record 1.*--completion_only_loss"):
        samples(path, tmp_path, tokenizer, completion_only=False)
    with pytest.raises(UserError, match="ids that this tokenizer does not have"):
        samples(write(tmp_path / "u.jsonl", [{"input_ids": [1, 10**6]}] * 2), tmp_path, tokenizer)
    with pytest.raises(UserError, match="own input_ids"):
        samples(write(tmp_path / "v.jsonl", [{"input_ids": [1, 2], "labels": [1, 5]}] * 2), tmp_path, tokenizer)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_an_answer_that_is_not_to_be_learned(tmp_path, tokenizer, mark):
    row = [Q, A | mark, Q, {"role": "assistant", "content": "last"}]
    for name in ("t.jsonl", "t.parquet"):
        path = write(tmp_path / name, [{"messages": row}] * 2)
        assert samples(path, tmp_path, tokenizer)[0][1] == ["last<|im_end|>\n</s>"]
        with pytest.raises(UserError, match=r"record 1: message 2 has (weight 0|train False).*--completion_only_loss"):
            samples(path, tmp_path, tokenizer, completion_only=False)


def test_blank_answers_in_the_middle_are_not_labelled(tmp_path, tokenizer, capsys):
    rows = [{"messages": [Q, A | {"content": ""}, Q, A]}] * 2
    assert samples(write(tmp_path / "t.jsonl", rows), tmp_path, tokenizer)[0][1] == ["a<|im_end|>\n</s>"]
    assert "2 of 2 rows have a blank answer before the last" in capsys.readouterr().out


def test_what_is_left_out_is_said(tmp_path, tokenizer, capsys):
    thought = {"reasoning_content": "because", "name": "bot"}
    rows = [{"messages": [Q, A | thought, Q, A | thought], "source": "x"}] * 3
    _, labels = samples(write(tmp_path / "t.jsonl", rows), tmp_path, tokenizer)[0]
    assert labels == ["a<|im_end|>", "<think>\nbecause\n</think>\n\na<|im_end|>\n</s>"]
    assert "not used: source, name of assistant turns\n" in capsys.readouterr().out


def test_streams_give_the_same_texts(tmp_path):
    rows = rows_of(lambda number: talk(number, content=""), 3)
    path = write(tmp_path / "t.parquet", rows)

    stream = OwnFormatDataset(str(tmp_path / "cache"), 1, 0, str(path), streaming=True)
    talks = [stream.conversation(row) for row in stream.raw_datasets["train"].dataset]
    assert [found.messages[1]["tool_calls"] for found in talks] == [[call(number)] for number in range(3)]
    assert talks[0].tools == [TOOL]


def test_saved_folders_fill_no_nulls_in(tmp_path):
    rows = rows_of(lambda number: talk(number, content=""), 2)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    raw = open_own(tmp_path / "saved", tmp_path)
    talks = [raw.conversation(row) for row in raw.raw_datasets["train"].dataset]
    assert [found.messages for found in talks] == [row["messages"] for row in rows]
