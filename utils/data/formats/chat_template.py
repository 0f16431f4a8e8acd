"""Renders a conversation as one text: by a chat template, in the Human/Assistant form, or unchanged.

A template writes all special tokens itself, so its text is tokenized without adding any (`add_special_tokens` False).
It is rendered as text and encoded as a whole, like the texts of every other data set.
"""

import os
import re
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from utils.errors import UserError

Message = dict[str, Any]
Span = tuple[int, int]

AUTO = "auto"
TEMPLATE = "template"
HUMAN_ASSISTANT = "human_assistant"
AS_IS = "none"
SPEAKERS = {"system": " System:", "user": " Human:", "assistant": " Assistant:"}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_EXCERPT = 120


class ChatFormat(NamedTuple):
    """What `--chat_template` means with one tokenizer."""

    kind: str = HUMAN_ASSISTANT  # TEMPLATE, HUMAN_ASSISTANT or AS_IS
    is_auto: bool = True
    template: str = ""
    tokenizer: PreTrainedTokenizerBase | None = None  # its special tokens are the template's variables
    end: str = ""  # the token that ends every sample, as text
    origin: str = "the Human/Assistant form"


def resolve_chat_format(choice: str, tokenizer: PreTrainedTokenizerBase, end_token: str) -> ChatFormat:
    """Return the format that a `--chat_template` means.

    Args:
        choice: `auto` (the tokenizer's own template if it has one, else the Human/Assistant form),
            `human_assistant`, `none` (texts unchanged), or the path of a jinja file.
        end_token: the token that ends every sample, as text.

    Raises:
        UserError: no such file, or a template that does not render.
    """
    is_auto = choice == AUTO
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    if choice == AS_IS:
        return ChatFormat(AS_IS, is_auto, origin="unchanged")
    if choice == HUMAN_ASSISTANT or (is_auto and not own):
        return ChatFormat(HUMAN_ASSISTANT, is_auto)
    if is_auto:
        template, origin = own, "the tokenizer's chat template"
    else:
        template, origin = _read_template(choice), f"the chat template {choice}"
    chat = ChatFormat(TEMPLATE, is_auto, template, tokenizer, end_token, origin)
    render(chat, [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}])
    return chat


def _read_template(path: str) -> str:
    if not os.path.isfile(path):
        raise UserError(
            f"--chat_template {path} is no file: give {AUTO}, {HUMAN_ASSISTANT}, {AS_IS}, or the path of a jinja file."
        )
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as err:
        raise UserError(f"--chat_template {path} cannot be read: {err}.") from err


def render(chat: ChatFormat, messages: list[Message]) -> str:
    """Return the whole conversation as text, without white space after an end token that a template wrote last.

    Raises:
        UserError: the template refuses the conversation, or the format has no place for one of its roles.
    """
    if chat.kind != TEMPLATE:
        return "".join(_turn(message) for message in messages)
    text = _by_template(chat, messages)
    # After a line break, tokenization would add a second end token.
    stripped = text.rstrip()
    return stripped if chat.end and stripped.endswith(chat.end) else text


def render_prompt(chat: ChatFormat, messages: list[Message]) -> str:
    """Return the conversation up to where the assistant's answer begins."""
    if chat.kind != TEMPLATE:
        return "".join(_turn(message) for message in messages) + SPEAKERS["assistant"]
    return _by_template(chat, messages, add_generation_prompt=True) if messages else ""


def assistant_spans(chat: ChatFormat, messages: list[Message], text: str) -> list[Span]:
    """Return the ranges [start, end) of characters in `text`, the rendered conversation, that the assistant wrote.

    A template that marks answers with `{% generation %}` defines them. Otherwise an answer begins where the
    conversation before it, rendered with the generation prompt, ends. What closes an answer belongs to it, since it
    teaches the model to stop: an end token after it, and after the last answer the rest of the text.

    Raises:
        UserError: the template marks nothing in this conversation, or answers can't be found in its text.
    """
    if chat.kind != TEMPLATE:
        return _spoken_spans(messages)
    if _GENERATION.search(chat.template):
        spans = _marked_spans(chat, messages)
    else:
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [_rendered_span(chat, messages, place, text) for place in answers]
    spans = [(start, end + len(chat.end) * text.startswith(chat.end, end)) for start, end in spans if start < end]
    if not spans:
        raise UserError(
            f"{chat.origin} marks no word of the assistant's in {_excerpt(messages)}: with --completion_only_loss "
            "nothing would be learned. Put {% generation %} and {% endgeneration %} around the answers in it."
        )
    return [*spans[:-1], (spans[-1][0], len(text))]


def _turn(message: Message) -> str:
    if message["role"] not in SPEAKERS:
        raise UserError(
            f"the Human/Assistant form has no place for a message of role {message['role']!r} in "
            f"{_excerpt([message])}: give a --chat_template that has."
        )
    return f"{SPEAKERS[message['role']]} {message['content']}"


def _spoken_spans(messages: list[Message]) -> list[Span]:
    spans, place = [], 0
    for message in messages:
        end = place + len(_turn(message))
        if message["role"] == "assistant":
            spans.append((place + len(SPEAKERS["assistant"]), end))
        place = end
    return spans


def _by_template(chat: ChatFormat, messages: list[Message], add_generation_prompt: bool = False) -> str:
    try:
        return chat.tokenizer.apply_chat_template(
            messages, chat_template=chat.template, add_generation_prompt=add_generation_prompt, tokenize=False,
            return_dict=False,
        )  # fmt: skip
    except (TemplateError, TypeError, ValueError, KeyError) as err:
        raise UserError(f"{chat.origin} fails on {_excerpt(messages)}: {err}.") from err


def _marked_spans(chat: ChatFormat, messages: list[Message]) -> list[Span]:
    _, marked = render_jinja_template(
        [messages], chat_template=chat.template, return_assistant_tokens_mask=True, **chat.tokenizer.special_tokens_map
    )
    return [tuple(span) for span in marked[0]]


def _rendered_span(chat: ChatFormat, messages: list[Message], place: int, text: str) -> Span:
    start = len(prompt := render_prompt(chat, messages[:place]))
    until = _by_template(chat, messages[: place + 1]).rstrip()
    if text.startswith(prompt) and text.startswith(until):
        return start, len(until)
    # Some templates (Qwen 3) render the last answer differently from an earlier one, but its own words and what closes
    # it are the same in both.
    content = messages[place]["content"].strip()
    closing = until[until.rfind(content) + len(content) :]
    at = text.find(content + closing, start)
    if not text.startswith(prompt) or content not in until or at < 0:
        raise UserError(
            f"{chat.origin} does not let message {place + 1} be found in {_excerpt(messages)}: put {{% generation %}} "
            "and {% endgeneration %} around the answers in it, or train without --completion_only_loss."
        )
    return start, at + len(content + closing)


def _excerpt(messages: list[Message]) -> str:
    text = " / ".join(f"{message['role']}: {message['content']}" for message in messages)
    return f'the conversation "{text[:_EXCERPT]}{"..." if len(text) > _EXCERPT else ""}"'
