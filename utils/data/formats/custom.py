"""The user's own data: any file or folder whose columns have known names.

Known are conversations (`messages`), a prompt with an answer (`response`, `completion`, or `chosen` and `rejected`),
and `instruction`, `input` and `output`; `--columns` maps other names to these. A prompt with its answer is treated as a
conversation of two turns, so every format is rendered by `utils.data.formats.chat_template`.
"""

import hashlib
import os
import re
from itertools import islice
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from utils.data.formats import chat_template as chat_format
from utils.data.formats.base import STREAM_EVAL_ROWS, PromptRawDataset, Sample
from utils.data.formats.chat_template import AS_IS, AUTO, TEMPLATE, ChatFormat, Message, resolve_chat_format
from utils.data.reading.arrow_files import SplitData, column_names, is_saved, load_saved, open_saved, place_of_row
from utils.data.reading.find_files import other_files, own_files
from utils.data.reading.schema import CONVERSATION, Schema
from utils.data.reading.streams import stream_saved
from utils.errors import UserError

# (needed roles, optional roles); the first format whose columns exist is used.
FORMATS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("messages",), ()),
    (("prompt", "chosen"), ("rejected",)),
    (("prompt", "response"), ()),
    (("prompt", "completion"), ()),
    (("instruction", "output"), ("input",)),
)
PROMPT_ROLES = ("prompt", "instruction")
ANSWER_ROLES = ("chosen", "response", "completion", "output")
FINISHED_PROMPT = "Assistant:"
ROWS_TRIED = 100
ROLE_NAMES = (
    "messages", "prompt", "chosen", "rejected", "response", "completion", "instruction", "input", "output",
)  # fmt: skip


class OwnOptions(NamedTuple):
    """How the user's own data become text."""

    columns: dict[str, str] = {}  # by role, from `--columns`
    chat: ChatFormat = ChatFormat()


def own_options(
    tokenizer: PreTrainedTokenizerBase,
    end_id: int,
    columns: dict[str, str] | None = None,
    chat_template: str = AUTO,
) -> OwnOptions:
    """Return the options for samples that end in `end_id`; for `chat_template` see `resolve_chat_format`."""
    end_token = tokenizer.convert_ids_to_tokens(end_id)
    return OwnOptions(columns or {}, resolve_chat_format(chat_template, tokenizer, end_token))


def column_roles(found: list[str], given: dict[str, str], origin: str) -> dict[str, str]:
    """Return the column of each role of the format that the columns fit; optional roles are always included.

    Args:
        found: the columns of the data.
        given: columns by role, from `--columns`.

    Raises:
        UserError: the columns fit no known format.
    """
    for needed, optional in FORMATS:
        roles = {role: given.get(role, role) for role in (*needed, *optional)}
        if set(given) <= set(roles) and all(roles[role] in found for role in (*needed, *given)):
            return roles
    known = "; ".join(", ".join((*needed, *(f"({role})" for role in optional))) for needed, optional in FORMATS)
    asked = f" with --columns {','.join(f'{role}={column}' for role, column in given.items())}" if given else ""
    raise UserError(
        f"{origin} has the columns {', '.join(found) or 'none'}{asked}: they are none of these formats: {known}. "
        "Name them with --columns, for example --columns prompt=question,chosen=answer."
    )


