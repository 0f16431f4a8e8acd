"""The base of all data sets: from a description to rows, texts and a fingerprint."""

import hashlib
import inspect
import os
import re
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import datasets
import numpy as np

from utils.data.formats.column_text import Sample, Span, Text, joined
from utils.data.outcomes import Reason
from utils.data.reading.arrow_files import SplitData, load_files, load_from_path
from utils.data.reading.hub import load_from_hub
from utils.data.reading.schema import Columns, Schema
from utils.data.reading.streams import stream_files, stream_from_hub, stream_from_path
from utils.data.splits import get_raw_dataset_split_index
from utils.errors import UserError

TRAIN_EVAL_SPLIT = "9,1"
# Rows of a stream: enough for a steady perplexity, and few enough for memory.
STREAM_EVAL_ROWS = 1000

# The known data sets by the text that --data_path must contain; defining a class adds it.
RAW_DATASETS: dict[str, type["PromptRawDataset"]] = {}


class RowTexts(NamedTuple):
    """What one row gives a phase."""

    samples: list[tuple[str, ...]]  # the texts of each sample: one, and in phase 2 the worse answer's too
    spans: list[list[Span]] = []  # of each sample, where labels are asked for: the characters that are answers
    dropped: int = 0  # the `Reason` where there is no sample
    notes: tuple[int, ...] = ()  # `Note`s
    words: tuple[str, ...] = ()  # what the row itself says, without what a format puts around it
    adds_special: bool = True  # whether the tokenizer adds its special tokens
    unread: tuple[str, ...] = ()  # fields that nothing reads, see `utils.data.outcomes.UNREAD`


@cache
def _source(cls: type) -> str:
    """Return the source code of a class; cached, since finding it takes a tenth of a second."""
    return inspect.getsource(cls)


