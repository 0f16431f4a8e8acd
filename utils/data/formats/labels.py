"""Finds what the assistant wrote in a rendered conversation.

A template that marks answers with `{% generation %}` says it. For any other, the conversation is rendered a second
time with the words of every answer replaced by names that occur nowhere else: where these stand in the second text
tells where the answers stand in the first, whatever the template leaves out or adds. That takes two renderings,
however many turns there are. A template whose text depends on the words themselves (it escapes them, say) is rendered
once for every answer, up to it; and where even that does not find the answers, each becomes a sample of its own.
"""

import re
from functools import lru_cache
from typing import Any, NamedTuple

from utils.data.formats.chat_template import SPEAKERS, ChatFormat, Span, marked_spans, render, render_prompt, render_raw
from utils.data.formats.conversations import REASONING, Conversation, excerpt, has_words
from utils.data.reading.messages import Message
from utils.errors import UserError

_NAME = re.compile(r"xq(\d+)qx")
_THOUGHT_TAGS = re.compile(r"(</?think>)")
_WORDS = re.compile(r"\s*(.*?)\s*", re.DOTALL)


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


def answer_spans(
    chat: ChatFormat, talk: Conversation, text: str, wanted: frozenset[int] | None = None
) -> list[Span] | None:
    """Return the ranges [start, end) of characters in `text`, the rendered conversation, of the wanted answers.

    What closes an answer belongs to it, since it teaches the model to stop: an end token after it, and after the last
    answer the rest of the text.

    Args:
        wanted: the places of the answers to label; None: all.

    Returns:
        None where the answers can't be found in this text.

    Raises:
        UserError: the template marks nothing in this conversation.
    """
    answers = [place for place, message in enumerate(talk.messages) if message["role"] == "assistant"]
    wanted = frozenset(answers) if wanted is None else wanted
    chat = chat.for_tools(talk.tools)
    if not chat.is_template:
        return _spoken_spans(chat, talk, wanted)
    if chat.marks_answers:
        return _marked(chat, talk, text, wanted)
    found = _found(chat, talk, text)
    if found is None:
        return None
    spans = [found[place].whole for place in answers if place in wanted and place in found]
    return _closed(chat, spans, text, bool(answers) and answers[-1] in wanted and answers[-1] in found)


def last_answer(chat: ChatFormat, talk: Conversation) -> tuple[str, list[Span]]:
    """Return the conversation as text, and the range of its last answer, which is all that follows its prompt.

    Where the template writes the turns before the answer in another way once the answer is there, the answer begins
    after the last generation prompt in the text. Where there is none, nothing is labelled.
    """
    text = render(chat, *talk)
    before = talk.messages[:-1]
    if text.startswith(render_raw(chat, before, talk.tools)):
        start = _shared(render_prompt(chat, before, talk.tools), text)
    else:
        words = generation_prompt(chat)
        at = text.rfind(words) if words else -1
        start = len(text) if at < 0 else at + len(words)
    return text, [(start, len(text))] if start < len(text) else []


@lru_cache(maxsize=8)
def generation_prompt(chat: ChatFormat) -> str:
    """Return what the template writes to ask for an answer; empty where that is nothing but white space."""
    asked = [{"role": "user", "content": "x"}]
    bare, prompt = render_raw(chat, asked), render_raw(chat, asked, ask=True)
    words = prompt[len(bare) :] if prompt.startswith(bare) else ""
    return words if words.strip() else ""


def _shared(one: str, other: str) -> int:
    """Return how many characters both texts begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, pair in pairs if pair[0] != pair[1]), min(len(one), len(other)))


def _closed(chat: ChatFormat, spans: list[Span], text: str, has_last: bool) -> list[Span]:
    """Return the spans with the end tokens that follow them; the last answer's with the rest of the text."""
    spans = [(start, min(end, len(text))) for start, end in spans if start < min(end, len(text))]
    spans = [(start, end + len(chat.end) * text.startswith(chat.end, end)) for start, end in spans]
    return [*spans[:-1], (spans[-1][0], len(text))] if has_last and spans else spans


def _spoken_spans(chat: ChatFormat, talk: Conversation, wanted: frozenset[int]) -> list[Span]:
    spans, place = [], 0
    for number, message in enumerate(talk.messages):
        turn = render(chat, [message])
        if number in wanted:
            spans.append((place + len(SPEAKERS["assistant"]), place + len(turn)))
        place += len(turn)
    return spans


