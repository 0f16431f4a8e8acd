"""Training on data that is never whole in memory or on disk (`--streaming N`): a window of N samples at a time.

A window is read, tokenised and then used as an epoch is: shuffled, or packed into rows, and trained on. Which samples
a window holds depends on the data and N alone, so that ranks read it without asking each other, and a run goes on
from where a checkpoint says its window begins. Every rank tokenises every window: that limits all ranks together to
what one process tokenises.
"""

import copy
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import datasets
import torch
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HTTPError
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerBase

from utils.data import cache as prompt_cache
from utils.data.data_utils import create_dataset_split, get_raw_dataset
from utils.data.formats.base import STREAM_EVAL_ROWS, PromptRawDataset
from utils.data.formats.chat_template import AUTO
from utils.data.formats.custom import own_options
from utils.data.mixture import parse_source
from utils.data.prompt_dataset import ID_COLUMNS, PromptDataset
from utils.data.tokenization.byte_bpe import quick_tokenizer
from utils.data.tokenization.tokenize_rows import end_token_id, sample_features, tokenise, tokenise_completions
from utils.errors import UserError
from utils.logging.console import phase, say

SFT_PHASE = 1
ROWS_AT_ONCE = 1000  # a fast tokenizer gains nothing from more
# What reading from a disk or the hub may end in, after the library's own attempts.
_READ_ERRORS = (OSError, HTTPError, DatasetsError)

# Where a window begins: {"window": its number from 0, "sources": [{"number", "taken", "rows"}, ...]}; of each source
# its pass's number, the samples taken in it, the `state_dict` of its rows. Plain values, kept in every checkpoint.
Position = dict[str, Any]


class Source(NamedTuple):
    """One data set of a stream."""

    name: str
    share: float  # of each window's samples
    samples: datasets.IterableDataset  # tokenised


class Window(NamedTuple):
    """Samples that are shuffled together, and where they and the next ones begin."""

    samples: datasets.Dataset
    begins: Position
    after: Position


