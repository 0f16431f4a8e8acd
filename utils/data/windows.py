"""Reads a stream's data sets in windows of samples, pass after pass, from any position on."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import datasets
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HTTPError

from utils.data.formats.base import STREAM_EVAL_ROWS
from utils.data.outcomes import BOOKS, Reason, advice_on, dropped_words
from utils.data.tokenization.entries import Overlong
from utils.errors import UserError

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
    entries: datasets.IterableDataset  # tokenized rows: samples, and what gives none
    name_refused: Callable[[], None]  # raises UserError with the place of the first row that is refused
    keeps_rows: bool = False  # the first rows are kept for evaluation


class Window(NamedTuple):
    """Entries whose samples are shuffled together, where they begin, and where the next window begins."""

    entries: datasets.Dataset
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
        yield Window(datasets.Dataset.from_list(taken, features=sources[0].entries.features), begins, after)


class _Feed:
    """Takes entries from one source, pass after pass."""

    def __init__(self, source: StreamSource, place: dict[str, Any] | None) -> None:
        self.source, self.name, self.entries = source, source.name, source.entries
        self._begin(**(place or {"number": 0}))

    def _begin(self, number: int, taken: int = 0, rows: dict[str, Any] | None = None) -> None:
        """Start pass `number` at its beginning, or where a checkpoint stopped; each pass orders the files anew."""
        self.number, self.taken, self.begun_at = number, taken, rows
        self.dropped: Counter[str] = Counter()
        self.entries.set_epoch(number)
        self.entries.load_state_dict(copy.deepcopy(rows))
        self.iterator: Iterator[dict[str, Any]] | None = None

    def place(self) -> dict[str, Any]:
        """Return where the next sample is, as the arguments of `_begin`."""
        # Until its first sample, an iterator reports the state of the iterator before it.
        rows = self.begun_at if self.iterator is None else copy.deepcopy(self.entries.state_dict())
        return {"number": self.number, "taken": self.taken, "rows": rows}

    def take(self, count: int, whole_pass: bool) -> list[dict[str, Any]]:
        """Return entries with `count` samples; fewer at the end of a pass where `whole_pass` asks for those of one."""
        found: list[dict[str, Any]] = []
        samples = 0
        while samples < count:
            entry = self._next()
            if entry is not None:
                found.append(entry)
                if entry["input_ids"]:
                    samples += 1
                    self.taken += 1
                else:
                    self.dropped[Reason(entry[BOOKS][0]).name] += 1
                continue
            if self.taken == 0:
                raise UserError(self._nothing())
            self._begin(self.number + 1)
            if whole_pass and samples:
                break
        return found

    def _nothing(self) -> str:
        """Return why a pass gave no sample."""
        if counts := {"dropped": dict(self.dropped)} if self.dropped else {}:
            rows = sum(self.dropped.values())
            return (
                f"{self.name} gives no training sample: all {rows} training rows were dropped "
                f"({dropped_words(counts)}). {advice_on(counts)}"
            )
        why = "it has no training row."
        if self.source.keeps_rows:
            why = (
                f"it has no more than the first {STREAM_EVAL_ROWS} rows, which are kept for evaluation. Give an "
                "evaluation file beside it or --eval_data_path, or leave --streaming out."
            )
        return f"{self.name} gives no training sample: {why}"

    def _next(self) -> dict[str, Any] | None:
        try:
            self.iterator = self.iterator or iter(self.entries)
            return next(self.iterator, None)
        except UserError as err:
            if isinstance(err, Overlong):
                self.source.name_refused()
            raise UserError(f"{self.name}, after {self.taken} samples of pass {self.number + 1}: {err}") from err
        except _READ_ERRORS as err:
            raise UserError(
                f"{self.name} can't be read on after {self.taken} samples of pass {self.number + 1}: "
                f"{type(err).__name__}: {err}. A run with checkpoints goes on from its last with "
                "--resume_from_checkpoint."
            ) from err
