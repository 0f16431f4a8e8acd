"""Streams data larger than memory and disk (`--streaming N`): read, tokenized and trained on in windows of N samples.

A window is used as an epoch is: shuffled, or packed into rows, and trained on. The samples of a window depend on the
data and N alone, so ranks read the same windows without communication, and a resumed run reads on from the position
in its checkpoint. Every rank tokenizes every window, so all ranks together train no faster than one process tokenizes.
"""

import copy
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import datasets
import torch
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HTTPError
from torch.utils.data import DataLoader, IterableDataset

from utils.data import cache as prompt_cache
from utils.data.agreement import Content
from utils.data.batching.batches import ignore_stop_signals
from utils.data.formats.base import STREAM_EVAL_ROWS, PromptRawDataset
from utils.data.formats.custom import OwnOptions
from utils.data.mixture import EVALUATION, SFT_ONLY_SPLIT, TRAINING, DataSources
from utils.data.open_sets import OpenSet, open_sets
from utils.data.prepare import Preparation, tokenize_part
from utils.data.prompt_dataset import ID_COLUMNS, PromptDataset
from utils.data.tokenization.tokenize_rows import SampleForm, map_arguments, row_tokenizer
from utils.errors import UserError
from utils.logging.console import phase, say

SFT_PHASE = 1
ROWS_AT_ONCE = 1000  # a fast tokenizer gains nothing from more
# How reading from a disk or the hub fails, after the library's own retries.
_READ_ERRORS = (OSError, HTTPError, DatasetsError)

# Where a window begins: {"window": its number from 0, "sources": [{"number", "taken", "rows"}, ...]}. For each source:
# the number of its pass, the samples taken in that pass, the `state_dict` of its rows. Plain values: every checkpoint
# stores them.
Position = dict[str, Any]


class StreamSource(NamedTuple):
    """One data set of a stream."""

    name: str
    share: float  # of each window's samples
    samples: datasets.IterableDataset  # tokenized


class Window(NamedTuple):
    """Samples that are shuffled together, where they begin, and where the next window begins."""

    samples: datasets.Dataset
    begins: Position
    after: Position


def read_windows(sources: list[StreamSource], size: int, begins: Position | None = None) -> Iterator[Window]:
    """Yield windows of `size` samples without end, from the position `begins` or from the start.

    Each source gives its share. A source that ends begins again; where it is the only one, its window ends there too,
    so that a pass gives each sample once.

    Raises:
        UserError: a record is malformed, a source can't be read on, or it has no sample.
    """
    feeds = [_Feed(source, begins["sources"][place] if begins else None) for place, source in enumerate(sources)]
    bounds = [round(size * sum(source.share for source in sources[:place])) for place in range(len(sources) + 1)]
    number = begins["window"] if begins else 0
    while True:
        begins = {"window": number, "sources": [feed.place() for feed in feeds]}
        taken: list[dict[str, Any]] = []
        for feed, first, last in zip(feeds, bounds, bounds[1:], strict=False):
            taken += feed.take(last - first, whole_pass=len(feeds) == 1)
        number += 1
        after = {"window": number, "sources": [feed.place() for feed in feeds]}
        yield Window(datasets.Dataset.from_list(taken, features=sources[0].samples.features), begins, after)


