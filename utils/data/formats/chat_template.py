"""Renders a conversation as one text: by a chat template, in the Human/Assistant form, or unchanged.

A template writes all special tokens itself, so its text is tokenized without adding any (`add_special_tokens` False).
It is rendered as text and encoded as a whole, like the texts of every other data set.
"""

import datetime
import json
import os
import re
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from utils.data.formats.column_text import Span
from utils.data.formats.conversations import Conversation, excerpt
from utils.data.reading.messages import Message
from utils.errors import UserError

AUTO = "auto"
TEMPLATE = "template"
HUMAN_ASSISTANT = "human_assistant"
AS_IS = "none"
SPEAKERS = {"system": " System:", "user": " Human:", "assistant": " Assistant:"}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CLOCK = "strftime_now"  # what transformers gives templates to ask for the date
_FAILURES = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)


class ChatFormat(NamedTuple):
    """What `--chat_template` means with one tokenizer."""

    kind: str = HUMAN_ASSISTANT  # TEMPLATE, HUMAN_ASSISTANT or AS_IS
    is_auto: bool = True
    template: str = ""
    tokenizer: PreTrainedTokenizerBase | None = None  # its special tokens are the template's variables
    end: str = ""  # the token that ends every sample, as text
    origin: str = "the Human/Assistant form"
    tool_template: str = ""  # the tokenizer's own for conversations with tools, where it has one
    date: str = ""  # the date that the template sees, as YYYY-MM-DD; empty where it asks for none
    text_arguments: bool = False  # the template reads the arguments of a call as JSON text
    developer_as_system: bool = False  # the template has no place for the role developer
    content_as_parts: bool = False  # the template reads content as a list of parts, and no text

    @property
    def is_template(self) -> bool:
        """Whether a template makes the text."""
        return self.kind == TEMPLATE

    @property
    def marks_answers(self) -> bool:
        """Whether the template marks answers with `{% generation %}`."""
        return bool(_GENERATION.search(self.template))

    def for_tools(self, tools: Any) -> "ChatFormat":
        """Return the format of a conversation with these tools."""
        return self._replace(template=self.tool_template) if tools and self.tool_template else self


def resolve_chat_format(
    choice: str, tokenizer: PreTrainedTokenizerBase, end_token: str, date: str | None = None
) -> ChatFormat:
    """Return the format that a `--chat_template` means.

    Args:
        choice: `auto` (the tokenizer's own template if it has one, else the Human/Assistant form),
            `human_assistant`, `none` (texts unchanged), or the path of a jinja file.
        end_token: the token that ends every sample, as text.
        date: the date that the template sees, as YYYY-MM-DD; None: today.

    Raises:
        UserError: no such file, or a template that does not render.
    """
    is_auto = choice == AUTO
    own = tokenizer.chat_template
    with_tools = own.get("tool_use", "") if isinstance(own, dict) else ""
    own = own.get("default") if isinstance(own, dict) else own
    if choice == AS_IS:
        return ChatFormat(AS_IS, is_auto, origin="unchanged")
    if choice == HUMAN_ASSISTANT or (is_auto and not own):
        return ChatFormat(HUMAN_ASSISTANT, is_auto)
    if is_auto:
        template, origin = own, "the tokenizer's chat template"
    else:
        template, origin, with_tools = _read_template(choice), f"the chat template {choice}", ""
    chat = ChatFormat(TEMPLATE, is_auto, template, tokenizer, end_token, origin, with_tools)
    if _CLOCK in template + with_tools:
        chat = chat._replace(date=date or datetime.date.today().isoformat())
    chat = _with_habits(chat)
    render(chat, [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}])
    return chat


