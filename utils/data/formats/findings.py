"""Tells what of a conversation does not reach its text: fields that nobody reads, words that a template leaves out."""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from utils.data.formats.chat_template import ChatFormat, render
from utils.data.formats.conversations import MARKS, REASONING, Conversation
from utils.data.outcomes import READ, Note
from utils.data.reading.messages import Message, PartsText
from utils.errors import UserError

# Rows, in each process, in which a field is taken away to see whether the text changes, and fields this is done for.
ROWS_TRIED = 100
FIELDS_TRIED = 50
OTHERS = "other fields"
_WHERE = {"system": Note.LEFT_SYSTEM, "developer": Note.LEFT_SYSTEM, "user": Note.LEFT_USER, "tool": Note.LEFT_TOOL}
# Fields that are read whatever the template: they are part of what it always gets.
_ALWAYS = {"role", "content"}
_OF_ANSWERS = MARKS | {"tool_calls"}
_TAGS = re.compile("</?think>")
_OF_CALL, _OF_FUNCTION = {"function"}, {"name", "arguments"}


# ------------------------------------------------------------------------------------------------ fields


def unread_fields(chat: ChatFormat, talk: Conversation, text: str) -> tuple[str, ...]:
    """Return the fields of a conversation that its text does not depend on; with `READ` before it, one that it does.

    A field is taken away to see whether the text changes, until it does once; from then on the field counts as read.

    Args:
        text: the conversation as the format renders it.
    """
    unread = [f"{name} of parts" for name in sorted(_fields_of_parts(talk))]
    fields = _fields_of(talk)
    if not fields:
        return tuple(unread)
    tried = _rows_tried(chat)
    for field in sorted(fields):
        if field not in tried and len(tried) >= FIELDS_TRIED:
            unread.append(OTHERS)
            continue
        rows = tried.setdefault(field, 0)
        if rows is None:
            continue
        tried[field] = rows + 1
        if rows < ROWS_TRIED and _changes(chat, _without(talk, field), text):
            tried[field] = None
            unread.append(READ + field)
        else:
            unread.append(field)
    return tuple(dict.fromkeys(unread))


@lru_cache(maxsize=8)
def _rows_tried(chat: ChatFormat) -> dict[str, int | None]:
    """Return in how many rows of this process each field was tried; None for those that are read. It is written to."""
    return {}


def _fields_of(talk: Conversation) -> set[str]:
    """Return the names of what may be read by nothing, by the role whose turns have it."""
    found = {"tools"} if talk.tools else set()
    for message in talk.messages:
        role = message["role"]
        calls = message.get("tool_calls", ()) if role == "assistant" else ()
        if not message.keys() <= _ALWAYS:
            others = message.keys() - _ALWAYS - (_OF_ANSWERS if role == "assistant" else set())
            found.update(f"{name} of {role} turns" for name in others)
        for call in calls:
            others = (call.keys() - _OF_CALL) | (call["function"].keys() - _OF_FUNCTION)
            if call.get("type") == "function":  # says nothing: there is no other type
                others.discard("type")
            found.update(f"{name} of tool_calls" for name in others)
    return found


def _fields_of_parts(talk: Conversation) -> set[str]:
    return {name for one in talk.messages if isinstance(one["content"], PartsText) for name in one["content"].fields}


def _without(talk: Conversation, field: str) -> Conversation:
    """Return the conversation without a field that `_fields_of` names."""
    if field == "tools":
        return talk._replace(tools=None)
    name, _, where = field.rpartition(" of ")
    if where == "tool_calls":
        messages = [
            message | {"tool_calls": [_bare_call(call, name) for call in message["tool_calls"]]}
            if "tool_calls" in message
            else message
            for message in talk.messages
        ]
    else:
        role = where.removesuffix(" turns")
        messages = [_bare(message, name) if message["role"] == role else message for message in talk.messages]
    return talk._replace(messages=messages)


def _bare(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}


def _bare_call(call: dict[str, Any], name: str) -> dict[str, Any]:
    function = call["function"] if name in _OF_FUNCTION else _bare(call["function"], name)
    return _bare(call, name) | {"function": function}


def _changes(chat: ChatFormat, talk: Conversation, text: str) -> bool:
    try:
        return render(chat, *talk) != text
    except UserError:
        return True


# ------------------------------------------------------------------------------------------------- words


def left_out(chat: ChatFormat, talk: Conversation, text: str) -> set[Note]:
    """Return what the format leaves out of a conversation, or writes in another role.

    Turns are looked for in their order, each from where the one before it was found, so that long conversations take
    no longer than their length.
    """
    found: set[Note] = set()
    at = 0
    escapes: dict[str, bool] = {}  # by role, whether the last text was found in the escaped form
    for message in talk.messages:
        role = message["role"]
        for words, note in _parts(message):
            if note in found:
                continue
            forms = [words, _escaped(words)]
            for form in reversed(forms) if escapes.get(role) else forms:
                place = text.find(form, at)
                if place < 0:
                    place = text.find(form)
                else:
                    at = place
                if place >= 0:
                    escapes[role] = form is not words
                    break
            else:
                found.add(note)
    developers = chat.developer_as_system or not chat.is_template
    if developers and any(message["role"] == "developer" for message in talk.messages):
        found.add(Note.DEVELOPER)
    return found


def _parts(message: Message) -> Iterator[tuple[str, Note]]:
    """Yield the texts of a message, and what is to be said where one of them is missing."""
    role, content = message["role"], message["content"].strip()
    if role == "assistant":
        for name in REASONING:
            if isinstance(message.get(name), str) and message[name].strip():
                yield message[name].strip(), Note.LEFT_REASONING
        thought, tag, said = content.rpartition("</think>")
        if tag:
            yield from ((words.strip(), Note.LEFT_REASONING) for words in _TAGS.split(thought) if words.strip())
            content = said.strip()
        for call in message.get("tool_calls", ()):
            yield call["function"]["name"], Note.LEFT_CALL
    if content:
        yield content, _WHERE.get(role, Note.LEFT_ANSWER)


def _escaped(words: str) -> str:
    """Return the words as they stand in a string of JSON."""
    return words.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
