"""Streams data larger than memory and disk (`--streaming N`): read, tokenized and trained on in windows of N samples.

A window is used as an epoch is: shuffled, or packed into rows, and trained on. The samples of a window depend on the
data and N alone, so ranks read the same windows without communication, and a resumed run reads on from the position
in its checkpoint. Every rank tokenizes every window, so all ranks together train no faster than one process tokenizes.
"""

import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from utils.data import cache as prompt_cache
from utils.data.agreement import Content
from utils.data.batching.batches import ignore_stop_signals
from utils.data.formats.base import PromptRawDataset
from utils.data.formats.custom import OwnOptions
from utils.data.mixture import EVALUATION, SFT_ONLY_SPLIT, TRAINING, DataSources
from utils.data.open_sets import OpenSet, Preparation, chat_of, open_sets
from utils.data.outcomes import added, notes_on, settled
from utils.data.prepare import tokenize_part
from utils.data.prompt_dataset import ID_COLUMNS, PromptDataset, Sources
from utils.data.tokenization.refused_rows import name_refused_row
from utils.data.tokenization.tokenize_rows import SampleForm, map_arguments, row_tokenizer
from utils.data.windows import Position, StreamSource, Window, read_windows
from utils.errors import UserError
from utils.logging.console import phase, say

SFT_PHASE = 1
ROWS_AT_ONCE = 1000  # a fast tokenizer gains nothing from more


class _Windows(IterableDataset):
    """Runs `read_windows` in a worker process; yields a UserError as an item, since torch would reword its message."""

    def __init__(self, sources: list[StreamSource], size: int, begins: Position | None) -> None:
        self.sources, self.size, self.begins = sources, size, begins

    def __iter__(self) -> Iterator[Window | UserError]:
        try:
            yield from read_windows(self.sources, self.size, self.begins)
        except UserError as err:
            yield err


def _unchanged(window: Window | UserError) -> Window | UserError:
    return window


class PromptStream(PromptDataset):
    """The current window of a stream: a data set like any other, until `follow` moves to another window.

    Args:
        size: samples of a window.
        ahead: read the next window in a worker process while this one is trained on.
        prints: print what was read.
    """

    def __init__(
        self, sources: list[StreamSource], size: int, sample: SampleForm, ahead: bool = False, prints: bool = True
    ) -> None:
        self.sources, self.size, self.ahead, self.prints = sources, size, ahead, prints
        self.max_seq_len, self.special = sample.max_seq_len, sample.special
        self._open(None)
        super().__init__(self._read(0), SFT_PHASE, max_seq_len=self.max_seq_len)

    def follow(self, position: Position | None) -> Position:
        """Move to the window that begins at `position` (None: stay in the current one); return where it begins."""
        if position is not None and position["window"] != self.position["window"]:
            if position["window"] != self.after["window"]:
                self._open(position)
            self.table = self._read(position["window"]).with_format("numpy")
        return self.position

    def _open(self, begins: Position | None) -> None:
        if not self.ahead:
            self._windows = read_windows(self.sources, self.size, begins)
            return
        windows = _Windows(self.sources, self.size, begins)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizer's threads don't survive a fork
        # A generator of its own, so that reading does not advance the random numbers of the training.
        loader = DataLoader(
            windows, batch_size=None, num_workers=1, prefetch_factor=1, collate_fn=_unchanged,
            generator=torch.Generator(), worker_init_fn=ignore_stop_signals,
        )  # fmt: skip
        self._windows = iter(loader)

    def _read(self, number: int) -> datasets.Dataset:
        """Move to the next window, which has this number, and return its samples."""
        with phase(f"reading window {number + 1}"):
            window = next(self._windows)
        if isinstance(window, UserError):
            raise window
        samples, self.counts = settled(window.entries, ID_COLUMNS[SFT_PHASE])
        if self.prints:
            title = f"Stream window {number + 1}"
            say(prompt_cache.describe_part(title, self.counts, self.max_seq_len, SFT_PHASE))
            for note in notes_on(self.counts, self.special):
                say(f"{title}: {note}")
        self.position, self.after = window.begins, window.after
        return samples