def _with_habits(chat: ChatFormat) -> ChatFormat:
    """Return the format with what the template can't read noted: texts, arguments that are objects, developers."""
    user, answer = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}
    if "Hello" not in (_attempt(chat, [user, answer]) or "") and "content" in chat.template:
        as_parts = chat._replace(content_as_parts=True)
        chat = as_parts if "Hello" in (_attempt(as_parts, [user, answer]) or "") else chat
    arguments = {"xq0qx": "xq1qx"}
    call = {"id": "call00000", "type": "function", "function": {"name": "xq2qx", "arguments": arguments}}
    talk = [user, {"role": "assistant", "content": "", "tool_calls": [call]}]
    tool = {"type": "function", "function": {"name": "xq2qx", "description": "", "parameters": {}}}
    of_tools = chat.for_tools([tool])
    if "tool_calls" in of_tools.template:
        as_object = _attempt(of_tools, talk, [tool])
        as_text = _attempt(of_tools._replace(text_arguments=True), talk, [tool])
        is_bad = as_object is None or str(arguments) in as_object
        chat = chat._replace(text_arguments=is_bad and as_text is not None and json.dumps(arguments) in as_text)
    developer = {"role": "developer", "content": "xq0qx"}
    if "xq0qx" not in (_attempt(chat, [developer, user, answer]) or ""):
        as_system = chat._replace(developer_as_system=True)
        chat = as_system if "xq0qx" in (_attempt(as_system, [developer, user, answer]) or "") else chat
    return chat


def _attempt(chat: ChatFormat, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str | None:
    try:
        return render_raw(chat, messages, tools)
    except UserError:
        return None


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


def render(chat: ChatFormat, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
    """Return the whole conversation as text, without white space after an end token that a template wrote last.

    Raises:
        UserError: the template refuses the conversation, or the format has no place for one of its roles.
    """
    text = render_raw(chat, messages, tools)
    if not chat.is_template:
        return text
    # After a line break, tokenization would add a second end token.
    stripped = text.rstrip()
    return stripped if chat.end and stripped.endswith(chat.end) else text


def render_prompt(chat: ChatFormat, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
    """Return the conversation up to where the assistant's answer begins."""
    if chat.is_template:
        return render_raw(chat, messages, tools, ask=True) if messages else ""
    return render_raw(chat, messages) + SPEAKERS["assistant"]


def render_raw(
    chat: ChatFormat, messages: list[Message], tools: list[dict[str, Any]] | None = None, ask: bool = False
) -> str:
    """Return exactly what the format makes of the messages.

    Args:
        ask: end with the generation prompt of a template.

    Raises:
        UserError: see `render`.
    """
    if not chat.is_template:
        return "".join(_turn(message) for message in messages)
    chat = chat.for_tools(tools)
    _fix_clock(chat)
    try:
        return chat.tokenizer.apply_chat_template(
            _as_read(chat, messages), tools=tools, chat_template=chat.template, add_generation_prompt=ask,
            tokenize=False, return_dict=False,
        )  # fmt: skip
    except _FAILURES as err:
        raise UserError(f"{chat.origin} fails on {excerpt(messages)}: {err}.") from err


def marked_spans(chat: ChatFormat, talk: Conversation) -> list[Span]:
    """Return the ranges of characters that the template marks with `{% generation %}`."""
    chat = chat.for_tools(talk.tools)
    _fix_clock(chat)
    _, marked = render_jinja_template(
        [_as_read(chat, talk.messages)], tools=talk.tools, chat_template=chat.template,
        return_assistant_tokens_mask=True, **chat.tokenizer.special_tokens_map,
    )  # fmt: skip
    return [tuple(span) for span in marked[0]]


def _as_read(chat: ChatFormat, messages: list[Message]) -> list[Message]:
    """Return the messages as the template reads them."""
    if chat.content_as_parts:
        messages = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]
    if chat.developer_as_system:
        messages = [message | {"role": "system"} if message["role"] == "developer" else message for message in messages]
    if chat.text_arguments:
        messages = [
            message | {"tool_calls": [_text_call(call) for call in message["tool_calls"]]}
            if "tool_calls" in message
            else message
            for message in messages
        ]
    return messages


def _text_call(call: dict[str, Any]) -> dict[str, Any]:
    arguments = call["function"].get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return call | {"function": call["function"] | {"arguments": text}}


def _fix_clock(chat: ChatFormat) -> None:
    """Have the compiled template see the format's date where it asks for today's."""
    if chat.date:
        day = datetime.datetime.fromisoformat(chat.date)
        _compile_jinja_template(chat.template).globals[_CLOCK] = lambda form: day.strftime(form)


def _turn(message: Message) -> str:
    role = "system" if message["role"] == "developer" else message["role"]
    if role not in SPEAKERS or message.get("tool_calls"):
        what = f"a message of role {message['role']!r}" if role not in SPEAKERS else "the call of a tool"
        raise UserError(
            f"the Human/Assistant form has no place for {what} in {excerpt([message])}: give a --chat_template that "
            "has."
        )
    return f"{SPEAKERS[role]} {message['content']}"
