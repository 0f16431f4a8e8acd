"""Tells what the assistant wrote in a rendered conversation: the characters that are labelled.

A template that marks answers with `{% generation %}` says it; for any other, answers are found as they are rendered
(see `utils.data.formats.find_answers`), and where that does not find them, each becomes a sample of its own.
"""

from utils.data.formats.chat_template import SPEAKERS, ChatFormat, marked_spans, render, render_prompt, render_raw
from utils.data.formats.column_text import Span
from utils.data.formats.conversations import Conversation, excerpt
from utils.data.formats.find_answers import find_answers, generation_prompt, shared_start
from utils.errors import UserError


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
    found = find_answers(chat, talk, text)
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
        start = shared_start(render_prompt(chat, before, talk.tools), text)
    else:
        words = generation_prompt(chat)
        at = text.rfind(words) if words else -1
        start = len(text) if at < 0 else at + len(words)
    return text, [(start, len(text))] if start < len(text) else []


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
        found = find_answers(chat, talk, text)
        if found is None or any(place not in found for place in wanted):
            return None
        words = [found[place].words for place in wanted]
        kept = [span for span in spans if any(start < span[1] and span[0] < end for start, end in words)]
    return _closed(chat, kept, text, answers[-1] in wanted)
