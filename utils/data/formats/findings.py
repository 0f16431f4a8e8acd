"""Tells what of the first conversations does not reach the text: fields nobody reads, words a template omits."""

from collections import Counter
from typing import Any

from utils.data.formats.chat_template import ChatFormat, render_raw
from utils.data.formats.conversations import REASONING, Conversation
from utils.data.reading.messages import Message
from utils.errors import UserError

# Fields that are read whatever the template: they decide what is learned, or are part of what it always gets.
_READ = {"role", "content", "tool_calls", "weight", "train"}


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
