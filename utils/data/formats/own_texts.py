"""Makes texts of the rows of the user's own data: rendered by a format, or as they stand."""

from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from utils.data.formats import chat_template as chat_format
from utils.data.formats.base import PromptRawDataset, RowTexts
from utils.data.formats.chat_template import AS_IS, AUTO, ChatFormat, resolve_chat_format
from utils.data.formats.column_text import Sample, Span
from utils.data.formats.conversations import (
    MARKS,
    PROMPT_ROLES,
    REASONING,
    TALK_ROLES,
    Conversation,
    Rows,
    has_words,
    is_blank,
    is_trained,
)
from utils.data.formats.findings import left_out, unread_fields
from utils.data.formats.labels import answer_spans, last_answer
from utils.data.formats.rendered import MARKED, Rendering, rendering_of
from utils.data.formats.roles import BESIDE
from utils.data.formats.token_rows import read_token_row
from utils.data.outcomes import Note, Reason
from utils.data.reading.messages import Malformed, Message
from utils.errors import UserError

LAST = "last"
NO_VALUES = frozenset(("nan", "NaN", "<NA>", "None", "null", "NULL"))


class OwnOptions(NamedTuple):
    """How the user's own data become text."""

    columns: dict[str, str] = {}  # by role, from `--columns`
    chat: ChatFormat = ChatFormat()
    train_turns: str = "all"  # or "last": which answers are labelled with --completion_only_loss
    tokenizer: PreTrainedTokenizerBase | None = None  # None: special tokens in texts are not recognized
    evaluates: bool = False  # the data are for evaluation alone
    columns_of_others: bool = False  # `columns` may be meant for other data sets of the run


def own_options(
    tokenizer: PreTrainedTokenizerBase,
    end_id: int,
    columns: dict[str, str] | None = None,
    chat_template: str = AUTO,
    train_turns: str = "all",
    date: str | None = None,
) -> OwnOptions:
    """Return the options for samples that end in `end_id`; for `chat_template` and `date` see `resolve_chat_format`."""
    end_token = tokenizer.convert_ids_to_tokens(end_id)
    chat = resolve_chat_format(chat_template, tokenizer, end_token, date)
    return OwnOptions(columns or {}, chat, train_turns, tokenizer)


