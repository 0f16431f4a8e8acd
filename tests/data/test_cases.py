"""Data as users bring them, case by case: what is trained, what is labelled, and what is said or refused.

The cases are small rows of each kind that people reported losses with. Where a folder of real files of these kinds
lies beside the repository, every one of its files is tried too.
"""

import csv
import json
import re
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from conftest import SHARED, needs_shared

from tests.data.template_kinds import samples_of, tokenizer_of
from tests.data.test_own_formats import open_own, write
from utils.errors import UserError

END = "<|im_end|>"
OPEN = {
    "type": "function",
    "function": {"name": "open_door", "parameters": {"properties": {"door": {"type": "string"}}}},
}
ASK, SAY = {"role": "user", "content": "Open the red door."}, {"role": "assistant", "content": "It is open."}
AGAIN, LAST = {"role": "user", "content": "And the blue one?"}, {"role": "assistant", "content": "Locked."}
DONE = {"role": "tool", "tool_call_id": "c1", "content": "ok"}
CALLED = '<tool_call>\n{"name": "open_door", "arguments": {"door": "red"}}\n</tool_call>'


def call(arguments=None, **more) -> dict:
    function = {"name": "open_door", "arguments": {"door": "red"} if arguments is None else arguments}
    return {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": function}], **more}


def thinking(thought: str, said: str) -> dict:
    return {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{said}"}


def turns(*said: str, names=("human", "gpt")) -> list[dict]:
    return [{"from": names[place % 2], "value": text} for place, text in enumerate(said)]


def talk(*messages: dict, **columns) -> dict:
    return {"messages": list(messages), **columns}


PAIR, TOOLS = [SAY["content"] + END], ["# Tools"]
BOTH = [SAY["content"] + END, LAST["content"] + END]
# Several code points a character, both directions of writing, half a special token, and what the search itself uses.
MARKS = ("👩‍👩‍👧‍👦", "🇩🇪", "e\u0301", "שלום", "天气", "\0", "<|im_end|", "\u202eabc", "xq0qx", "</think")

# Name, a row, what is labelled in it, and words that its text must hold beside that.
CASES = [
    ("ShareGPT", {"conversations": turns(*(m["content"] for m in (ASK, SAY, AGAIN, LAST)))}, BOTH, [AGAIN["content"]]),
    ("ShareGPT's system", {"conversations": [{"from": "system", "value": "Be brief."}, *turns("q", "a")]},
     ["a" + END], ["<|im_start|>system\nBe brief."]),
    ("ShareGPT's system in a column", {"conversations": turns("q", "a"), "system": "Be brief."}, ["a" + END],
     ["<|im_start|>system\nBe brief."]),
    ("ShareGPT's calls", {"conversations": [*turns("q"), {"from": "function_call", "value": json.dumps(
        {"name": "open_door", "arguments": {"door": "red"}})}, {"from": "observation", "value": "ok"},
        {"from": "gpt", "value": "a"}], "tools": json.dumps([OPEN])}, [CALLED + END, "a" + END],
     ["# Tools", "<tool_response>\nok"]),
    ("ShareGPT's other speakers", {"conversations": turns("q", "a", names=("user", "assistant"))}, ["a" + END], ["q"]),
    ("a call, content blank", talk(ASK, call(content=""), DONE, SAY, tools=[OPEN]), [CALLED + END, *PAIR],
     ["# Tools", '"name": "open_door", "parameters"', "<tool_response>\nok"]),
    ("a call, content null", talk(ASK, call(content=None), DONE, SAY, tools=[OPEN]), [CALLED + END, *PAIR], TOOLS),
    ("a call without it", talk(ASK, call(), DONE, SAY, tools=[OPEN]), [CALLED + END, *PAIR], TOOLS),
    ("a call as the end", talk(ASK, call(content=None), tools=[OPEN]), [CALLED + END], ["# Tools"]),
    ("words and a call", talk(ASK, call(content="Wait."), tools=[OPEN]), ["Wait.\n" + CALLED + END], []),
    ("arguments as JSON text", talk(ASK, call('{"door": "red"}'), tools=json.dumps([OPEN])), [CALLED + END], TOOLS),
    ("OpenAI's first calls", talk(ASK, {"role": "assistant", "content": None, "function_call": {
        "name": "open_door", "arguments": '{"door": "red"}'}}, {"role": "function", "name": "open", "content": "ok"},
        SAY), [CALLED + END, *PAIR], ["<tool_response>\nok"]),
    ("no calls", talk(ASK, SAY | {"tool_calls": []}, tools=[]), PAIR, []),
    ("weight 0", talk(ASK, SAY | {"weight": 0}, AGAIN, LAST | {"weight": 1}), BOTH[1:], [SAY["content"]]),
    ("weight 0.0", talk(ASK, SAY | {"weight": 0.0}, AGAIN, LAST), [LAST["content"] + END], [SAY["content"]]),
    ("train false", talk(ASK, SAY | {"train": False}, AGAIN, LAST), [LAST["content"] + END], [SAY["content"]]),
    ("weight null", talk(ASK, SAY | {"weight": None}, AGAIN, LAST), BOTH, []),
    ("Alpaca", {"instruction": "Sum.", "input": "2, 3", "output": "5"}, ["5" + END], ["user\nSum.\n2, 3<|im_end|>"]),
    ("Alpaca's system and history", {"instruction": "q", "input": "", "output": "a", "system": "Be brief.",
                                     "history": [["Hello", "Good day"]]}, ["Good day" + END, "a" + END],
     ["<|im_start|>system\nBe brief.", "Hello"]),
    ("history null", {"instruction": "q", "input": None, "output": "a", "system": None, "history": None},
     ["a" + END], ["user\nq<|im_end|>"]),
    ("history as messages", {"instruction": "q", "output": "a", "history": [ASK, SAY]}, [*PAIR, "a" + END],
     [ASK["content"]]),
    ("a system beside a pair", {"system": "Be brief.", "prompt": "q", "response": "a"}, ["a" + END],
     ["<|im_start|>system\nBe brief."]),
    ("parts of text", talk(
        {"role": "user", "content": [{"type": "text", "text": "q1 "}, {"type": "text", "text": "q2"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]}), ["a" + END], ["user\nq1 q2<|im_end|>"]),
    ("reasoning beside", talk(ASK, SAY | {"reasoning_content": "Doors open."}),
     ["<think>\nDoors open.\n</think>\n\n" + PAIR[0]], []),
    ("reasoning inside", talk(ASK, thinking("Doors.", "Yes.")), ["<think>\nDoors.\n</think>\n\nYes." + END], []),
    ("reasoning of several turns", talk(ASK, thinking("One.", "Yes."), AGAIN, thinking("Two.", "No.")),
     ["Yes." + END, "<think>\nTwo.\n</think>\n\nNo." + END], []),
    ("a blank answer at the end", talk(ASK, SAY, AGAIN, LAST | {"content": " \n"}), PAIR, []),
    ("an empty answer at the end", talk(ASK, SAY, AGAIN, LAST | {"content": ""}), PAIR, []),
    ("a blank answer in the middle", talk(ASK, SAY | {"content": ""}, AGAIN, LAST), [LAST["content"] + END],
     [AGAIN["content"]]),
    ("a blank instruction", {"instruction": " ", "input": "q", "output": "a"}, ["a" + END], ["user\nq<|im_end|>"]),
    ("a null instruction", {"instruction": None, "input": "q", "output": "a"}, ["a" + END], ["user\nq<|im_end|>"]),
    ("developer", talk({"role": "developer", "content": "Be brief."}, ASK, SAY), PAIR, ["system\nBe brief."]),
    ("a user turn at the end", talk(ASK, SAY, AGAIN), PAIR, []),
    ("two user turns", talk(AGAIN, ASK, SAY), PAIR, [AGAIN["content"]]),
    ("lists of messages", {"prompt": [ASK, SAY, AGAIN], "completion": [LAST]}, BOTH, [AGAIN["content"]]),
    ("chosen as messages", {"prompt": [ASK], "chosen": [SAY], "rejected": [LAST]}, PAIR, []),
    ("whole chosen and rejected", {"chosen": [ASK, SAY], "rejected": [ASK, LAST]}, PAIR, [ASK["content"]]),
    ("Dolly", {"instruction": "q", "context": "c", "response": "a", "category": "x"}, ["a" + END],
     ["user\nq\nc<|im_end|>"]),
    ("question and answers", {"question": "q", "answers": ["a", "b"]}, ["a" + END], ["user\nq<|im_end|>"]),
    ("white space at borders", talk(ASK | {"content": "  x  "}, SAY | {"content": "\n\nlist:\n- a\n"}),
     ["\n\nlist:\n- a\n" + END], []),
    *((f"borders {mark!a}", talk(ASK | {"content": f"{mark} q {mark}"}, SAY | {"content": f"{mark} a {mark}"}, AGAIN,
       LAST | {"content": mark}), [f"{mark} a {mark}{END}", mark + END], []) for mark in MARKS),
]  # fmt: skip

# Arrow has one type a column, and no file of it holds these beside the others.
NOT_BESIDE_OTHERS = {"parts of text", "arguments as JSON text", "history as messages"}


@pytest.mark.parametrize(("row", "labels", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_is_labelled(tmp_path, row, labels, words):
    sample, other = samples_of(write(tmp_path / "t.jsonl", [row, row]), tmp_path / "cache")
    assert sample == other and sample.labels == labels
    assert all(word in sample.text for word in words), sample.text


@pytest.mark.parametrize("name", ["t.parquet", "saved"])
def test_the_same_rows_together_where_arrow_fills_in_nulls(tmp_path, name):
    """One file of all cases with the same columns: each message gets every field that any message has."""
    by_columns: dict[frozenset, list] = {}
    for case, row, labels, _ in CASES:
        if case not in NOT_BESIDE_OTHERS:
            by_columns.setdefault(frozenset(row), []).append((row, labels))
    assert max(map(len, by_columns.values())) > 20
    for number, cases in enumerate(by_columns.values()):
        path = write(tmp_path / str(number) / name, [row for row, _ in cases])
        samples = samples_of(path, tmp_path / "cache")
        assert sorted(sample.labels for sample in samples) == sorted(labels for _, labels in cases)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])
def test_templates_with_a_date_with_bos_and_with_another_role(tmp_path, kind, name):
    """The ids are the template's own, with one BOS; the labels are the answers."""
    row = talk(ASK, SAY, AGAIN, LAST)
    sample, _ = samples_of(write(tmp_path / name, [row, row]), tmp_path / "cache", kind, date="2024-07-26")
    tokenizer = tokenizer_of(kind)
    assert sample.ids.count(tokenizer.bos_token_id) == 1 and sample.ids[0] == tokenizer.bos_token_id
    closing = {"llama": ["<|eot_id|>", "<|eot_id|>"], "gemma": ["<end_of_turn>", "<end_of_turn>\n<eos>"]}[kind]
    assert sample.labels == [SAY["content"] + closing[0], LAST["content"] + closing[1]]
    assert ("26 Jul 2024" in sample.text) == (kind == "llama")


REFUSED = [
    ("gemma", talk({"role": "system", "content": "Be brief."}, ASK, SAY), "record 1.*System role not supported"),
    ("gemma", talk(AGAIN, ASK, SAY), "record 1.*must alternate"),
    ("llama", talk(ASK, call() | {"tool_calls": 2 * call()["tool_calls"]}, DONE, SAY), "record 1.*one call"),
    ("qwen", talk(ASK, SAY | {"weight": 2}), r"record 1.*messages\[1\].weight. is 2: it must be 0 or 1"),
    ("qwen", talk(ASK | {"content": [{"type": "image_url", "image_url": "x"}]}, SAY), "record 1.*of type 'image_url'"),
    ("qwen", talk(ASK | {"content": None}, SAY), r"record 1.*messages\[0\].content. is null"),
    ("qwen", talk(ASK, {"role": "robot", "content": "a"}), r"record 1.*messages\[1\].role. is 'robot'"),
    ("qwen", talk(ASK, call() | {"tool_calls": [{"id": "c1"}]}), r"record 1.*tool_calls\[0\]. is no call"),
    ("qwen", talk(ASK, SAY, tools="door"), "no list of functions"),
    ("qwen", {"chosen": "Human: q Assistant: a"}, "record 1.*no prompt beside it.*--columns text=chosen"),
    ("qwen", {"prompt": "q", "response": "a", "history": [["x"]]}, "no earlier turn"),
    ("qwen", talk({"role": "system", "content": "x"}, ASK, SAY, system="y"), "hold different texts"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "row", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_what_is_refused(tmp_path, kind, row, words):
    with pytest.raises(UserError, match=re.compile(words, re.DOTALL)):
        samples_of(write(tmp_path / "t.jsonl", [row, row]), tmp_path / "cache", kind)


# -------------------------------------------------------------------------------- every file beside the repository

FOLDER = SHARED.parent / "cases" / "data"
# What is refused, and how the message leads on.
BAD_FILES = {
    "10_blank_turns/none_at_all.jsonl": r"record 20 \(line 20\): .messages. holds no message",
    "14_json_shapes/field.json": r"the records are in its field .data.: write that list alone",
    "14_json_shapes/utf16.jsonl": "UTF-16 .*save it as UTF-8",
    "15_csv/dup.csv": "two columns of the same name .*response, response",
    "15_csv/latin1.csv": r"not UTF-8 text.*line 2.*save it as UTF-8",
    "15_csv/semicolon.csv": "separated by ';', not by commas",
    "36_small/ev/train.jsonl": "does not begin with a list or an object",  # the path that it once was a link to
}


def shared_files() -> list[str]:
    kinds = (".json", ".jsonl", ".csv", ".parquet")
    found = [str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.name.endswith(kinds)]
    found = [name for name in found if not Path(name).name.startswith(("dataset_info", "state"))]
    return sorted([*found, "23_null_field/saved"]) if FOLDER.is_dir() else []


def rows_in(path: Path) -> list[dict]:
    """The rows of a file, read in the simplest way there is."""
    if path.is_dir():
        return datasets.load_from_disk(str(path)).to_list()
    if path.suffix == ".csv":
        with open(path, encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file, skipinitialspace=True))
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    lines = path.read_text("utf-8-sig").replace("\ufeff", "").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def answers_in(row: dict) -> list[str]:
    """What a template of Qwen's kind has the model write for a row."""
    talk = row.get("messages") or row.get("conversations")
    if isinstance(talk, str):
        talk = json.loads(talk)
    if "text" in row:
        tokenizer = tokenizer_of("qwen")  # without BOS, so nothing predicts the first token
        return [tokenizer.decode(tokenizer(row["text"])["input_ids"][1:]) + END]
    if talk is None:
        before = [answer + END for _, answer in row.get("history") or ()]
        last = next(row[name] for name in ("response", "completion", "output", "answer") if name in row)
        return [*before, (last if isinstance(last, str) else last[0]["content"]) + END]
    asked = max(place for place, one in enumerate(talk) if one.get("role", one.get("from")) in ("user", "human"))
    return [written(one, place > asked) + END for place, one in enumerate(talk) if is_learned(one)]


def is_learned(one: dict) -> bool:
    answers = one.get("role", one.get("from")) in ("assistant", "gpt") and one.get("weight") != 0
    return answers and bool(one.get("content") or one.get("value") or one.get("tool_calls"))


def written(one: dict, is_last: bool) -> str:
    content = one.get("content") or one.get("value") or ""
    content = "".join(part["text"] for part in content) if isinstance(content, list) else content
    if "</think>" in content and not is_last:
        content = content.split("</think>")[1].lstrip("\n")
    thought = f"<think>\n{one['reasoning_content']}\n</think>\n\n" if one.get("reasoning_content") else ""
    calls = [json.dumps(entry["function"]) for entry in one.get("tool_calls") or ()]
    return thought + "\n".join([*filter(None, [content]), *(f"<tool_call>\n{text}\n</tool_call>" for text in calls)])


@needs_shared
@pytest.mark.parametrize("name", shared_files())
def test_every_case_beside_the_repository(tmp_path, name):
    path = FOLDER / name
    if name in BAD_FILES:
        with pytest.raises(UserError, match=BAD_FILES[name]):
            samples_of(path, tmp_path)
        return
    samples, rows = samples_of(path, tmp_path), rows_in(path)
    assert len(samples) == len(rows)
    wanted = sorted(answers_in(row) for row in rows)
    assert sorted(sample.labels for sample in samples) == wanted
    assert all(word in "".join(sample.text for sample in samples) for row in rows for word in words_in(row))


def words_in(row: dict) -> list[str]:
    """What a row holds beside its answers, up to the last one."""
    talk = row.get("messages") or row.get("conversations")
    if isinstance(talk, list):
        last = max(place for place, one in enumerate(talk) if is_learned(one))
        row = {"messages": talk[:last]}
    names = "value|content|instruction|input|prompt|question|context|text|system"
    return [json.loads(f'"{text}"').strip() for text in re.findall(rf'"(?:{names})": "([^"\\<]+)', json.dumps(row))]


@needs_shared
@pytest.mark.parametrize("name", ["07_thinking/think_multi.jsonl", "11_roles/system.jsonl", "12_chat/chat.jsonl"])
def test_a_template_that_leaves_reasoning_and_system_turns_out(tmp_path, name):
    """It is said, and no reason to refuse: the answers are labelled as they are rendered."""
    template = str(FOLDER / "28_reason_strip" / "strip.jinja")
    samples = samples_of(FOLDER / name, tmp_path, chat_template=template)
    wanted = [[answer.split("</think>\n\n")[-1] for answer in answers_in(row)] for row in rows_in(FOLDER / name)]
    assert sorted([label.lstrip("\n") for label in sample.labels] for sample in samples) == sorted(wanted)
    chat = {"kind": "template", "template": Path(template).read_text(), "tokenizer": tokenizer_of("qwen")}
    raw = open_own(FOLDER / name, tmp_path, **chat)
    said = {"07": "leaves out reasoning (in 20 of 20 rows", "11": "leaves out system turns (in 20 of 20 rows", "12": ""}
    assert said[name[:2]] in raw.describe() and ("leaves out" in raw.describe()) == (name[:2] != "12")


@needs_shared
def test_rendered_prompts_keep_their_one_bos(tmp_path):
    """Texts of Llama's kind, rendered already, stay as they are."""
    path = FOLDER / "08_prerendered_bos" / "p.jsonl"
    wanted = {row["prompt"] + row["completion"] for row in rows_in(path)}
    assert {sample.text for sample in samples_of(path, tmp_path, "llama")} == wanted


@needs_shared
def test_shards_with_other_columns_and_copies_that_differ(tmp_path):
    """Both shards of a set are read with the columns of both; a copy that was cut off has other content."""
    samples = samples_of(FOLDER / "24_parquet_optional", tmp_path)
    assert len(samples) == 20 and sum("INPUT SEEN" in sample.text for sample in samples) == 10
    copies = [open_own(FOLDER / "34_two_nodes" / node / "train.jsonl", tmp_path) for node in ("nodeA", "nodeB")]
    assert copies[0].fingerprint("train") != copies[1].fingerprint("train")
    tried = {name.split("/")[0] for name in shared_files()} | {"28_reason_strip"}
    assert tried == {path.name for path in FOLDER.iterdir()}
