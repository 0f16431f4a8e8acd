"""Data as users bring them, case by case: what is trained, what is labelled, and what is said or refused.

The cases are small rows of each kind that people reported losses with.
"""

import json
import re

import pytest

from tests.data.template_kinds import samples_of, tokenizer_of
from tests.data.test_own_formats import write
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
    ("roles in other spellings", talk({"role": "System", "content": "Be brief."}, ASK | {"role": "Human"},
        SAY | {"role": "ASSISTANT"}, AGAIN | {"role": "USER "}, LAST | {"role": "Bot"}), BOTH, ["system\nBe brief."]),
    ("speakers in other spellings", {"conversations": [*turns("q", names=("Human",)), {"from": "Function-Call", "value":
        '{"name": "open_door", "arguments": {"door": "red"}}'}, {"from": "Observation", "value": "ok"},
        {"from": "GPT", "value": "a"}]}, [CALLED + END, "a" + END], ["<tool_response>\nok"]),
    ("ShareGPT's other speakers", {"conversations": turns("q", "a", names=("user", "assistant"))}, ["a" + END], ["q"]),
    ("a call, content blank", talk(ASK, call(content=""), DONE, SAY, tools=[OPEN]), [CALLED + END, *PAIR],
     ["# Tools", '"name": "open_door", "parameters"', "<tool_response>\nok"]),
    ("a call, content null", talk(ASK, call(content=None), DONE, SAY, tools=[OPEN]), [CALLED + END, *PAIR], TOOLS),
    ("a call without it", talk(ASK, call(), DONE, SAY, tools=[OPEN]), [CALLED + END, *PAIR], TOOLS),
    ("results that are no texts", talk(ASK, call(), DONE | {"content": {"ok": 1}}, DONE | {"content": [{"ok": 2}]},
        DONE | {"content": 3}, SAY), [CALLED + END, *PAIR], ['{"ok": 1}', '[{"ok": 2}]', "<tool_response>\n3\n"]),
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
    *((f"{mark} {value}", talk(ASK, SAY | {mark: value}, AGAIN, LAST | {mark: type(value)(1)}), BOTH[1:], [])
      for mark, value in (("training", False), ("loss", False), ("loss", 0), ("loss_scale", 0.0), ("loss_weight", 0))),
    ("marks of no answer", talk(ASK | {"weight": 2, "train": "x"}, SAY | {"mask": 1, "trainable": False}), PAIR, []),
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
    ("SQuAD", {"context": "c", "question": "q", "answers": {"text": ["a", "b"], "answer_start": [0, 1]}}, ["a" + END],
     ["user\nq\nc<|im_end|>"]),
    ("TriviaQA", {"question": "q", "answer": {"value": "a", "aliases": ["b"]}}, ["a" + END], ["user\nq<|im_end|>"]),
    ("answers as objects", {"question": "q", "answers": [{"text": "a", "score": 1}]}, ["a" + END], []),
    ("answers like JSON", {"prompt": '["q"]', "completion": '{"role": "user", "text": "a"}'},
     ['{"role": "user", "text": "a"}' + END], ['user\n["q"]<|im_end|>']),
    ("white space at borders", talk(ASK | {"content": "  x  "}, SAY | {"content": "\n\nlist:\n- a\n"}),
     ["\n\nlist:\n- a\n" + END], []),
    *((f"borders {mark!a}", talk(ASK | {"content": f"{mark} q {mark}"}, SAY | {"content": f"{mark} a {mark}"}, AGAIN,
       LAST | {"content": mark}), [f"{mark} a {mark}{END}", mark + END], []) for mark in MARKS),
]  # fmt: skip

# Arrow has one type a column, and no file of it holds these beside the others.
NOT_BESIDE_OTHERS = {
    "results that are no texts", "parts of text", "arguments as JSON text", "history as messages",
    "marks of no answer", "loss 0", "TriviaQA", "answers as objects", "SQuAD", "answers like JSON",
}  # fmt: skip


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
    ("qwen", talk({"user": "q", "assistant": "a"}), r'record 1.*has neither "role" nor "from" .it has user, assistant'),
    ("qwen", talk(ASK, SAY | {"loss": 0.5}), r"record 1.*messages\[1\].loss. is 0.5: it must be 0 or 1"),
    ("qwen", {"conversations": [{"from": "human", "value": "q", "content": "x"}]}, "record 1.*different texts"),
    ("qwen", {"question": "q", "answer": {"label": "a", "id": 1}}, "record 1.*object with label, id.*--columns resp"),
    ("qwen", talk(ASK, call() | {"tool_calls": [{"id": "c1"}]}), r"record 1.*tool_calls\[0\]. is no call"),
    ("qwen", talk(ASK, call('{"door": "red", "door": "blue"}')),
     r"record 1.*tool_calls\[0\].function.arguments.: .door. stands twice in one object"),
    ("qwen", talk(ASK, SAY, tools="door"), "no list of functions"),
    ("qwen", {"prompt": "<|im_start|>user\nq", "response": [SAY]}, "record 1.*rendered already, .*in one form"),
    ("qwen", {"chosen": "Human: q Assistant: a"}, "record 1.*no prompt beside it.*--columns text=chosen"),
    ("qwen", {"prompt": "q", "response": "a", "history": [["x"]]}, "no earlier turn"),
    ("qwen", talk({"role": "system", "content": "x"}, ASK, SAY, system="y"), "hold different texts"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "row", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_what_is_refused(tmp_path, kind, row, words):
    with pytest.raises(UserError, match=re.compile(words, re.DOTALL)):
        samples_of(write(tmp_path / "t.jsonl", [row, row]), tmp_path / "cache", kind)