class OwnFormatDataset(PromptRawDataset):
    """A file or folder of the user's own; see the top of the module.

    Rows whose prompt or answer is blank have no text and are dropped, as are messages after the last answer of a
    conversation. Evaluation rows come from files (or a split) named for evaluation; without any, a tenth of the rows
    is kept for it.
    """

    def __init__(
        self,
        output_path: str,
        seed: int,
        local_rank: int,
        dataset_name: str,
        options: OwnOptions | None = None,
        streaming: bool = False,
    ) -> None:
        self.options = options or OwnOptions()
        path = os.path.abspath(dataset_name)
        self.dataset_name = "/".join(path.split(os.sep)[-2:])
        self.dataset_name_clean = re.sub(r"[^\w.]", "_", self.dataset_name)
        self.chat = self.options.chat
        self.files_of: dict[str, list[str]] = {}
        super().__init__(output_path, seed, local_rank, dataset_name, streaming)
        self._choose_format()

    def _find_source(self, given: str) -> str:
        return given

    def _load(self) -> dict[str, SplitData]:
        if is_saved(self.source):
            found = open_saved(self.source)
            files_of = own_files(self.source, {name: [name] for name in found})
            names = next(iter(found.values())).column_names
        else:
            files_of = self.files_of = own_files(self.source)
            names = column_names(files_of["train"][0])
        self.roles = column_roles(names, self.options.columns, self.source)
        self.eval_split = "eval" if "eval" in files_of else None
        self.eval_origin = ", ".join(os.path.basename(file) for file in files_of.get("eval", []))
        schema = self._schema()
        if is_saved(self.source):
            load = stream_saved if self.streaming else load_saved
            loaded = load(self.source, [files[0] for files in files_of.values()], schema)
            return {split: loaded[files[0]] for split, files in files_of.items()}
        return {split: self._load_files(files, schema, self.source) for split, files in files_of.items()}

    def _schema(self) -> Schema:
        optional = tuple(self.roles[role] for role in ("rejected", "input") if role in self.roles)
        columns = {column: CONVERSATION if role == "messages" else str for role, column in self.roles.items()}
        needed = tuple(column for column in columns if column not in optional)
        return Schema(columns, optional, needed, (self.roles["messages"],) if "messages" in self.roles else ())

    def _choose_format(self) -> None:
        """Choose how texts are made; prompts that are already rendered stay as they are."""
        if "messages" in self.roles:
            if self.chat.kind == AS_IS:
                raise UserError(f"--chat_template {AS_IS}: {self.source} holds conversations, which need a format.")
        elif self.chat.is_auto:
            rows = islice(self._source_split("train").dataset, ROWS_TRIED)
            if all((self._prompt_text(row) or "").rstrip().endswith(FINISHED_PROMPT) for row in rows):
                origin = f'unchanged, since prompts end in "{FINISHED_PROMPT}"'
                self.chat = ChatFormat(AS_IS, origin=origin)
        self.add_special_tokens = self.chat.kind != TEMPLATE

    def describe(self) -> str:
        """Return a line on what was decided about this data set."""
        rows = self._source_split("train").dataset
        there = rows.column_names or list(next(iter(rows)))
        columns = ", ".join(
            role if role == column else f"{role} = {column}" for role, column in self.roles.items() if column in there
        )
        kept = f"the first {STREAM_EVAL_ROWS} rows" if self.streaming else "a tenth of the rows"
        evaluation = self.eval_origin or kept
        line = f"Data {self.source}: {columns}; texts: {self.chat.origin}; evaluation: {evaluation}"
        if ignored := other_files(self.source, self.files_of) if self.files_of else []:
            line += f"; not read: {', '.join(ignored[:3])}{f' and {len(ignored) - 3} more' * (len(ignored) > 3)}"
        if self.chat.kind == TEMPLATE and _misses_bos(self.chat):
            line += "; no BOS, since the template writes none"
        return line

    def fingerprint(self, split: str) -> str:
        """Return a hash of what the base class includes, the roles of the columns and the format."""
        how = (sorted(self.roles.items()), self.chat.kind, self.chat.template, self.chat.end)
        return hashlib.sha256(f"{super().fingerprint(split)} {how}".encode()).hexdigest()

    # ------------------------------------------------------------------------------------------- texts

    def _prompt_text(self, sample: Sample) -> str | None:
        column = next(self.roles[role] for role in PROMPT_ROLES if role in self.roles)
        text = sample[column]
        extra = sample.get(self.roles.get("input", ""))
        return f"{text}\n{extra}" if text and extra and extra.strip() else text

    def _answer_text(self, sample: Sample, rejected: bool = False) -> str | None:
        roles = ("rejected",) if rejected else ANSWER_ROLES
        column = next((self.roles[role] for role in roles if role in self.roles), "")
        return sample.get(column)

    def _conversation(self, sample: Sample, rejected: bool = False) -> list[Message] | None:
        """Return the messages up to and including the last answer; None where there is nothing to learn."""
        if "messages" not in self.roles:
            prompt, answer = self._prompt_text(sample), self._answer_text(sample, rejected)
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            return None if _is_blank(prompt) or _is_blank(answer) else turns
        messages = None if rejected else sample[self.roles["messages"]]
        while messages and messages[-1]["role"] != "assistant":
            messages = messages[:-1]
        return messages if messages and not _is_blank(messages[-1]["content"]) else None

    def get_prompt(self, sample: Sample) -> str | None:
        """Return the conversation up to where its last answer begins."""
        if self.chat.kind == AS_IS:
            return self._prompt_text(sample)
        messages = self._conversation(sample)
        return None if messages is None else chat_format.render_prompt(self.chat, messages[:-1])

    def get_prompt_and_chosen(self, sample: Sample) -> str | None:
        """Return the conversation with its last answer."""
        return self._joined(sample, rejected=False)

    def get_prompt_and_rejected(self, sample: Sample) -> str | None:
        """Return the conversation with the worse answer."""
        return self._joined(sample, rejected=True)

    def get_chosen(self, sample: Sample) -> str | None:
        """Return what follows the prompt in `get_prompt_and_chosen`."""
        return self._after_prompt(sample, self.get_prompt_and_chosen(sample))

    def get_rejected(self, sample: Sample) -> str | None:
        """Return what follows the prompt in `get_prompt_and_rejected`."""
        return self._after_prompt(sample, self.get_prompt_and_rejected(sample))

    def response_spans(self, sample: Sample, text: str) -> list[tuple[int, int]]:
        """Return the ranges of characters that the assistant wrote, in all turns."""
        if self.chat.kind == AS_IS:
            return super().response_spans(sample, text)
        return chat_format.assistant_spans(self.chat, self._conversation(sample), text)

    def _joined(self, sample: Sample, rejected: bool) -> str | None:
        messages = self._conversation(sample, rejected)
        if messages is None:
            return None
        if self.chat.kind != AS_IS:
            return chat_format.render(self.chat, messages)
        prompt, answer = (message["content"] for message in messages)
        return prompt + answer if prompt[-1].isspace() or answer[0].isspace() else f"{prompt} {answer}"

    def _after_prompt(self, sample: Sample, text: str | None) -> str | None:
        return None if text is None else text[super().response_spans(sample, text)[0][0] :]

    # ------------------------------------------------------------------------------------------ checks

    def try_rows(self, completion_only: bool, limit: int | None = ROWS_TRIED) -> None:
        """Render the first `limit` rows of each split (None: all), to find rows that a template refuses.

        Raises:
            UserError: a row can't be rendered, or (`completion_only`) has no answer to label.
        """
        for split, data in self.raw_datasets.items():
            for place, row in enumerate(islice(data.dataset, limit)):
                try:
                    text = self.get_prompt_and_chosen(row)
                    if completion_only and text is not None:
                        self.response_spans(row, text)
                except UserError as err:
                    where = f"{self.source}, record {place + 1} of the {split} rows"
                    if self.files_of:
                        where = place_of_row(self.files_of[split], place)
                    raise UserError(f"{where}: {err}") from err


def _is_blank(text: Any) -> bool:
    return not text or text.isspace()


def _misses_bos(chat: ChatFormat) -> bool:
    tokenizer = chat.tokenizer
    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    text = chat_format.render(chat, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    return starts and not text.startswith(tokenizer.bos_token)


def parse_columns(text: str | None) -> dict[str, str]:
    """Parse `ROLE=COLUMN,ROLE=COLUMN` into a dict of columns by role.

    Raises:
        UserError: the text is not of that form, or names an unknown role or one role twice.
    """
    columns: dict[str, str] = {}
    for pair in (text or "").split(",") if text is not None else ():
        role, sign, column = (part.strip() for part in pair.partition("="))
        if not sign or not column or role not in ROLE_NAMES:
            raise UserError(
                f'--columns "{text}": {pair!r} is not ROLE=COLUMN with one of the roles {", ".join(ROLE_NAMES)}.'
            )
        if role in columns:
            raise UserError(f'--columns "{text}" names {role} twice.')
        columns[role] = column
    return columns
