"""The user's own data: any file or folder whose columns have known names.

Known are conversations, a prompt with an answer, a task with its input and output, whole texts, and token ids (see
`utils.data.formats.columns`); `--columns` maps other names to these. A prompt with its answer is treated as a
conversation of two turns, so every format is rendered by `utils.data.formats.chat_template`.
"""

import hashlib
import os
import re
from itertools import islice
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from utils.data.formats import chat_template as chat_format
from utils.data.formats.base import STREAM_EVAL_ROWS, PromptRawDataset, Sample
from utils.data.formats.chat_template import AS_IS, AUTO, TEMPLATE, ChatFormat, resolve_chat_format
from utils.data.formats.columns import ROWS_TRIED, column_roles, first_rows, read_as
from utils.data.formats.conversations import (
    PROMPT_ROLES,
    TALK_ROLES,
    Conversation,
    has_words,
    is_blank,
    is_trained,
)
from utils.data.formats.findings import look_at
from utils.data.formats.labels import answer_spans, last_answer
from utils.data.formats.roles import parse_columns
from utils.data.reading.arrow_files import SplitData, column_names, is_saved, load_saved, open_saved, place_of_row
from utils.data.reading.find_files import other_files, own_files
from utils.data.reading.messages import Malformed
from utils.data.reading.streams import stream_saved
from utils.errors import UserError

__all__ = ["OwnFormatDataset", "OwnOptions", "own_options", "parse_columns"]

FINISHED_PROMPT = "Assistant:"
LAST = "last"