def read_windows(sources: list[Source], size: int, begins: Position | None = None) -> Iterator[Window]:
    """Windows of `size` samples without end, from `begins` on or from the start.

    Each source gives its share. One that has come to its end begins again; where it is the only one, the window ends
    there, so that a pass gives each sample once.

    Raises:
        UserError: a record is not what it should be, the source can't be read on, or it has no sample.
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

    def __init__(self, source: Source, place: dict[str, Any] | None) -> None:
        self.name, self.samples = source.name, source.samples
        self._begin(**(place or {"number": 0}))

    def _begin(self, number: int, taken: int = 0, rows: dict[str, Any] | None = None) -> None:
        """Start pass `number`, at its beginning or where a checkpoint stands; files come in another order in each."""
        self.number, self.taken, self.begun_at = number, taken, rows
        self.samples.set_epoch(number)
        self.samples.load_state_dict(copy.deepcopy(rows))
        self.iterator: Iterator[dict[str, Any]] | None = None

    def place(self) -> dict[str, Any]:
        """Where the next sample is, for `_begin`."""
        # Before its first sample an iterator's state is that of the one before it.
        rows = self.begun_at if self.iterator is None else copy.deepcopy(self.samples.state_dict())
        return {"number": self.number, "taken": self.taken, "rows": rows}

    def take(self, count: int, whole_pass: bool) -> list[dict[str, Any]]:
        """`count` samples; fewer where `whole_pass` says that they must be of one pass."""
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
    """`read_windows` for a process of its own; a UserError comes as an item, since torch would wrap it in its words."""

    def __init__(self, sources: list[Source], size: int, begins: Position | None) -> None:
        self.sources, self.size, self.begins = sources, size, begins

    def __iter__(self) -> Iterator[Window | UserError]:
        try:
            yield from read_windows(self.sources, self.size, self.begins)
        except UserError as err:
            yield err


def _as_it_is(window: Window | UserError) -> Window | UserError:
    return window


class PromptStream(PromptDataset):
    """The window of a stream that is in use: a data set like any other, until `follow` brings another one.

    Args:
        size: samples of a window.
        ahead: read the next window in a process of its own while this one is trained on.
        is_heard: this process says what it reads.
    """

    def __init__(
        self, sources: list[Source], size: int, max_seq_len: int, ahead: bool = False, is_heard: bool = True
    ) -> None:
        self.sources, self.size, self.ahead, self.is_heard = sources, size, ahead, is_heard
        self.max_seq_len = max_seq_len
        self._open(None)
        super().__init__(self._read(0), SFT_PHASE, max_seq_len=max_seq_len)

    def follow(self, position: Position | None) -> Position:
        """Make the window that begins at `position` (None: the first) the one in use; returns where it begins."""
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
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads don't outlive a fork
        # A generator of its own, so that starting to read takes nothing from the random numbers of the training.
        loader = DataLoader(
            windows, batch_size=None, num_workers=1, prefetch_factor=1, collate_fn=_as_it_is,
            generator=torch.Generator(),
        )  # fmt: skip
        self._windows = iter(loader)

    def _read(self, number: int) -> datasets.Dataset:
        """The samples of the next window, which becomes the one in use."""
        with phase(f"reading window {number + 1}"):
            window = next(self._windows)
        if isinstance(window, UserError):
            raise window
        if self.is_heard:
            part = prompt_cache.statistics([PromptDataset(window.samples, SFT_PHASE)], ID_COLUMNS[SFT_PHASE])
            say(prompt_cache.describe_part(f"Stream window {number + 1}", part, self.max_seq_len, SFT_PHASE))
        self.position, self.after = window.begins, window.after
        return window.samples


def create_prompt_stream(
    local_rank: int,
    data_path: Iterable[str],
    output_path: str,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    end_of_conversation_token: str,
    size: int,
    completion_only: bool = False,
    columns: dict[str, str] | None = None,
    chat_template: str = AUTO,
    ahead: bool = False,
) -> tuple[PromptStream, PromptDataset]:
    """The data of phase 1 as (stream of the training rows, evaluation data in memory).

    `data_path` are `NAME` or `NAME:WEIGHT`, a weight being a share of every window in proportion to the others'. For
    the other arguments see `create_prompt_dataset` and `PromptStream`.

    Raises:
        UserError: bad data.
    """
    end_id = end_token_id(tokenizer, end_of_conversation_token)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    own = own_options(tokenizer, end_id, columns, chat_template)
    parsed = [parse_source(text) for text in data_path]
    sources, evaluation = [], []
    for name, weight in parsed:
        raw = get_raw_dataset(name, output_path, seed, local_rank, own, streaming=True)
        share = weight / sum(other.weight for other in parsed)
        if share * size < 1:
            raise UserError(
                f"--data_path {name}:{weight:g} is less than one sample of a window of {size}: give it a larger "
                "weight, or --streaming a larger number."
            )
        used = tokenizer if completion_only else quick_tokenizer(tokenizer, size)
        samples = _tokenised(raw, used, end_id, max_seq_len, completion_only)
        sources.append(Source(name, share, samples))
        rows = datasets.Dataset.from_list(list(raw.get_eval_data()))
        part = create_dataset_split(
            rows, raw, SFT_PHASE, tokenizer, end_of_conversation_token, max_seq_len, completion_only=completion_only
        )
        part.rows_given = len(rows)
        evaluation.append(part)
        if local_rank <= 0:
            kept = "training rows, which are not trained on" if raw.eval_split is None else "evaluation rows"
            if described := raw.describe():
                say(described)
            say(f"Stream {name}: {share:.1%} of every window; evaluation on the first {len(rows)} {kept}")
            if used is not tokenizer:
                say(f"Stream {name}: tokenised by tiktoken, with this tokenizer's ids")
    stream = PromptStream(sources, size, max_seq_len, ahead, local_rank <= 0)
    if local_rank <= 0:
        part = prompt_cache.statistics(evaluation, ID_COLUMNS[SFT_PHASE])
        say(prompt_cache.describe_part("Data eval", part, max_seq_len, SFT_PHASE))
    joined = datasets.concatenate_datasets([part.table.with_format(None) for part in evaluation])
    return stream, PromptDataset(joined, SFT_PHASE, tokenizer.pad_token_id, max_seq_len)


def _tokenised(
    raw: PromptRawDataset, tokenizer: Any, end_id: int, max_seq_len: int, completion_only: bool
) -> datasets.IterableDataset:
    """The training rows as the cached path tokenises them, in their order; rows without a text are left out."""
    source = copy.copy(raw)
    source.raw_datasets = None
    arguments = {"source": source, "tokenizer": tokenizer, "end_id": end_id, "max_seq_len": max_seq_len}
    if not completion_only:
        arguments["phase"] = SFT_PHASE
    rows = raw.get_train_data()
    return rows.map(
        tokenise_completions if completion_only else tokenise, batched=True, batch_size=ROWS_AT_ONCE,
        fn_kwargs=arguments, remove_columns=rows.column_names or list(next(iter(rows), {})),
        features=sample_features(SFT_PHASE, completion_only),
    )  # fmt: skip
