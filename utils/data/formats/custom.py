"""The user's own data: any file or folder whose columns have known names.

Known are conversations, a prompt with an answer, a task with its input and output, whole texts, and token ids (see
`utils.data.formats.columns`); `--columns` maps other names to these. A prompt with its answer is treated as a
conversation of two turns, so every format is rendered by `utils.data.formats.chat_template`.
"""

import hashlib
import os
import re
from itertools import islice

import datasets

from utils.data.formats import chat_template as chat_format
from utils.data.formats.base import STREAM_EVAL_ROWS
from utils.data.formats.chat_template import AS_IS, TEMPLATE, ChatFormat
from utils.data.formats.columns import ROWS_TRIED, column_roles, first_rows, read_as, with_answers_beside
from utils.data.formats.conversations import PROMPT_ROLES, TALK_ROLES
from utils.data.formats.own_texts import OwnOptions, OwnTexts, own_options
from utils.data.formats.roles import BESIDE, parse_columns
from utils.data.reading.arrow_files import SplitData, is_saved, load_saved, open_saved
from utils.data.reading.data_files import column_names, place_of_row
from utils.data.reading.find_files import other_files, own_files
from utils.data.reading.streams import stream_saved
from utils.errors import UserError

__all__ = ["OwnFormatDataset", "OwnOptions", "own_options", "parse_columns"]


class OwnFormatDataset(OwnTexts):
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
        self.unread: list[str] = []  # files below the folder, or splits, that are not used
        super().__init__(output_path, seed, local_rank, dataset_name, streaming)
        everywhere = [name for data in self.raw_datasets.values() for name in data.columns]
        self.found = list(dict.fromkeys([*self.found, *everywhere]))
        self._choose_format()

    def _find_source(self, given: str) -> str:
        return given

    def _load(self) -> dict[str, SplitData]:
        if is_saved(self.source):
            found = open_saved(self.source)
            files_of = saved_splits(self.source, found, self.options.evaluates)
            used = [name for names in files_of.values() for name in names]
            self.unread = [f"the split {name}" for name in found if name not in used]
            train = found[files_of["train"][0]]
            self.found, rows = train.column_names, train.select(range(min(ROWS_TRIED, len(train)))).to_list()
        else:
            files_of = self.files_of = own_files(self.source, evaluates=self.options.evaluates)
            self.unread = other_files(self.source, files_of)
            self.found, rows = column_names(files_of["train"]), first_rows(files_of["train"])
        given = self.options.columns
        self.ignores_columns = self.options.columns_of_others and not set(given.values()).intersection(self.found)
        given = {} if self.ignores_columns else given
        roles = column_roles(self.found, given, self.source)
        roles = with_answers_beside(roles, self.found, given, rows)
        self.rows, schema = read_as(roles, rows)
        self.eval_split = "eval" if "eval" in files_of else None
        self.eval_origin = ", ".join(os.path.basename(file) for file in files_of.get("eval", []))
        if is_saved(self.source):
            load = stream_saved if self.streaming else load_saved
            loaded = load(self.source, [files[0] for files in files_of.values()], schema)
            return {split: loaded[files[0]] for split, files in files_of.items()}
        return {split: self._load_files(files, schema, self.source) for split, files in files_of.items()}

    def _choose_format(self) -> None:
        """Choose how texts are made."""
        self.has_ids = "input_ids" in self.roles
        has_talks = any(role in self.roles for role in TALK_ROLES) or bool(self.rows.whole & self._talk_columns())
        has_prompts = self.rows.role_of(PROMPT_ROLES) is not None
        self.may_be_rendered = self.chat.is_auto and has_prompts and not has_talks
        if "text" in self.roles or self.has_ids:
            self.chat = ChatFormat(
                AS_IS, origin="as they stand, all of it labelled" if not self.has_ids else "token ids"
            )
        elif self.chat.kind == AS_IS and has_talks:
            raise UserError(f"--chat_template {AS_IS}: {self.source} holds conversations, which need a format.")
        self.add_special_tokens = self.chat.kind != TEMPLATE

    def _talk_columns(self) -> set[str]:
        beside = {self.roles.get(role) for role in ("tools", "history")}
        return set(self.roles.values()) - beside

    def describe(self) -> str:
        """Return a line on what was decided about this data set."""
        columns = ", ".join(
            role if role == column else f"{role} = {column}"
            for role, column in self.roles.items()
            if column in self.found
        )
        kept = f"the first {STREAM_EVAL_ROWS} rows" if self.streaming else "a tenth of the rows"
        evaluation = self.eval_origin or kept
        line = f"Data {self.source}: {columns}; texts: {self.chat.origin}; evaluation: {evaluation}"
        if self.ignores_columns and self.options.columns:
            line += "; --columns names none of its columns"
        if self.unread:
            more = f" and {len(self.unread) - 3} more" if len(self.unread) > 3 else ""
            line += f"; not read: {', '.join(self.unread[:3])}{more}"
        if self.chat.kind == TEMPLATE and _misses_bos(self.chat):
            line += "; no BOS, since the template writes none"
        if self.chat.date:
            line += f"; the template writes the date, which is {self.chat.date} in this run"
        return line

    def unused_columns(self) -> list[str]:
        """Return the columns that any file has and nothing reads."""
        unused = [name or '""' for name in self.found if name not in self.roles.values()]
        if self.chat.kind == AS_IS:
            unused += [self.roles[role] for role in BESIDE if self.roles.get(role) in self.found]
        return unused

    def fingerprint(self, split: str) -> str:
        """Return a hash of what the base class includes, the roles of the columns and the format."""
        chat = self.chat
        how = (
            sorted(self.roles.items()), chat.kind, chat.is_auto, chat.template, chat.tool_template, chat.end, chat.date,
        )  # fmt: skip
        return hashlib.sha256(f"{super().fingerprint(split)} {how} {self.options.train_turns}".encode()).hexdigest()

    # ------------------------------------------------------------------------------------------ checks

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
                    raise UserError(f"{self.place_of(split, place)}: {err}") from err

    def place_of(self, split: str, number: int) -> str:
        """Name the file and record of row `number` (from 0) of the source of `split`."""
        split = split if split in self.raw_datasets else "train"
        if self.files_of:
            return place_of_row(self.files_of[split], number)
        return super().place_of(split, number)


def saved_splits(path: str, found: dict[str, datasets.Dataset], evaluates: bool) -> dict[str, list[str]]:
    """Return which splits of a `save_to_disk` folder to train and to evaluate on, as `own_files` does for files.

    A single data set is trained on whatever the split that it was, as a single file is whatever its name.
    """
    if len(found) == 1 and not os.path.isfile(os.path.join(path, "dataset_dict.json")):
        return {"train": list(found)}
    return own_files(path, {name: [name] for name in found}, evaluates)


def _misses_bos(chat: ChatFormat) -> bool:
    tokenizer = chat.tokenizer
    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    text = chat_format.render(chat, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    return starts and not text.startswith(tokenizer.bos_token)