class _Feed:
    """Takes samples from one source, pass after pass."""

    def __init__(self, source: StreamSource, place: dict[str, Any] | None) -> None:
        self.name, self.samples = source.name, source.samples
        self._begin(**(place or {"number": 0}))

    def _begin(self, number: int, taken: int = 0, rows: dict[str, Any] | None = None) -> None:
        """Start pass `number` at its beginning, or where a checkpoint stopped; each pass orders the files anew."""
        self.number, self.taken, self.begun_at = number, taken, rows
        self.samples.set_epoch(number)
        self.samples.load_state_dict(copy.deepcopy(rows))
        self.iterator: Iterator[dict[str, Any]] | None = None

    def place(self) -> dict[str, Any]:
        """Return where the next sample is, as the arguments of `_begin`."""
        # Until its first sample, an iterator reports the state of the iterator before it.
        rows = self.begun_at if self.iterator is None else copy.deepcopy(self.samples.state_dict())
        return {"number": self.number, "taken": self.taken, "rows": rows}

    def take(self, count: int, whole_pass: bool) -> list[dict[str, Any]]:
        """Return `count` samples; fewer at the end of a pass where `whole_pass` asks for samples of one pass."""
        found: list[dict[str, Any]] = []
        while len(found) < count:
            sample = self._next()
            if sample is not None:
                found.append(sample)
                self.taken += 1
                continue
            if self.taken == 0:
                raise UserError(
                    f"{self.name} gives no training sample: its rows have no text or nothing to label, or (without an "
                    f"evaluation split) are no more than the first {STREAM_EVAL_ROWS}, which are kept for evaluation."
                )
            self._begin(self.number + 1)
            if whole_pass and found:
                break
        return found

    def _next(self) -> dict[str, Any] | None:
        try:
            self.iterator = self.iterator or iter(self.samples)
            return next(self.iterator, None)
        except UserError as err:
            raise UserError(f"{self.name}, after {self.taken} samples of pass {self.number + 1}: {err}") from err
        except _READ_ERRORS as err:
            raise UserError(
                f"{self.name} can't be read on after {self.taken} samples of pass {self.number + 1}: "
                f"{type(err).__name__}: {err}. A run with checkpoints goes on from its last with "
                "--resume_from_checkpoint."
            ) from err


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
        self, sources: list[StreamSource], size: int, max_seq_len: int, ahead: bool = False, prints: bool = True
    ) -> None:
        self.sources, self.size, self.ahead, self.prints = sources, size, ahead, prints
        self.max_seq_len = max_seq_len
        self._open(None)
        super().__init__(self._read(0), SFT_PHASE, max_seq_len=max_seq_len)

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
        if self.prints:
            part = prompt_cache.statistics([PromptDataset(window.samples, SFT_PHASE)], ID_COLUMNS[SFT_PHASE])
            say(prompt_cache.describe_part(f"Stream window {number + 1}", part, self.max_seq_len, SFT_PHASE))
        self.position, self.after = window.begins, window.after
        return window.samples


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
    place = (preparation.cache_folder, preparation.seed, preparation.local_rank)
    described = DataSources(data_path, SFT_ONLY_SPLIT, evaluation=eval_data_path)
    opened = open_sets(described, SFT_PHASE, place, own, streaming=True)
    total = sum(one.weight for one in opened if one.use != EVALUATION)
    sources, evaluation = [], []
    for one in opened:
        if preparation.prints and (line := one.raw.describe()):
            say(line)
        if one.use != EVALUATION:
            sources.append(_stream_source(one, total, size, sample, preparation.prints))
        if one.use != TRAINING:
            evaluation.append(_first_rows(one, sample, preparation.prints))
    stream = PromptStream(sources, size, sample.max_seq_len, ahead, preparation.prints)
    if preparation.prints:
        counts = prompt_cache.statistics(evaluation, ID_COLUMNS[SFT_PHASE])
        say(prompt_cache.describe_part("Data eval", counts, sample.max_seq_len, SFT_PHASE))
    joined = datasets.concatenate_datasets([part.table.with_format(None) for part in evaluation])
    stream.content = _content(opened, sample, stream, joined)
    return stream, PromptDataset(joined, SFT_PHASE, sample.tokenizer.pad_token_id, sample.max_seq_len)


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
    return StreamSource(name, share, _tokenized(opened.raw, sample, tokenizer))


def _first_rows(opened: OpenSet, sample: SampleForm, prints: bool) -> PromptDataset:
    """Return the first evaluation rows of a data set, tokenized; of training rows, those that are not trained on."""
    rows = datasets.Dataset.from_list(list(opened.raw.get_eval_data()))
    part = tokenize_part(rows, opened.raw, sample, SFT_PHASE)
    part.rows_given = len(rows)
    if prints:
        kept = "training rows, which are not trained on" if opened.raw.eval_split is None else "evaluation rows"
        say(f"Stream {opened.raw.source}: evaluation on the first {len(rows)} {kept}")
    return part


def _content(opened: list[OpenSet], sample: SampleForm, stream: PromptStream, evaluation: datasets.Dataset) -> Content:
    """Return what identifies a stream, to compare it with those of other ranks: its files, first window, evaluation."""
    files = [file for one in opened for data in one.raw.raw_datasets.values() for file in data.files]
    sizes = [[os.path.basename(file), os.path.getsize(file)] for file in files if os.path.isfile(file)]
    parts = [sizes, prompt_cache.tokenizer_fingerprint(sample.tokenizer), sample.max_seq_len, sample.end_id]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]
    tables = [stream.table.with_format(None), evaluation]
    tokens = sum(
        prompt_cache.statistics([PromptDataset(table, SFT_PHASE)], ["input_ids"])["tokens"] for table in tables
    )
    sums = [prompt_cache.content_sum(table) for table in tables]
    return Content(key, len(tables[0]), len(evaluation), tokens, zlib.crc32(repr(sums).encode()))


def _tokenized(raw: PromptRawDataset, sample: SampleForm, tokenizer: Any) -> datasets.IterableDataset:
    """Return the training rows tokenized as prepared data are, in their order; rows without a text are dropped."""
    rows = raw.get_train_data()
    return rows.map(
        **map_arguments(raw, sample, SFT_PHASE, tokenizer),
        batch_size=ROWS_AT_ONCE,
        remove_columns=rows.column_names or list(next(iter(rows), {})),
    )