def _marked(chat: ChatFormat, talk: Conversation, text: str, wanted: frozenset[int]) -> list[Span] | None:
    spans = [(start, end) for start, end in marked_spans(chat, talk) if start < end]
    answers = [place for place, message in enumerate(talk.messages) if message["role"] == "assistant"]
    if not spans:
        raise UserError(
            f"{chat.origin} marks no word of the assistant's in {excerpt(talk.messages)}: with --completion_only_loss "
            "nothing would be learned. Put {% generation %} and {% endgeneration %} around the answers in it."
        )
    unwanted = [place for place in answers if place not in wanted]
    if not unwanted:
        return _closed(chat, spans, text, True)
    if len(spans) == len(answers):
        kept = [span for span, place in zip(spans, answers, strict=True) if place in wanted]
    else:
        found = _found(chat, talk, text)
        if found is None or any(place not in found for place in wanted):
            return None
        words = [found[place].words for place in wanted]
        kept = [span for span in spans if any(start < span[1] and span[0] < end for start, end in words)]
    return _closed(chat, kept, text, answers[-1] in wanted)


def _found(chat: ChatFormat, talk: Conversation, text: str) -> dict[int, Found] | None:
    """Return where each answer stands, by its place; an answer that the template leaves out has none."""
    for way in (_found_by_names, _found_by_prompts):
        try:
            return way(chat, talk, text)
        except Unfound:
            continue
    return None


# --------------------------------------------------------------------------------------- two renderings


def _found_by_names(chat: ChatFormat, talk: Conversation, text: str) -> dict[int, Found]:
    around = surroundings(chat)
    named, words, owners = _named(talk)
    if around is None or any(_NAME.search(word) for word in words):
        raise Unfound
    full = render_raw(chat, *talk)
    try:
        skeleton = render_raw(chat, named, talk.tools)
    except UserError as err:
        raise Unfound from err
    places = _places(skeleton, words, owners, full)
    found: dict[int, Found] = {}
    before = 0
    for number, (place, (first, last)) in enumerate(places):
        limit = places[number + 1][1][0] if number + 1 < len(places) else len(full)
        has_calls = bool(talk.messages[place].get("tool_calls"))
        start = _start(full, before, first, around, has_calls)
        end = _end(full, last, limit, around, has_calls)
        found[place] = Found((first, last), (start, end))
        before = end
    # A call without a word of its own has no name to be found by.
    missing = [place for place in range(len(talk.messages)) if talk.messages[place]["role"] == "assistant"]
    if any(place not in found and place not in owners and has_words(talk.messages[place]) for place in missing):
        raise Unfound
    return found


def _places(skeleton: str, words: list[str], owners: list[int], full: str) -> list[tuple[int, Span]]:
    """Return (answer, range in `full` of its words) in turn; raises Unfound where more than words differs."""
    made, end, ranges = [], 0, {}
    length = 0
    for match in _NAME.finditer(skeleton):
        number = int(match[1])
        if number >= len(words):
            raise Unfound
        literal = skeleton[end : match.start()]
        first = length + len(literal)
        length = first + len(words[number])
        made += [literal, words[number]]
        end = match.end()
        owner = owners[number]
        if ranges and owner < next(reversed(ranges)):
            raise Unfound
        ranges[owner] = (ranges[owner][0] if owner in ranges else first, length)
    made.append(skeleton[end:])
    if "".join(made) != full:
        raise Unfound
    return list(ranges.items())


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


@lru_cache(maxsize=8)
def surroundings(chat: ChatFormat) -> Around | None:
    """Return what the template writes around an answer's words; None where its text tells nothing."""
    asked = [{"role": "user", "content": "xq0qx"}]
    try:
        bare = render_raw(chat, asked)
        prompt = render_raw(chat, asked, ask=True)
        whole = render_raw(chat, [*asked, {"role": "assistant", "content": "xq1qx"}])
    except UserError:
        return None
    at = whole.find("xq1qx")
    if at < 0 or not prompt.startswith(bare) or not whole.startswith(bare):
        return None
    # Some generation prompts begin the answer too (with a thought), which the template does not repeat in it.
    shared = _shared(prompt, whole[:at])
    return Around(whole[len(bare) : shared], whole[shared:at], whole[at + len("xq1qx") :].rstrip())


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