class OwnOptions(NamedTuple):
    """How the user's own data become text."""

    columns: dict[str, str] = {}  # by role, from `--columns`
    chat: ChatFormat = ChatFormat()
    train_turns: str = "all"  # or "last": which answers are labelled with --completion_only_loss


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
    return OwnOptions(columns or {}, resolve_chat_format(chat_template, tokenizer, end_token, date), train_turns)


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
            self.found = next(iter(found.values())).column_names
            rows = (
                found[files_of["train"][0]].select(range(min(ROWS_TRIED, len(found[files_of["train"][0]])))).to_list()
            )
        else:
            files_of = self.files_of = own_files(self.source)
            self.found, rows = column_names(files_of["train"]), first_rows(files_of["train"])
        roles = column_roles(self.found, self.options.columns, self.source)
        self.rows, schema = read_as(roles, rows)
        self.eval_split = "eval" if "eval" in files_of else None
        self.eval_origin = ", ".join(os.path.basename(file) for file in files_of.get("eval", []))
        if is_saved(self.source):
            load = stream_saved if self.streaming else load_saved
            loaded = load(self.source, [files[0] for files in files_of.values()], schema)
            return {split: loaded[files[0]] for split, files in files_of.items()}
        return {split: self._load_files(files, schema, self.source) for split, files in files_of.items()}

    @property
    def roles(self) -> dict[str, str]:
        """The column of each role."""
        return self.rows.roles

    def _choose_format(self) -> None:
        """Choose how texts are made; prompts that are already rendered stay as they are."""
        self.gap = " "  # between prompt and answer that stay as they are, where neither has white space there
        self.has_ids = "input_ids" in self.roles
        has_talks = any(role in self.roles for role in TALK_ROLES) or bool(self.rows.whole & self._talk_columns())
        if "text" in self.roles or self.has_ids:
            self.chat = ChatFormat(
                AS_IS, origin="as they stand, all of it labelled" if not self.has_ids else "token ids"
            )
        elif self.chat.kind == AS_IS:
            self.gap = ""
            if has_talks:
                raise UserError(f"--chat_template {AS_IS}: {self.source} holds conversations, which need a format.")
        elif self.chat.is_auto and not has_talks:
            self._keep_rendered_prompts()
        self.add_special_tokens = self.chat.kind != TEMPLATE

    def _talk_columns(self) -> set[str]:
        beside = {self.roles.get(role) for role in ("tools", "history")}
        return set(self.roles.values()) - beside

    def _keep_rendered_prompts(self) -> None:
        rows = list(islice(self._source_split("train").dataset, ROWS_TRIED))
        prompts = [self.rows.prompt_text(row) or "" for row in rows]
        if all(prompt.rstrip().endswith(FINISHED_PROMPT) for prompt in prompts):
            self.chat = ChatFormat(AS_IS, origin=f'unchanged, since prompts end in "{FINISHED_PROMPT}"')
        tokenizer = self.options.chat.tokenizer
        bos = None if tokenizer is None else tokenizer.bos_token
        if bos and all(prompt.startswith(bos) for prompt in prompts):
            self.gap = ""
            self.chat = ChatFormat(AS_IS, tokenizer=tokenizer, origin=f'unchanged, since prompts begin with "{bos}"')

    def describe(self) -> str:
        """Return lines on what was decided about this data set, and on what of it is not used."""
        columns = ", ".join(
            role if role == column else f"{role} = {column}"
            for role, column in self.roles.items()
            if column in self.found
        )
        kept = f"the first {STREAM_EVAL_ROWS} rows" if self.streaming else "a tenth of the rows"
        evaluation = self.eval_origin or kept
        line = f"Data {self.source}: {columns}; texts: {self.chat.origin}; evaluation: {evaluation}"
        if ignored := other_files(self.source, self.files_of) if self.files_of else []:
            line += f"; not read: {', '.join(ignored[:3])}{f' and {len(ignored) - 3} more' * (len(ignored) > 3)}"
        if self.chat.kind == TEMPLATE and _misses_bos(self.chat):
            line += "; no BOS, since the template writes none"
        if self.chat.date:
            line += f"; the template writes the date, which is {self.chat.date} in this run"
        return "\n".join([line, *(f"Data {self.source}: {finding}" for finding in self._findings())])

    def _findings(self) -> list[str]:
        rows = list(islice(self._source_split("train").dataset, ROWS_TRIED))
        unused = [name for name in self.found if name not in self.roles.values()]
        if self.chat.kind == AS_IS:
            unused += [
                self.roles[role] for role in ("system", "history", "tools") if self.roles.get(role) in self.found
            ]
            return [f"not used: {', '.join(unused)}"] if unused else []
        return look_at(self.chat, [talk for row in rows if (talk := self.conversation(row)) is not None], unused)

    def fingerprint(self, split: str) -> str:
        """Return a hash of what the base class includes, the roles of the columns and the format."""
        chat = self.chat
        how = (sorted(self.roles.items()), chat.kind, chat.template, chat.tool_template, chat.end, chat.date, self.gap)
        return hashlib.sha256(f"{super().fingerprint(split)} {how} {self.options.train_turns}".encode()).hexdigest()

    # ------------------------------------------------------------------------------------------- texts

    def conversation(self, sample: Sample, rejected: bool = False) -> Conversation | None:
        """Return the row as a conversation up to and including its last answer; None where there is nothing to learn.

        Raises:
            UserError: a column holds something else.
        """
        try:
            return self.rows.conversation(sample, rejected)
        except Malformed as err:
            raise UserError(f"{err}.") from err

    def get_prompt(self, sample: Sample) -> str | None:
        """Return the conversation up to where its last answer begins; None for whole texts and token ids."""
        if self.chat.kind == AS_IS:
            return self.rows.prompt_text(sample) if self.rows.role_of(PROMPT_ROLES) else None
        talk = self.conversation(sample)
        return None if talk is None else chat_format.render_prompt(self.chat, talk.messages[:-1], talk.tools)

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

    def labelled_texts(self, sample: Sample) -> list[tuple[str, list[tuple[int, int]]]]:
        """Return the row's text with the ranges the assistant wrote; a text an answer where these can't be found."""
        text = self.get_prompt_and_chosen(sample)
        if text is None or self.chat.kind == AS_IS:
            return [] if text is None else [(text, self.response_spans(sample, text))]
        talk = self.conversation(sample)
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

    def response_spans(self, sample: Sample, text: str) -> list[tuple[int, int]]:
        """Return the ranges of characters that the assistant wrote, in all turns."""
        if "text" in self.roles:
            return [(0, len(text))]
        if self.chat.kind == AS_IS:
            return super().response_spans(sample, text)
        return self.labelled_texts(sample)[0][1]

    def _joined(self, sample: Sample, rejected: bool) -> str | None:
        if self.chat.kind != AS_IS:
            talk = self.conversation(sample, rejected)
            return None if talk is None else chat_format.render(self.chat, talk.messages, talk.tools)
        if self.has_ids:
            tokenizer = self.options.chat.tokenizer
            ids = sample[self.roles["input_ids"]]
            return None if not ids else " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)
        if "text" in self.roles:
            text = sample[self.roles["text"]]
            return None if is_blank(text) else text
        prompt, answer = self.rows.prompt_text(sample), self.rows.answer(sample, rejected)
        if is_blank(prompt) or is_blank(answer):
            return None
        return prompt + answer if prompt[-1].isspace() or answer[0].isspace() else f"{prompt}{self.gap}{answer}"

    def _after_prompt(self, sample: Sample, text: str | None) -> str | None:
        if text is None or "text" in self.roles or self.has_ids:
            return text
        return text[super().response_spans(sample, text)[0][0] :]

    # ------------------------------------------------------------------------------------------ checks

    def check_row(self, sample: Sample, completion_only: bool) -> None:
        """Raise UserError where the row can't be rendered, labelled, or trained as it asks to be."""
        if self.has_ids:
            labels = sample.get(self.roles.get("labels", ""))
            self.given_ids(sample, completion_only or labels is None)
            return
        text = self.get_prompt_and_chosen(sample)
        if text is None or self.chat.kind == AS_IS:
            return
        if completion_only:
            self.labelled_texts(sample)
        else:
            self.refuse_unlabelled(sample)

    def refuse_unlabelled(self, sample: Sample) -> None:
        """Raise UserError where a message says that it is not to be learned: without spans all of a text is."""
        if not _may_say_not_to_learn(sample):
            return
        talk = self.conversation(sample)
        for place, message in enumerate(() if talk is None else talk.messages):
            if message["role"] == "assistant" and not is_trained(message):
                name = "weight" if not message.get("weight", 1) else "train"
                raise UserError(
                    f"message {place + 1} has {name} {message[name]}, so it is not to be learned: give "
                    "--completion_only_loss, which labels the other answers alone."
                )

    def given_ids(self, sample: Sample, may_mask: bool = True) -> tuple[list[int], list[int]]:
        """Return the token ids of a row that brings them, and the starts and ends of their labels in turn."""
        ids = sample[self.roles["input_ids"]] or []
        labels = sample.get(self.roles.get("labels", "")) or ids
        tokenizer = self.options.chat.tokenizer
        if any(token is None or token < 0 or (tokenizer and token >= len(tokenizer)) for token in ids):
            raise UserError("input_ids holds ids that this tokenizer does not have: tokenize the data with it.")
        if len(labels) != len(ids) or any(label not in (-100, token) for label, token in zip(labels, ids, strict=True)):
            raise UserError("labels must be the row's own input_ids, with -100 where nothing is to be learned.")
        if not may_mask and -100 in labels[1:]:
            raise UserError("labels leaves tokens out with -100: give --completion_only_loss, which reads them.")
        edges = [at for at in range(1, len(ids)) if (labels[at] == -100) != (at == 1 or labels[at - 1] == -100)]
        edges = edges if len(edges) % 2 == 0 else [*edges, len(ids)]
        return ids, edges

    def try_rows(self, completion_only: bool, limit: int | None = ROWS_TRIED) -> None:
        """Render the first `limit` rows of each split (None: all), to find rows that a template refuses.

        Raises:
            UserError: a row can't be rendered, or (`completion_only`) has no answer to label.
        """
        for split, data in self.raw_datasets.items():
            for place, row in enumerate(islice(data.dataset, limit)):
                try:
                    self.check_row(row, completion_only)
                except UserError as err:
                    where = f"{self.source}, record {place + 1} of the {split} rows"
                    if self.files_of:
                        where = place_of_row(self.files_of[split], place)
                    raise UserError(f"{where}: {err}") from err


def _may_say_not_to_learn(sample: Sample) -> bool:
    """Whether a `weight` or `train` stands in the row: most rows need no second look."""
    values = (value if isinstance(value, str) else repr(value) for value in sample.values())
    return any("weight" in value or "train" in value for value in values)


def _misses_bos(chat: ChatFormat) -> bool:
    tokenizer = chat.tokenizer
    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    text = chat_format.render(chat, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    return starts and not text.startswith(tokenizer.bos_token)
