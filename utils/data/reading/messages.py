"""Reads a value as a conversation: OpenAI's `role` and `content`, or ShareGPT's `from` and `value`.

The same conversation comes in many shapes: as a list or as JSON text, with nulls where Arrow fills in a field that
other messages have, with content as a list of text parts, with arguments of a call as an object or as JSON text. All
of them become one: a list of dicts without nulls, whose `content` is a string and whose arguments are objects.
"""

import ast
import json
import re
from typing import Any

from utils.data.reading.whole_values import RepeatedName, object_of, without_nulls

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
# The names of roles in the data of others, in lower case and with underscores.
_SPEAKERS = {role: role for role in ROLES} | {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "bot": "assistant", "chatbot": "assistant", "ai": "assistant",
    "observation": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool",
    "ipython": "tool", "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
_CALLERS = ("function_call", "tool_call")
_APART = re.compile(r"[\s_-]+")
# Fields that say whether an answer is to be learned: OpenAI's, axolotl's (two), ms-swift's (two), LLaMA-Factory's.
MARKS = frozenset(("weight", "train", "training", "loss", "loss_scale", "loss_weight"))
_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", bytes: "bytes", type(None): "null"}


class Malformed(ValueError):
    """A value that is no conversation; the text says which part of it and why."""


class PartsText(str):
    """The text of a message whose parts have fields beside it, which are in no text."""

    fields: frozenset[str] = frozenset()

    def with_fields(self, fields: set[str]) -> "PartsText":
        """Return the text itself, with the names of these fields."""
        self.fields = frozenset(fields)
        return self


def parsed(value: Any) -> Any:
    """Return what a text of JSON (or of Python's notation, as pandas writes it to CSV) holds; other values as given."""
    if not isinstance(value, str):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return value


def to_messages(value: Any, where: str) -> list[Message]:
    """Return the messages of a column's value in the one form that chat templates read.

    Args:
        value: the messages, as a list or as JSON text.
        where: the column's name, for the message of an error.

    Raises:
        Malformed: it is no conversation.
    """
    value = without_nulls(parsed(value))
    if value is None or value == "":
        value = []
    if isinstance(value, dict):
        value = _turns_in_columns(value)
    if not isinstance(value, list):
        raise Malformed(f'"{where}" is {kind_of(value)} where a list of messages is needed')
    if not value:
        raise Malformed(f'"{where}" holds no message')
    return [_message(parsed(message), f"{where}[{place}]") for place, message in enumerate(value)]


def _turns_in_columns(value: dict[str, Any]) -> Any:
    """Return a list of messages where each field is a list of its values in all of them, as `datasets` may keep them.

    Other objects are returned as they are.
    """
    columns = list(value.values())
    if not is_message(value) or not all(isinstance(column, list) for column in columns):
        return value
    if len({len(column) for column in columns}) != 1:
        return value
    return [without_nulls(dict(zip(value, turn, strict=True))) for turn in zip(*columns, strict=True)]


def conversation_fault(value: Any, where: str) -> str | None:
    """Describe what is wrong with a column's value that should be a conversation; None if nothing is."""
    try:
        to_messages(value, where)
    except Malformed as err:
        return str(err)
    return None


def to_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Return the functions that a conversation may call, as their JSON schemas; None where there are none.

    Raises:
        Malformed: it is no list of objects.
    """
    value = without_nulls(parsed(value))
    if not value or (isinstance(value, str) and not value.strip()):
        return None
    value = [parsed(tool) for tool in (value if isinstance(value, list) else [value])]
    if not all(isinstance(tool, dict) for tool in value):
        raise Malformed(f'"{where}" is no list of functions: objects with name and parameters are needed')
    return value


def is_message(value: Any) -> bool:
    """Whether a value says who speaks, as a message does."""
    return isinstance(value, dict) and ("role" in value or "from" in value)


def kind_of(value: Any) -> str:
    """Name the kind of a value for a message: "a list", "a number", ..."""
    return _KINDS.get(type(value), "a number")


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise Malformed(f'"{where}" is {kind_of(message)} where a message is needed')
    message, said = _with_role(message, where)
    if "function_call" in message:  # the name of tool_calls in OpenAI's first version
        message.setdefault("tool_calls", message.pop("function_call"))
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], f"{where}.tool_calls")
        if not message["tool_calls"]:
            del message["tool_calls"]
    message["content"] = _content(message, f"{where}.{said}")
    if message["role"] == "assistant":
        for name in MARKS & message.keys():
            if message[name] not in (0, 1):
                raise Malformed(f'"{where}.{name}" is {message[name]!r}: it must be 0 or 1 (false or true)')
    return message


def _with_role(message: Message, where: str) -> tuple[Message, str]:
    """Return a copy that has `role`, one of `ROLES`, and `content`; and the field in which the content was."""
    if message.get("role") in ROLES and ("content" in message or "value" not in message):
        return dict(message), "content"
    if not is_message(message):
        raise Malformed(f'"{where}" has neither "role" nor "from" (it has {", ".join(message) or "nothing"})')
    named = "role" if "role" in message else "from"
    said, other = ("content", "value") if named == "role" else ("value", "content")
    if said not in message and other in message:
        said, other = other, said
    given = message[named]
    speaker = _APART.sub("_", given.strip().lower()) if isinstance(given, str) else ""
    if speaker not in _SPEAKERS:
        raise Malformed(f'"{where}.{named}" is {given!r}: it must be one of {", ".join(_SPEAKERS)}')
    if named == "from" and said in message and message.get(other, message[said]) != message[said]:
        raise Malformed(f'"{where}" holds different texts in "value" and "content": remove one of them')
    others = {name: value for name, value in message.items() if name not in (named, said)}
    changed = {"role": _SPEAKERS[speaker], "content": message.get(said)}
    if speaker in _CALLERS and "tool_calls" not in message:
        changed |= {"content": "", "tool_calls": message.get(said)}
    return others | changed, said


def _content(message: Message, where: str) -> str:
    content = message.get("content")
    if content is None:
        if "tool_calls" in message:
            return ""  # how OpenAI writes a message that is a call alone
        others = [name for name in message if name not in ("role", "content")]
        beside = f" (it has {', '.join(others)} beside the role)" if others else ""
        raise Malformed(f'"{where}" is null or missing where a string is needed{beside}')
    if isinstance(content, list) and (message["role"] != "tool" or _are_parts(content)):
        text = "".join(_part(part, f"{where}[{place}]") for place, part in enumerate(content))
        fields = {name for part in content if isinstance(part, dict) for name in part if name not in ("type", "text")}
        return PartsText(text).with_fields(fields) if fields else text
    if message["role"] == "tool" and not isinstance(content, str):  # what a function returned
        return json.dumps(content, ensure_ascii=False)
    if not isinstance(content, str):
        raise Malformed(f'"{where}" is {kind_of(content)} where a string is needed')
    return content


def _are_parts(content: list[Any]) -> bool:
    return all(isinstance(part, str) or (isinstance(part, dict) and {"type", "text"} & part.keys()) for part in content)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    kind = f"of type {part['type']!r}" if isinstance(part, dict) and "type" in part else kind_of(part)
    raise Malformed(f'"{where}" is {kind}: parts of text alone can be trained')


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    calls = parsed(calls)
    calls = calls if isinstance(calls, list) else [calls]
    return [_call(parsed(call), f"{where}[{place}]") for place, call in enumerate(calls)]


def _arguments(text: str, where: str) -> Any:
    """Return what a text of JSON holds; raises Malformed where a name stands twice in it."""
    try:
        return json.loads(text, object_pairs_hook=object_of)
    except RepeatedName as err:
        raise Malformed(f'"{where}": {err}') from err
    except (ValueError, RecursionError):
        return parsed(text)


def _call(call: Any, where: str) -> dict[str, Any]:
    """Return a call as `{"type": "function", "function": {"name", "arguments"}}`, its other fields kept."""
    if isinstance(call, dict) and "function" not in call and "name" in call:
        call = {"type": "function", "function": call}
    function = parsed(call.get("function")) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Malformed(f'"{where}" is no call of a function: {{"name": ..., "arguments": ...}} is needed')
    # Llama's and Anthropic's names for the same.
    name = next((name for name in ("arguments", "parameters", "input") if name in function), "arguments")
    given = function.get(name, {})
    arguments = (
        _arguments(given, f"{where}.function.{name}") if isinstance(given, str) and given.strip() else given or {}
    )
    arguments = arguments if isinstance(arguments, dict) else given
    others = {field: value for field, value in function.items() if field != name}
    return {**call, "function": {**others, "arguments": arguments}}