def create_prompt_stream(
    data_path: Sequence[str],
    sample: SampleForm,
    own: OwnOptions,
    preparation: Preparation,
    size: int,
    ahead: bool = False,
    eval_data_path: Sequence[str] = (),
) -> tuple[PromptStream, PromptDataset]:
    """Return the data of phase 1 as (stream of the training rows, evaluation data in memory).

    Args:
        data_path: `NAME` or `NAME:WEIGHT`; a set's share of every window is its weight over the sum of all weights.
        preparation: its phase, `rebuild` and `num_proc` are not used.
        size: samples of a window.
        ahead: see `PromptStream`.
        eval_data_path: data sets whose first rows are the evaluation data in place of those of `data_path`.

    Raises:
        UserError: bad data.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    described = DataSources(data_path, SFT_ONLY_SPLIT, evaluation=eval_data_path)
    opened = open_sets(described, preparation._replace(phase=SFT_PHASE), own, streaming=True)
    total = sum(one.weight for one in opened if one.use != EVALUATION)
    sources, evaluation = [], []
    for one in opened:
        if preparation.prints and (line := one.raw.describe()):
            say(line)
            if columns := one.raw.unused_columns():
                say(f"Data {one.raw.source}: not used: {', '.join(columns)}")
        if one.use != EVALUATION:
            sources.append(_stream_source(one, total, size, sample, preparation.prints))
        if one.use != TRAINING:
            evaluation.append(_first_rows(one, sample, preparation.prints))
    stream = PromptStream(sources, size, sample, ahead, preparation.prints)
    if preparation.prints:
        counts = added(part.counts for part in evaluation)
        say(prompt_cache.describe_part("Data eval", counts, sample.max_seq_len, SFT_PHASE))
    joined = datasets.concatenate_datasets([part.table.with_format(None) for part in evaluation])
    stream.content = _content(opened, sample, stream, joined)
    stream.chat = chat_of(opened)
    evaluated = PromptDataset(joined, SFT_PHASE, sample.tokenizer.pad_token_id, sample.max_seq_len)
    numbers = np.repeat(np.arange(len(evaluation)), [len(part) for part in evaluation])
    evaluated.sources = Sources.of([one.raw.source for one in opened if one.use != TRAINING], numbers)
    return stream, evaluated


def _stream_source(opened: OpenSet, total: float, size: int, sample: SampleForm, prints: bool) -> StreamSource:
    """Return a data set of a stream, whose share is its weight of `total`."""
    share, name = opened.weight / total, opened.raw.source
    if share * size < 1:
        raise UserError(
            f"--data_path {name}:{opened.weight:g} is less than one sample of a window of {size}: give it a larger "
            "weight, or --streaming a larger number."
        )
    tokenizer = row_tokenizer(sample, size)
    if prints:
        by = "" if tokenizer is sample.tokenizer else "; tokenized by tiktoken, with this tokenizer's ids"
        say(f"Stream {name}: {share:.1%} of every window{by}")
    keeps_rows = opened.raw.eval_split is None
    refused = partial(name_refused_row, opened.raw, "train", sample)
    return StreamSource(name, share, _tokenized(opened.raw, sample, tokenizer), refused, keeps_rows)


def _first_rows(opened: OpenSet, sample: SampleForm, prints: bool) -> PromptDataset:
    """Return the first evaluation rows of a data set, tokenized; of training rows, those that are not trained on."""
    rows = datasets.Dataset.from_list(list(opened.raw.get_eval_data()))
    try:
        part = tokenize_part(rows, opened.raw, sample, SFT_PHASE)
    except UserError:
        name_refused_row(opened.raw, "eval", sample)
        raise
    if prints:
        kept = "training rows, which are not trained on" if opened.raw.eval_split is None else "evaluation rows"
        say(f"Stream {opened.raw.source}: evaluation on the first {len(rows)} {kept}")
        for note in notes_on(part.counts, sample.special):
            say(f"Stream {opened.raw.source}: {note}")
    return part


def _content(opened: list[OpenSet], sample: SampleForm, stream: PromptStream, evaluation: datasets.Dataset) -> Content:
    """Return what identifies a stream, to compare it with those of other ranks: its files, first window, evaluation."""
    files = [file for one in opened for data in one.raw.raw_datasets.values() for file in data.files]
    sizes = [[os.path.basename(file), os.path.getsize(file)] for file in files if os.path.isfile(file)]
    parts = [
        sizes,
        prompt_cache.tokenizer_fingerprint(sample.tokenizer),
        sample.max_seq_len,
        sample.end_id,
        sample.overlong,
    ]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]
    tables = [stream.table.with_format(None), evaluation]
    tokens = sum(int(PromptDataset(table, SFT_PHASE).lengths().sum()) for table in tables if len(table))
    sums = [prompt_cache.content_sum(table) for table in tables]
    return Content(key, len(tables[0]), len(evaluation), tokens, zlib.crc32(repr(sums).encode()))


def _tokenized(raw: PromptRawDataset, sample: SampleForm, tokenizer: Any) -> datasets.IterableDataset:
    """Return the training rows as entries, tokenized as prepared data are, in their order."""
    rows = raw.get_train_data()
    return rows.map(
        **map_arguments(raw, sample, SFT_PHASE, tokenizer),
        batch_size=ROWS_AT_ONCE,
        remove_columns=rows.column_names or list(next(iter(rows), {})),
    )
