"""Finds where the answers stand in a rendered conversation whose template does not say it.

The conversation is rendered a second time with the words of every answer replaced by names that occur nowhere else:
where these stand in the second text tells where the answers stand in the first, whatever the template leaves out or
adds. Where the template writes the words in another way (it escapes them, say), they are what stands between the texts
that lie between the names, if there is only one way to lay these over the first text. That takes two renderings,
however many turns there are. A template whose other text depends on the words is rendered for every answer, up to it.
"""

import re
from functools import lru_cache
from typing import Any, NamedTuple

from utils.data.formats.chat_template import ChatFormat, render, render_prompt, render_raw
from utils.data.formats.column_text import Span
from utils.data.formats.conversations import REASONING, Conversation, has_words
from utils.data.reading.messages import Message
from utils.errors import UserError

_NAME = re.compile(r"xq(\d+)qx")
_THOUGHT_TAGS = re.compile(r"(</?think>)")
_WORDS = re.compile(r"\s*(.*?)\s*", re.DOTALL)
_QUESTION = {"role": "user", "content": "xq0qx"}


class Unfound(Exception):
    """An answer that this way of looking does not find."""


class Found(NamedTuple):
    """Where one answer stands: its own words, and all that the model is to write, from the prompt's end on."""

    words: Span
    whole: Span


class Around(NamedTuple):
    """What a template writes around an answer's words."""

    prompt: str  # the generation prompt, which asks for an answer, as far as it stands before answers
    before: str  # between it and the words
    closing: str  # what follows the words, without white space at its end


def find_answers(chat: ChatFormat, talk: Conversation, text: str) -> dict[int, Found] | None:
    """Return where each answer stands, by its place; an answer that the template leaves out has none.

    Args:
        text: the conversation as `render` returns it.
    """
    for way in (_found_by_names, _found_by_prompts):
        try:
            return way(chat, talk, text)
        except Unfound:
            continue
    return None


def shared_start(one: str, other: str) -> int:
    """Return how many characters both texts begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, pair in pairs if pair[0] != pair[1]), min(len(one), len(other)))


@lru_cache(maxsize=8)
def _asked(chat: ChatFormat) -> tuple[str, str]:
    """Return a question as the template writes it, and with what it writes to ask for an answer."""
    return render_raw(chat, [_QUESTION]), render_raw(chat, [_QUESTION], ask=True)


def generation_prompt(chat: ChatFormat) -> str:
    """Return what the template writes to ask for an answer; empty where that is nothing but white space."""
    bare, prompt = _asked(chat)
    words = prompt[len(bare) :] if prompt.startswith(bare) else ""
    return words if words.strip() else ""


@lru_cache(maxsize=8)
def surroundings(chat: ChatFormat) -> Around | None:
    """Return what the template writes around an answer's words; None where its text tells nothing."""
    try:
        bare, prompt = _asked(chat)
        whole = render_raw(chat, [_QUESTION, {"role": "assistant", "content": "xq1qx"}])
    except UserError:
        return None
    at = whole.find("xq1qx")
    if at < 0 or not prompt.startswith(bare) or not whole.startswith(bare):
        return None
    # Some generation prompts begin the answer too (with a thought), which the template does not repeat in it.
    shared = shared_start(prompt, whole[:at])
    return Around(whole[len(bare) : shared], whole[shared:at], whole[at + len("xq1qx") :].rstrip())


# --------------------------------------------------------------------------------------- two renderings


def _found_by_names(chat: ChatFormat, talk: Conversation, text: str) -> dict[int, Found]:
    around = surroundings(chat)
    named, words, owners = _named(talk)
    if around is None or any(_NAME.search(word) for word in words):
        raise Unfound
    try:
        skeleton = render(chat, named, talk.tools)
    except UserError as err:
        raise Unfound from err
    places = _places(skeleton, words, owners, text)
    found: dict[int, Found] = {}
    before = 0
    for number, (place, (first, last)) in enumerate(places):
        limit = places[number + 1][1][0] if number + 1 < len(places) else len(text)
        has_calls = bool(talk.messages[place].get("tool_calls"))
        start = _start(text, before, first, around, has_calls)
        end = _end(text, last, limit, around, has_calls)
        found[place] = Found((first, last), (start, end))
        before = end
    # A call without a word of its own has no name to be found by.
    missing = [place for place in range(len(talk.messages)) if talk.messages[place]["role"] == "assistant"]
    if any(place not in found and place not in owners and has_words(talk.messages[place]) for place in missing):
        raise Unfound
    return found