class OwnTexts(PromptRawDataset):
    """The texts of rows whose columns `rows` reads, in the format `chat`; a subclass opens files and sets these."""

    options: OwnOptions
    rows: Rows
    chat: ChatFormat
    may_be_rendered: bool  # prompts that are rendered already stay as they are, each row for itself

    @property
    def roles(self) -> dict[str, str]:
        """The column of each role."""
        return self.rows.roles

    def conversation(self, sample: Sample, rejected: bool = False) -> Conversation | None:
        """Return the row as a conversation up to and including its last answer; None where there is nothing to learn.

        Raises:
            UserError: a column holds something else.
        """
        return self._read(sample, rejected)[0]

    def _read(self, sample: Sample, rejected: bool = False) -> tuple[Conversation | None, int]:
        try:
            return self.rows.read(sample, rejected)
        except Malformed as err:
            raise UserError(f"{err}.") from err

    @cached_property
    def _special(self) -> tuple[str | None, tuple[str, ...]]:
        """BOS and all special tokens of the tokenizer, as text."""
        tokenizer = self.options.tokenizer
        if tokenizer is None:
            return None, ()
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        return tokenizer.bos_token, tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))

    def rendering(self, sample: Sample) -> Rendering | None:
        """Return how the row's prompt meets its answer where both are used as they stand; None for rows to render."""
        if "text" in self.roles or self.has_ids:
            return MARKED
        if self.chat.kind != AS_IS and not self.may_be_rendered:
            return None
        prompt = self.rows.prompt_text(sample)
        is_text = isinstance(prompt, str)
        rendering = MARKED if self.chat.kind == AS_IS else rendering_of(prompt, *self._special) if is_text else None
        if rendering is None or not (isinstance(prompt, (list, dict)) or self.rows.is_talk(sample)):
            return rendering
        if self.chat.kind == AS_IS:
            raise UserError(f"it holds messages, which need a format: --chat_template {AS_IS} has none.")
        try:
            if self.rows.is_talk(sample, whole=True):
                return None
        except Malformed as err:
            raise UserError(f"{err}.") from err
        raise UserError(
            "its prompt is a text that is rendered already, and its answer holds messages: write both in one form."
        )

    def adds_special(self, sample: Sample) -> bool:
        """Whether the tokenizer adds its special tokens to the row's text: a template writes them itself."""
        return not self.chat.is_template or self.rendering(sample) is not None

    # ------------------------------------------------------------------------------------------- texts

    def get_prompt(self, sample: Sample) -> str | None:
        """Return the conversation up to where its last answer begins; None for whole texts and token ids."""
        if self.rendering(sample) is not None:
            return self.rows.prompt_text(sample) if self.rows.role_of(PROMPT_ROLES) else None
        talk = self.conversation(sample)
        return None if talk is None else chat_format.render_prompt(self.chat, talk.messages[:-1], talk.tools)

    def reference(self, sample: Sample) -> str | None:
        """Return the row's last answer in its own words, without what a format puts around it; None where it has none.

        Reasoning and calls beside the answer are left out.
        """
        if "text" in self.roles or self.has_ids:
            return None
        if self.rendering(sample) is not None:
            answer = self.rows.answer(sample)
            return answer if isinstance(answer, str) else None
        talk = self.conversation(sample)
        content = None if talk is None else talk.messages[-1]["content"]
        return content if isinstance(content, str) else None

    def get_prompt_and_chosen(self, sample: Sample) -> str | None:
        """Return the conversation with its last answer."""
        return self._joined(sample, rejected=False)

    def get_prompt_and_rejected(self, sample: Sample) -> str | None:
        """Return the conversation with the worse answer."""
        return None if "rejected" not in self.roles else self._joined(sample, rejected=True)

    def get_chosen(self, sample: Sample) -> str | None:
        """Return what follows the prompt in `get_prompt_and_chosen`."""
        return self._after_prompt(sample, self.get_prompt_and_chosen(sample))

    def get_rejected(self, sample: Sample) -> str | None:
        """Return what follows the prompt in `get_prompt_and_rejected`."""
        return self._after_prompt(sample, self.get_prompt_and_rejected(sample))

    def _joined(self, sample: Sample, rejected: bool) -> str | None:
        rendering = self.rendering(sample)
        if rendering is None:
            talk = self.conversation(sample, rejected)
            return None if talk is None else chat_format.render(self.chat, talk.messages, talk.tools)
        if self.has_ids:
            ids, tokenizer = self.given_ids(sample)[0], self.options.tokenizer
            return None if not ids else " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)
        if "text" in self.roles:
            text = sample[self.roles["text"]]
            return None if is_blank(text) else text
        prompt, answer = self.rows.prompt_text(sample), self.rows.answer(sample, rejected)
        if is_blank(prompt) or is_blank(answer):
            return None
        return prompt + answer if prompt[-1].isspace() or answer[0].isspace() else f"{prompt}{rendering.gap}{answer}"

    def _after_prompt(self, sample: Sample, text: str | None) -> str | None:
        if text is None or "text" in self.roles or self.has_ids:
            return text
        return text[super().response_spans(sample, text)[0][0] :]

    def response_spans(self, sample: Sample, text: str) -> list[Span]:
        """Return the ranges of characters in the text of a row that is used as it stands which are the answer."""
        return [(0, len(text))] if "text" in self.roles else super().response_spans(sample, text)

    # ----------------------------------------------------------------------------------- rows of a phase

    def read_row(self, sample: Sample, phase: int = 1, labels: bool = False) -> RowTexts:
        """Return what the row gives a phase; see the base class."""
        if phase != 1:
            return super().read_row(sample, phase)._replace(adds_special=self.adds_special(sample))
        if self.rendering(sample) is not None:
            return self._as_it_stands(sample, labels)
        talk, unanswered = self._read(sample)
        if talk is None:
            return RowTexts([], dropped=self.why_no_text(sample))
        if not labels:
            _refuse_unlabelled(talk)
        text = chat_format.render(self.chat, *talk)
        found = self._labelled(talk, text) if labels else [(text, [])]
        shown = text if len(found) == 1 else "\n".join(part for part, _ in found)
        has_others, fields = self.rows.beside_answer(sample)
        notes = _notes_on(talk, unanswered, len(found), has_others)
        notes += (Note.OTHER_PROMPT,) * self.rows.leaves_prompt(sample)
        notes += tuple(sorted(left_out(self.chat, talk, shown)))
        unread = (*unread_fields(self.chat, talk, text), *fields)
        texts, spans = [(text,) for text, _ in found], [ranges for _, ranges in found]
        if labels and not any(spans):
            return RowTexts([], dropped=Reason.NO_LABEL, unread=unread)
        return RowTexts(texts, spans if labels else [], 0, notes, _words(talk), not self.chat.is_template, unread)

    def _as_it_stands(self, sample: Sample, labels: bool) -> RowTexts:
        row = super().read_row(sample, 1, labels)
        notes = [] if self.chat.kind == AS_IS or row.dropped else [Note.RENDERED]
        if notes and any(not is_blank(self.rows.value(sample, role)) for role in BESIDE):
            notes.append(Note.BESIDE)
        if "text" in self.roles or row.dropped:
            return row._replace(notes=tuple(notes), adds_special=True)
        has_others, fields = self.rows.beside_answer(sample)
        notes += [Note.OTHER_ANSWERS] * has_others
        return row._replace(notes=tuple(notes), adds_special=True, unread=tuple(fields))

    def why_no_text(self, sample: Sample) -> Reason:
        """Return why a row has no text with its answer."""
        if "text" in self.roles or self.has_ids:
            return Reason.NO_TEXT
        is_pair = self.rows.role_of(TALK_ROLES) is None and self.rows.role_of(PROMPT_ROLES) is not None
        prompt = self.rows.prompt_text(sample) if is_pair else None
        return Reason.NO_TEXT if is_pair and is_blank(prompt) else Reason.NO_ANSWER

    def _labelled(self, talk: Conversation, text: str) -> list[tuple[str, list[Span]]]:
        """Return the text with the ranges the assistant wrote; a text an answer where these can't be found in one."""
        wanted = self._wanted(talk)
        spans = answer_spans(self.chat, talk, text, wanted) if wanted else []
        if spans is not None:
            return [(text, spans)]
        return [last_answer(self.chat, talk._replace(messages=talk.messages[: place + 1])) for place in sorted(wanted)]

    def _wanted(self, talk: Conversation) -> frozenset[int]:
        """Return the places of the answers to label."""
        answers = [place for place, message in enumerate(talk.messages) if message["role"] == "assistant"]
        answers = answers[-1:] if self.options.train_turns == LAST else answers
        return frozenset(
            place for place in answers if is_trained(talk.messages[place]) and has_words(talk.messages[place])
        )

    def given_ids(self, sample: Sample, may_mask: bool = True) -> tuple[list[int], list[int]]:
        """Return the token ids of a row that brings them, and the starts and ends of their labels in turn."""
        return read_token_row(self.rows, sample, self.options.tokenizer, may_mask)

    def check_row(self, sample: Sample, labels: bool) -> None:
        """Raise UserError where the row can't be rendered, labelled, or trained as it asks to be."""
        if self.has_ids:
            self.given_ids(sample, labels)
        else:
            self.read_row(sample, 1, labels)


