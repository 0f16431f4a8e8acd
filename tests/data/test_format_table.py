"""The table of docs/data.md: what becomes of each field in each format. Every cell is tried.

A row of the table needs a way to write its field in `FIELDS`, and each of these a row in the table. In each cell the
word `zebra` stands in that field, and is looked for in the texts, in the labels and in what is printed.
"""

import re
from pathlib import Path

import pytest
from conftest import ROOT

from tests.data.prepared_data import prepare
from tests.data.template_kinds import samples_of, tokenizer_of
from tests.data.test_own_formats import write
from utils.data.data_utils import get_raw_dataset
from utils.data.formats.custom import own_options
from utils.errors import UserError

MARK = "zebra"
TRIMMED = "turns after the last answer"
FORMATS = (
    "messages", "conversations", "lists of messages", "prompt, response", "instruction, output", "question, answer",
    "text", "input_ids",
)  # fmt: skip
ASK, SAY = {"role": "user", "content": "First?"}, {"role": "assistant", "content": "One."}
AGAIN, LAST = {"role": "user", "content": "Second?"}, {"role": "assistant", "content": "Two."}
OTHER_CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"town": "Rome"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"animal": MARK}}}
TOOL = {"type": "function", "function": {"name": MARK, "parameters": {}}}
SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation", "developer": "developer"}


def talk(*messages: dict) -> dict:
    return {"talk": list(messages)}


def called(call: dict) -> dict:
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def beside(**columns) -> dict:
    return {"talk": [ASK, SAY], **columns}


# Each field as messages, or as a column beside a question and its answer.
FIELDS = {
    "the last answer": talk(ASK, SAY | {"content": MARK}),
    "earlier answers": talk(ASK, SAY | {"content": MARK}, AGAIN, LAST),
    "user turns": talk(ASK | {"content": MARK}, SAY),
    "system turns": talk({"role": "system", "content": MARK}, ASK, SAY),
    "developer turns": talk({"role": "developer", "content": MARK}, ASK, SAY),
    "results of tools": talk(ASK, called(OTHER_CALL), {"role": "tool", "content": MARK, "tool_call_id": "1"}, LAST),
    "`tool_calls`": talk(ASK, called(CALL)),
    "`reasoning_content`": talk(ASK, SAY | {"reasoning_content": MARK}),
    "parts of text": talk(ASK, SAY | {"content": [{"type": "text", "text": MARK}]}),
    "parts of another kind": talk(ASK | {"content": [{"type": "image_url", "image_url": MARK}]}, SAY),
    "answers with `weight` 0 or `train` false": talk(ASK, SAY | {"content": MARK, "weight": 0}, AGAIN, LAST),
    "`name`, `tool_call_id` and any other field": talk(ASK | {"name": MARK}, SAY),
    "a role not named here": talk(ASK, {"role": MARK, "content": "x"}, LAST),
    TRIMMED: talk(ASK, SAY, AGAIN | {"content": MARK}),
    "column `system`": beside(system=MARK),
    "column `tools`": beside(tools=[TOOL]),
    "column `history`": beside(history=[["Hello", MARK]]),
    "column `input` or `context`": beside(input=MARK),
    "column `rejected`": beside(rejected=MARK),
    "any other column": beside(source=MARK),
}
PLAIN = {"the last answer", "user turns"}  # what a pair of texts can hold


def in_format(form: str, field: str) -> dict | None:
    """The row in a format; None where the format has no place for the field."""
    row = dict(FIELDS[field])
    messages = row.pop("talk")
    if form == "messages":
        return {"messages": messages, **row}
    if form == "conversations":
        return {"conversations": [spoken(message) for message in messages], **row}
    if form == "lists of messages":
        last = max(place for place, message in enumerate(messages) if message["role"] in ("assistant", MARK))
        return {"prompt": messages[:last], "chosen": messages[last:], **row}
    if form in ("text", "input_ids"):
        whole = f"Some {MARK} words" if field == "the last answer" else "Some words"
        whole = whole if form == "text" else tokenizer_of("qwen")(whole)["input_ids"]
        return {form: whole, **row} if row or field == "the last answer" else None
    if field not in PLAIN and not row:
        return None
    question, answer = form.split(", ")
    return {question: messages[0]["content"], answer: messages[1]["content"], **row}


def spoken(message: dict) -> dict:
    others = {name: value for name, value in message.items() if name not in ("role", "content")}
    return {"from": SPEAKERS.get(message["role"], message["role"]), "value": message["content"], **others}


def outcome(row: dict, field: str, folder: Path, capsys: pytest.CaptureFixture) -> str:
    """What becomes of the word: labelled, used, not used (which is said), for step 2, refused, or lost."""
    path = write(folder / "t.jsonl", [row, row])
    try:
        sample = samples_of(path, folder / "cache")[0]
    except UserError as err:
        assert "record 1" in str(err)
        return "refused"
    if MARK in "".join(sample.labels):
        return "labelled"
    if MARK in sample.text:
        return "used"
    tokenizer = tokenizer_of("qwen")
    raw = get_raw_dataset(str(path), str(folder / "cache"), 1, 0, own_options(tokenizer, tokenizer.eos_token_id))
    if MARK in (raw.get_prompt_and_rejected(raw.get_train_data()[0]) or ""):
        return "step 2"
    capsys.readouterr()
    prepare([path], folder / "whole", tokenizer, 1024)
    printed = capsys.readouterr().out
    if field == TRIMMED:
        return "not used" if f"2 rows have {TRIMMED}: not used" in printed else "lost"
    unused = re.search("not used: (.*)", printed)
    places = [name for name, value in row.items() if MARK in str(value)]
    places += [name for turn in row.get("messages", row.get("conversations", row.get("prompt"))) or ()
               if isinstance(turn, dict) for name, value in turn.items() if MARK in str(value)]  # fmt: skip
    names = {name.split(" of ")[0] for name in unused[1].split(", ")} if unused else set()
    return "not used" if names & set(places) else "lost"


def table() -> dict[str, dict[str, str]]:
    """The table of the page: the cell of each field and format."""
    lines = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").split("### What becomes of each field")[1]
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in lines.split("\n##")[0].splitlines()
            if line.startswith("|")]  # fmt: skip
    header, _, *rows = rows
    return {row[0]: dict(zip([name.replace("`", "") for name in header[1:]], row[1:], strict=True)) for row in rows}


@pytest.mark.parametrize("field", FIELDS)
def test_every_cell_is_what_happens(tmp_path, field, capsys):
    cells = table()[field]
    for form in FORMATS:
        row = in_format(form, field)
        (folder := tmp_path / form).mkdir()
        found = "–" if row is None else outcome(row, field, folder, capsys)
        assert cells[form] == found, f"{form}: the page says {cells[form]!r}"


def test_the_page_has_a_row_for_each_field_and_a_column_for_each_format():
    assert list(table()) == list(FIELDS)
    assert all(tuple(cells) == FORMATS for cells in table().values())
    assert "lost" not in str(table())
