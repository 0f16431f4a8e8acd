"""Makes samples of ids: ended by one end token, cut to their length, with the spans of their labels."""

from collections.abc import Sequence
from typing import Any

from utils.data.formats.column_text import Span
from utils.data.outcomes import Note, Reason
from utils.data.prompt_dataset import ID_COLUMNS
from utils.data.tokenization.sample_form import ERROR, TRUNCATE, Rule, sample_features
from utils.errors import UserError


class Entries:
    """Collects the columns of tokenized rows."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.names = ID_COLUMNS[rule.phase]
        self.columns: dict[str, list] = {
            name: [] for name in sample_features(rule.phase, rule.sample.completion_only)
        }  # fmt: skip

    def add(
        self, parts: list[list[int]], dropped: int = 0, truncated: bool = False, notes: Sequence[int] = (),
        special: Sequence[int] = (), spans: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Add an entry; `parts` are the ids of each id column, none of an entry without a sample."""
        for place, name in enumerate(self.names):
            self.columns[name].append(parts[place] if parts else [])
        books = {"truncated": truncated, "dropped": int(dropped), "notes": [*map(int, notes)], "special": special}
        if self.rule.sample.completion_only:
            books["label_spans"] = spans
        for name, value in books.items():
            self.columns[name].append(value)

    def drop(self, reason: Reason, notes: Sequence[int] = ()) -> None:
        """Add an entry for what gives no sample; how many samples its row became is still to be counted."""
        self.add([], reason, notes=[note for note in notes if note in (Note.SPLIT_ROW, Note.SPLIT_SAMPLE)])

    def add_sample(
        self, made: list[tuple[list[int], Any]], ranges: list[Span] | None, chars: int, notes: list[int],
        special: list[int],
    ) -> None:  # fmt: skip
        """Add what the ids of a sample's texts become: a sample, cut to its length, or an entry without one.

        Args:
            made: ids and the characters of each token, for each text.
            ranges: the characters of the text that are labelled; None: all ids are.
            chars: the characters of the text.
        """
        rule, limit = self.rule, self.rule.sample.max_seq_len
        if rule.phase == 3:
            ids = made[0][0]
            reason = 0 if 0 < len(ids) <= limit else Reason.LONG if ids else Reason.NO_TEXT
            self.add([] if reason else [ids], reason)
            return
        parts = [ids if rule.end_id is None else _with_end(ids, rule.end_id) for ids, _ in made]
        length = max(map(len, parts))
        if min(map(len, parts)) < 2:  # nothing follows the first token, so there is no label
            self.drop(Reason.SHORT, notes)
            return
        spans = None if ranges is None else _token_spans(ranges, made[0][1], chars, length)
        self._add_cut(parts, length, spans, notes, special)

    def add_given(self, ids: list[int], edges: list[int]) -> None:
        """Add token ids as they are, with starts and ends of their labels in turn."""
        if len(ids) < 2:
            self.drop(Reason.SHORT if ids else Reason.NO_TEXT)
            return
        self._add_cut([ids], len(ids), list(zip(edges[::2], edges[1::2], strict=True)), [], [])

    def _add_cut(
        self, parts: list[list[int]], length: int, spans: list[Span] | None, notes: list[int], special: list[int]
    ) -> None:
        limit, overlong = self.rule.sample.max_seq_len, self.rule.sample.overlong
        if spans is not None and not spans:
            self.drop(Reason.NO_LABEL, notes)
            return
        if length > limit and overlong != TRUNCATE:
            if overlong == ERROR:
                raise Overlong(f"its sample has {length} tokens, more than --max_seq_len {limit} allows.")
            self.drop(Reason.LONG, notes)
            return
        kept = [at for start, end in spans or () if start < limit for at in (start, min(end, limit))]
        if spans is not None and not kept:
            self.drop(Reason.CUT, notes)
            return
        self.add([ids[:limit] for ids in parts], 0, length > limit, notes, special, kept)


class Overlong(UserError):
    """A sample that is too long where `--overlong error` refuses one."""


def _with_end(ids: list[int], end_id: int) -> list[int]:
    """Return `ids` ending in `end_id` exactly once (some tokenizers append it themselves)."""
    return ids if ids and ids[-1] == end_id else [*ids, end_id]


def _token_spans(ranges: list[Span], offsets: list[Span], chars: int, tokens: int) -> list[Span]:
    """Return the ranges of tokens that are labels.

    A token that covers both prompt and response belongs to the response, and the end token to a response that ends the
    text of `chars` characters. Nothing predicts the first token.
    """
    spans = []
    for start, end in ranges:
        first, last = _token_span(offsets, start, end)
        last = tokens if end == chars else last
        if max(first, 1) < last:
            spans.append((max(first, 1), last))
    return spans


def _token_span(offsets: list[Span], start: int, end: int) -> Span:
    """Return the range of tokens that cover the characters [start, end), wholly or in part."""
    first = next((at for at, (_, stop) in enumerate(offsets) if stop > start), len(offsets))
    last = next((at for at in range(len(offsets) - 1, first - 1, -1) if offsets[at][0] < end), first - 1)
    return first, last + 1
