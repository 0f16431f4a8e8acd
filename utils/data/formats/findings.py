"""Tells what of conversations does not reach the text: fields nobody reads, words a template omits.

Looked at are the first rows, and each later one with a field that no row before it has.
"""

import re
from collections import Counter
from itertools import islice
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from utils.data.formats.chat_template import ChatFormat, render_raw
from utils.data.formats.columns import ROWS_TRIED
from utils.data.formats.conversations import REASONING, Conversation
from utils.data.reading.messages import Message
from utils.errors import UserError

ROWS_AT_ONCE = 1000
CHARS_SCANNED = 50 * 10**6  # half a second
_KEY = re.compile(r'"(\w+)":')  # of JSON; within a text the second quote is escaped
# Fields that are read whatever the template: they decide what is learned, or are part of what it always gets.
_READ = {"role", "content", "tool_calls", "weight", "train"}


def telling_rows(data: Any, columns: list[str]) -> list[dict[str, Any]]:
    """Return the first rows, and each later one that has a field which none of these has.

    Args:
        data: rows that can be counted, or a stream, of which only the first rows are looked at.
        columns: those that hold conversations.
    """
    first = list(islice(data, ROWS_TRIED))
    if not isinstance(data, datasets.Dataset) or len(data) <= len(first):
        return first
    columns = [name for name in columns if data.features[name] == datasets.Value("string")]
    table = data.select_columns(columns).with_format("arrow")[:] if columns else None
    later = [] if table is None else _rows_with_new_keys(table, len(first))
    return first + data.select(later).to_list()


def _rows_with_new_keys(table: pa.Table, begin: int) -> list[int]:
    """Return the numbers of rows from `begin` on whose JSON has a key that no row before has.

    At most `CHARS_SCANNED` are read, in rows at equal distances, so that large data do not delay the start.
    """
    size = sum(pc.sum(pc.binary_length(column)).as_py() or 0 for column in table.columns)
    step = max(1, -(-size // CHARS_SCANNED))
    known: set[str] = set()
    found: list[int] = []
    for column in table.columns:
        for text in column.slice(0, begin).to_pylist():
            known.update(_KEY.findall(text or ""))
    for column in table.columns:
        for start in range(begin, len(column), ROWS_AT_ONCE):
            texts = column.slice(start, ROWS_AT_ONCE).to_pylist()
            for number in range(0, len(texts), step):
                if len(found) < ROWS_TRIED and (new := set(_KEY.findall(texts[number] or "")) - known):
                    known |= new
                    found.append(start + number)
    return sorted(set(found))


def look_at(chat: ChatFormat, talks: list[Conversation], unused: list[str]) -> list[str]:
    """Return lines on what the format leaves out of these conversations.

    Args:
        unused: columns that are read by nothing.
    """
    try:
        texts = [render_raw(chat, *talk) for talk in talks]
    except UserError:
        return []  # a row that is refused ends the run with its place
    names = [*unused, *_unused_fields(chat, talks, texts)]
    lines = [f"not used: {', '.join(names)}"] if names else []
    left_out: Counter[str] = Counter()
    for talk, text in zip(talks, texts, strict=True):
        left_out.update({kind for message in talk.messages for kind in _left_out(message, text)})
    if left_out:
        counts = ", ".join(f"{kind} (in {count} of {len(talks)} rows tried)" for kind, count in left_out.items())
        lines.append(f"{chat.origin} leaves out {counts}")
    developers = any(message["role"] == "developer" for talk in talks for message in talk.messages)
    if developers and (chat.developer_as_system or not chat.is_template):
        lines.append(f"{chat.origin} has no place for the role developer: written as system")
    return lines


def _unused_fields(chat: ChatFormat, talks: list[Conversation], texts: list[str]) -> list[str]:
    """Return the fields of messages, and `tools`, without which every text stays the same."""
    seen: dict[str, bool] = {}
    for talk, text in zip(talks, texts, strict=True):
        fields = {name for message in talk.messages for name in message} - _READ
        for name in sorted(fields):
            if not seen.get(name):
                bare = [{key: value for key, value in one.items() if key != name} for one in talk.messages]
                seen[name] = _changes(chat, talk._replace(messages=bare), text)
        if talk.tools and not seen.get("tools"):
            seen["tools"] = _changes(chat, talk._replace(tools=None), text)
    return [name for name, is_used in seen.items() if not is_used]


def _changes(chat: ChatFormat, talk: Conversation, text: str) -> bool:
    try:
        return render_raw(chat, *talk) != text
    except UserError:
        return True


def _left_out(message: Message, text: str) -> list[str]:
    """Name the parts of a message that are not in the text."""
    role, content = message["role"], message["content"].strip()
    kinds = []
    thought, tag, said = content.rpartition("</think>")
    if content and content not in text:
        if tag and said.strip() in text:
            words = thought.replace("<think>", "").strip()
            kinds += ["reasoning"] if words and words not in text else []
        elif not _is_escaped(content, text):
            kinds.append(f"{'answers' if role == 'assistant' else f'{role} turns'}")
    reasoning: Any = next((message[name] for name in REASONING if isinstance(message.get(name), str)), "")
    if reasoning.strip() and reasoning.strip() not in text:
        kinds.append("reasoning")
    names = [call["function"]["name"] for call in message.get("tool_calls", ())]
    if any(name not in text for name in names):
        kinds.append("calls of tools")
    return kinds


def _is_escaped(content: str, text: str) -> bool:
    """Whether the text holds the content as a string of JSON."""
    return content.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") in text