class PromptRawDataset:
    """A data set as prompts with a chosen and perhaps a rejected answer.

    Subclasses describe one data set with these attributes:
        dataset_name: its name on the hub.
        argument: the text that `--data_path` must contain; by default the name on the hub.
        train_split, eval_split: its splits; eval_split None divides the train split 9 to 1.
        hub_config: the configuration to read, where there are several.
        prompt, chosen, rejected: make each text of a sample; `rejected` is None where there is none.
        columns: columns needed beyond those of `prompt`, `chosen` and `rejected`.
        optional, not_null: columns that may be missing; columns that must have a value in every row.
        add_special_tokens: whether the tokenizer adds its special tokens; False where the texts contain them.

    A text is None where the sample has none; a record whose `get_prompt_and_chosen` is None must be dropped.

    Args:
        output_path: folder for files made from the data.
        seed: divides a single split into training and evaluation rows.
        local_rank: rank on this node, -1 without ranks.
        dataset_name: an existing path, or a name on the hub.
        streaming: read rows as they are needed, as `datasets.IterableDataset`, never all of them: there is no
            fingerprint then, and the first rows are the evaluation split where there is none.

    Raises:
        UserError: the data can't be read, or do not fit the description.
    """

    dataset_name: str
    dataset_name_clean: str
    argument: str
    train_split: str = "train"
    eval_split: str | None = None
    hub_config: str | None = None
    prompt: Callable[[Sample], str | None]
    chosen: Callable[[Sample], str | None]
    rejected: Callable[[Sample], str | None] | None = None
    columns: Columns = {}
    optional: tuple[str, ...] = ()
    not_null: tuple[str, ...] = ()
    add_special_tokens: bool = True
    has_ids: bool = False  # rows bring token ids in place of texts

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "dataset_name" not in cls.__dict__:
            return
        cls.dataset_name_clean = re.sub("[/-]", "_", cls.dataset_name)
        cls.argument = cls.__dict__.get("argument", cls.dataset_name)
        RAW_DATASETS[cls.argument] = cls

    def __init__(self, output_path: str, seed: int, local_rank: int, dataset_name: str, streaming: bool = False):
        self.streaming = streaming
        self.output_path = output_path
        self.seed = seed
        self.local_rank = local_rank
        self.source = self._find_source(dataset_name)
        self.raw_datasets = self._load()

    def _find_source(self, given: str) -> str:
        """Return the path or hub name that the user's text stands for."""
        # "mirror/mkqa-Chinese" stands for the data set in "mirror/mkqa" when there is no folder of that name.
        renamed = given.replace(self.argument, self.dataset_name)
        for candidate in (given, renamed):
            if os.path.exists(candidate):
                return candidate
        if os.path.isabs(given) or given.startswith((".", "~")) or given.count("/") > 1:
            raise UserError(
                f"The data folder {given} does not exist. Correct the path, or give {self.argument} alone to "
                "take it from the Hugging Face hub."
            )
        return renamed

    def _load(self) -> dict[str, SplitData]:
        splits = [split for split in (self.train_split, self.eval_split) if split is not None]
        is_here = os.path.exists(self.source)
        if self.streaming and is_here:
            return stream_from_path(self.source, splits, self.schema(), self.hub_config)
        if self.streaming:
            return stream_from_hub(self.source, splits, self.schema(), self.argument, self.hub_config)
        if is_here:
            return load_from_path(self.source, splits, self.schema(), self.output_path, self.hub_config)
        return load_from_hub(self.source, splits, self.schema(), self.argument, self.hub_config)

    def _load_files(self, files: list[str], schema: Schema, root: str) -> SplitData:
        """Load, or stream, the records of one split's files below `root`."""
        return (
            stream_files(files, schema, names_late=True)
            if self.streaming
            else load_files(files, schema, self.output_path, root)
        )

    @classmethod
    def schema(cls) -> Schema:
        """Return the columns that are read and checked."""
        columns: Columns = {}
        for text in (cls.prompt, cls.chosen, cls.rejected):
            columns |= text.column() if isinstance(text, Text) else {}
        return Schema(columns | cls.columns, cls.optional, cls.not_null)

    def get_train_data(self) -> datasets.Dataset | datasets.IterableDataset:
        """Return the training rows, memory-mapped or as a stream."""
        return self._data("train")

    def get_eval_data(self) -> datasets.Dataset | datasets.IterableDataset:
        """Return the evaluation rows, memory-mapped; of a stream, the first rows alone."""
        return self._data("eval")

    def _data(self, split: str) -> datasets.Dataset | datasets.IterableDataset:
        dataset = self._source_split(split).dataset
        if self.streaming:
            rows = STREAM_EVAL_ROWS
            if split == "eval":
                return dataset.take(rows)
            return dataset if self.eval_split is not None else dataset.skip(rows)
        return dataset if self.eval_split is not None else dataset.select(self.row_numbers(split))

    def row_numbers(self, split: str) -> np.ndarray:
        """Return which rows of their source the training or evaluation rows are, [rows]; not of a stream."""
        rows = len(self._source_split(split).dataset)
        if self.eval_split is not None:
            return np.arange(rows)
        return get_raw_dataset_split_index(
            self.local_rank, self.output_path, self.dataset_name_clean, self.seed, "train_eval", TRAIN_EVAL_SPLIT,
            ("train", "eval").index(split), rows,
        )  # fmt: skip

    def place_of(self, split: str, number: int) -> str:
        """Name the place of row `number` (from 0) of the source of `split`, for a message."""
        return f"{self.source}, record {number + 1} of the {split} rows"

    def _source_split(self, split: str) -> SplitData:
        if split not in ("train", "eval"):
            raise ValueError(f'split is "train" or "eval", not "{split}"')
        name = self.eval_split if split == "eval" else self.train_split
        return self.raw_datasets[name or self.train_split]

    def fingerprint(self, split: str) -> str:
        """Return a hash for caches of anything made from the texts of `split` ("train" or "eval").

        It changes with the content of the data, with the seed where it decides which rows belong to the split, and
        with the code that makes the texts; it is the same in every process and run.
        """
        which = f"{split} {self.seed}" if self.eval_split is None else split
        rules = [_source(cls) for cls in (Text, *type(self).__mro__[:-1])]
        parts = [self.dataset_name, self._source_split(split).fingerprint, which, *rules]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def describe(self) -> str | None:
        """Return a line on what was decided about this data set; None for a known one, where nothing is left open."""
        return None

    def unused_columns(self) -> list[str]:
        """Return the columns that nothing reads; of a known data set, that is no news."""
        return []

    def try_rows(self, completion_only: bool, limit: int | None = None) -> None:
        """Raise UserError where texts can't be made of the first rows; those of known data sets always can."""

    def get_prompt(self, sample: Sample) -> str | None:
        """Return what comes before the answer."""
        return self.prompt(sample)

    def get_chosen(self, sample: Sample) -> str | None:
        """Return the answer to learn."""
        return self.chosen(sample)

    def get_rejected(self, sample: Sample) -> str | None:
        """Return the worse answer."""
        return None if self.rejected is None else self.rejected(sample)

    def get_prompt_and_chosen(self, sample: Sample) -> str | None:
        """Return the prompt with the answer to learn."""
        return joined(self.get_prompt(sample), self.get_chosen(sample))

    def get_prompt_and_rejected(self, sample: Sample) -> str | None:
        """Return the prompt with the worse answer."""
        return joined(self.get_prompt(sample), self.get_rejected(sample))

    def response_spans(self, sample: Sample, text: str) -> list[tuple[int, int]]:
        """Return the ranges [start, end) of characters in `text`, the prompt with the answer, that are answers."""
        return [(_common_prefix(self.get_prompt(sample) or "", text), len(text))]

    def read_row(self, sample: Sample, phase: int = 1, labels: bool = False) -> RowTexts:
        """Return what the row gives a phase, or why it gives nothing.

        Args:
            labels: find the ranges of characters that are answers (phase 1).

        Raises:
            UserError: the row can't be rendered, labelled, or trained as it asks to be.
        """
        if phase == 3:
            prompt = self.get_prompt(sample)
            return RowTexts([], dropped=Reason.NO_TEXT) if prompt is None else self._as_texts((prompt,))
        text = self.get_prompt_and_chosen(sample)
        if text is None:
            return RowTexts([], dropped=self.why_no_text(sample))
        if phase == 2:
            worse = self.get_prompt_and_rejected(sample)
            return RowTexts([], dropped=Reason.NO_REJECTED) if worse is None else self._as_texts((text, worse))
        return self._as_texts((text,), [self.response_spans(sample, text)] if labels else [])

    def adds_special(self, sample: Sample) -> bool:
        """Whether the tokenizer adds its special tokens to the row's text."""
        return self.add_special_tokens

    def why_no_text(self, sample: Sample) -> Reason:
        """Return why a row has no text with its answer."""
        return Reason.NO_TEXT if self.get_prompt(sample) is None else Reason.NO_ANSWER

    def _as_texts(self, texts: tuple[str, ...], spans: list[list[Span]] | None = None) -> RowTexts:
        return RowTexts([texts], spans or [], words=texts[:1], adds_special=self.add_special_tokens)

    def given_ids(self, sample: Sample, may_mask: bool = True) -> tuple[list[int], list[int]]:
        """Return the token ids of a row that brings them, and the starts and ends of their labels in turn."""
        raise NotImplementedError


def _common_prefix(prompt: str, text: str) -> int:
    """Return how many characters of `text` are the prompt's: not all of them where a set joins both in its own way."""
    if text.startswith(prompt):
        return len(prompt)
    return next(at for at, pair in enumerate(zip(f"{prompt}\0", f"{text}\1", strict=False)) if pair[0] != pair[1])