def _places(skeleton: str, words: list[str], owners: list[int], full: str) -> list[tuple[int, Span]]:
    """Return (answer, range in `full` of its words) in turn; raises Unfound where more than words differs."""
    names = list(_NAME.finditer(skeleton))
    numbers = [int(name[1]) for name in names]
    if any(number >= len(words) for number in numbers) or (not names and skeleton != full):
        raise Unfound
    if not names:
        return []
    edges = [0, *(edge for name in names for edge in name.span()), len(skeleton)]
    between = [skeleton[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]
    spans = _unchanged_spans(between, [words[number] for number in numbers], full) or _only_spans(between, full)
    ranges: dict[int, Span] = {}
    for owner, (first, last) in zip((owners[number] for number in numbers), spans, strict=True):
        if ranges and owner < next(reversed(ranges)):
            raise Unfound
        ranges[owner] = (ranges[owner][0] if owner in ranges else first, last)
    return list(ranges.items())


def _unchanged_spans(between: list[str], words: list[str], full: str) -> list[Span]:
    """Return where the words stand in `full` if it is them and the texts between them; [] if it is not."""
    spans, end = [], 0
    for text, word in zip(between, words, strict=False):
        first = end + len(text)
        end = first + len(word)
        spans.append((first, end))
    made = "".join(text for pair in zip(between, [*words, ""], strict=True) for text in pair)
    return spans if made == full else []


def _only_spans(between: list[str], full: str) -> list[Span]:
    """Return what lies between these texts in `full`; raises Unfound unless there is only one way to lay them over it.

    The way that has each text as far left as possible, and the one that has it as far right, must be the same.
    """
    first, *inner, last = between
    begin, end = len(first), len(full) - len(last)
    if not full.startswith(first) or not full.endswith(last) or begin > end or not all(inner):
        raise Unfound
    left, right = [], []
    at = begin
    for text in inner:
        left.append(at := full.find(text, at, end))
        if at < 0:
            raise Unfound
        at += len(text)
    at = end
    for text in reversed(inner):
        right.append(at := full.rfind(text, begin, at))
    if left != right[::-1]:
        raise Unfound
    starts = [begin, *(start + len(text) for start, text in zip(left, inner, strict=True))]
    return list(zip(starts, [*left, end], strict=True))


def _named(talk: Conversation) -> tuple[list[Message], list[str], list[int]]:
    """Return the messages with the words of answers replaced by names, these words, and whose they are."""
    words: list[str] = []
    owners: list[int] = []
    messages = []

    def name(text: str, owner: int) -> str:
        inner = _WORDS.fullmatch(text)
        if not inner[1]:
            return text
        words.append(inner[1])
        owners.append(owner)
        return f"{text[: inner.start(1)]}xq{len(words) - 1}qx{text[inner.end(1) :]}"

    for place, message in enumerate(talk.messages):
        if message["role"] == "assistant":
            message = dict(message)
            for field in REASONING:
                if isinstance(message.get(field), str):
                    message[field] = name(message[field], place)
            parts = _THOUGHT_TAGS.split(message["content"])
            message["content"] = "".join(part if number % 2 else name(part, place) for number, part in enumerate(parts))
            if "tool_calls" in message:
                message["tool_calls"] = [_named_call(call, name, place) for call in message["tool_calls"]]
        messages.append(message)
    return messages, words, owners


def _named_call(call: dict[str, Any], name: Any, place: int) -> dict[str, Any]:
    return {**call, "function": {**call["function"], "name": name(call["function"]["name"], place)}}


def _start(full: str, before: int, first: int, around: Around, has_calls: bool) -> int:
    """Return where the answer begins whose words begin at `first`: after the generation prompt."""
    if around.prompt:
        at = full.rfind(around.prompt, before, first)
        if at < 0:
            raise Unfound
        return at + len(around.prompt)
    start = first - len(around.before)
    if has_calls or start < before or not full.startswith(around.before, start):
        raise Unfound
    return start


def _end(full: str, last: int, limit: int, around: Around, has_calls: bool) -> int:
    """Return where the answer ends whose words end at `last`: after what closes it."""
    if not around.closing:
        if has_calls:
            raise Unfound
        return last
    at = full.find(around.closing, last, limit)
    if at >= 0 and (has_calls or not full[last:at].strip()):
        return at + len(around.closing)
    if has_calls and limit < len(full):
        raise Unfound
    # The last answer is closed by the rest of the text; an earlier one that nothing closes ends with its words.
    return last if limit < len(full) else len(full)


# ---------------------------------------------------------------------------------- a rendering an answer


def _found_by_prompts(chat: ChatFormat, talk: Conversation, text: str) -> dict[int, Found]:
    found = {}
    for place, message in enumerate(talk.messages):
        if message["role"] == "assistant" and has_words(message):
            span = _rendered_span(chat, talk, place, text)
            found[place] = Found(span, span)
    return found


def _rendered_span(chat: ChatFormat, talk: Conversation, place: int, text: str) -> Span:
    try:
        prompt = render_prompt(chat, talk.messages[:place], talk.tools)
        until = render_raw(chat, talk.messages[: place + 1], talk.tools).rstrip()
    except UserError as err:
        raise Unfound from err
    start = len(prompt)
    if text.startswith(prompt) and text.startswith(until) and start < len(until):
        return start, len(until)
    content = talk.messages[place]["content"].strip()
    closing = until[until.rfind(content) + len(content) :]
    at = text.find(content + closing, start)
    if not content or not text.startswith(prompt) or content not in until or at < 0:
        raise Unfound
    return start, at + len(content + closing)