def _refuse_unlabelled(talk: Conversation) -> None:
    """Raise UserError where a message says that it is not to be learned: without spans all of a text is."""
    for place, message in enumerate(talk.messages):
        if message["role"] == "assistant" and not is_trained(message):
            name = next(mark for mark in sorted(MARKS) if not message.get(mark, 1))
            raise UserError(
                f"message {place + 1} has {name} {message[name]}, so it is not to be learned: give "
                "--completion_only_loss, which labels the other answers alone."
            )


def _notes_on(talk: Conversation, unanswered: int, samples: int, has_others: bool) -> tuple[int, ...]:
    """Return what is to be said of a conversation that gives so many samples."""
    blank = [message["role"] == "assistant" for message in talk.messages if not has_words(message)]
    found = {
        Note.BLANK_ANSWER: any(blank), Note.BLANK_TURN: not all(blank), Note.UNANSWERED: unanswered > 0,
        Note.SPLIT_ROW: samples > 1, Note.OTHER_ANSWERS: has_others,
        Note.NO_VALUE: talk.messages[-1]["content"].strip() in NO_VALUES,
    }  # fmt: skip
    return tuple(note for note, holds in found.items() if holds)


def _words(talk: Conversation) -> tuple[str, ...]:
    """Return the texts of all messages."""
    return tuple(text for message in talk.messages for text in _texts_of(message))


def _texts_of(message: Message) -> list[str]:
    values: list[Any] = [message["content"], *(message.get(name) for name in REASONING)]
    return [value for value in values if value and isinstance(value, str)]
