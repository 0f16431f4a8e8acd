"""Makes samples of ids: ended by one end token, cut to their length, with the spans of their labels."""

from collections.abc import Sequence

from utils.data.formats.column_text import Span
from utils.data.outcomes import BOOKS, UNREAD, Note, Reason
from utils.data.prompt_dataset import ID_COLUMNS
from utils.data.tokenization.sample_form import ERROR, TRUNCATE, Rule, sample_features
from utils.errors import UserError

_PLAIN: list[int] = []  # the books of most entries
_NONE: list[str] = []  # the fields that most entries name


class Entries:
    """Collects the columns of tokenized rows."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.limit = rule.sample.max_seq_len
        self.columns: dict[str, list] = {
            name: [] for name in sample_features(rule.phase, rule.sample.completion_only)
        }  # fmt: skip
        self.ids = [self.columns[name] for name in ID_COLUMNS[rule.phase]]
        self.books, self.spans = self.columns[BOOKS], self.columns.get("label_spans")

    def name_unread(self, names: Sequence[str]) -> None:
        """Name the fields of the next entry's row that nothing reads."""
        unread = self.columns[UNREAD]
        unread += [_NONE] * (len(self.books) - len(unread))
        if names:
            unread.append(list(names))

    def finished(self) -> dict[str, list]:
        """Return the columns, of one length."""
        self.name_unread(())
        return self.columns

    def drop(self, reason: int, notes: Sequence[int] = ()) -> None:
        """Add an entry for what gives no sample; how many samples its row became is still to be counted."""
        for column in self.ids:
            column.append([])
        self.books.append([int(reason), *(int(note) for note in notes if note in (Note.SPLIT_ROW, Note.SPLIT_SAMPLE))])
        if self.spans is not None:
            self.spans.append([])

    def add(
        self, parts: list[list[int]], books: list[int], ranges: list[Span] | None = None,
        offsets: Sequence[Span] = (), chars: int = 0,
    ) -> None:  # fmt: skip
        """Add what the ids of a sample's texts become: a sample, cut to its length, or an entry without one.

        Args:
            parts: the ids of each text; they are changed.
            books: `Note`s and special tokens of the row.
            ranges: the characters of the text that are labelled; None: all ids are.
            offsets: with `ranges`, the characters of each token.
            chars: with `ranges`, the characters of the text.
        """
        rule = self.rule
        if rule.phase == 3:
            self._add_prompt(parts[0])
            return
        for ids in parts:
            if rule.end_id is not None and ids[-1:] != [rule.end_id]:  # some tokenizers append it themselves
                ids.append(rule.end_id)
        if min(map(len, parts)) < 2:  # nothing follows the first token, so there is no label
            self.drop(Reason.SHORT, books)
            return
        self._add_cut(parts, None if ranges is None else _token_spans(ranges, offsets, chars, len(parts[0])), books)

    def add_given(self, ids: list[int], edges: list[int]) -> None:
        """Add token ids as they are, with starts and ends of their labels in turn."""
        if len(ids) < 2:
            self.drop(Reason.SHORT if ids else Reason.NO_TEXT)
            return
        self._add_cut([ids], list(zip(edges[::2], edges[1::2], strict=True)), [])

    def _add_prompt(self, ids: list[int]) -> None:
        if not 0 < len(ids) <= self.limit:
            self.drop(Reason.LONG if ids else Reason.NO_TEXT)
            return
        self.ids[0].append(ids)
        self.books.append(_PLAIN)

    def _add_cut(self, parts: list[list[int]], spans: list[Span] | None, books: list[int]) -> None:
        length, limit, overlong = max(map(len, parts)), self.limit, self.rule.sample.overlong
        if spans is not None and not spans:
            self.drop(Reason.NO_LABEL, books)
            return
        if length > limit and overlong == ERROR:
            raise Overlong(f"its sample has {length} tokens, more than --max_seq_len {limit} allows.")
        if length > limit and overlong != TRUNCATE:
            self.drop(Reason.LONG, books)
            return
        if spans is not None:
            kept = [at for start, end in spans if start < limit for at in (start, min(end, limit))]
            if not kept:
                self.drop(Reason.CUT, books)
                return
            if self.spans is not None:
                self.spans.append(kept)
        for column, ids in zip(self.ids, parts, strict=True):
            column.append(ids if length <= limit else ids[:limit])
        self.books.append([*books, int(Note.TRUNCATED)] if length > limit else books or _PLAIN)


class Overlong(UserError):
    """A sample that is too long where `--overlong error` refuses one."""


def _token_spans(ranges: list[Span], offsets: Sequence[Span], chars: int, tokens: int) -> list[Span]:
    """Return the ranges of tokens that are labels.

    A token that covers both prompt and response belongs to the response, and the end token to a response that ends the
    text of `chars` characters. Nothing predicts the first token.
    """
    spans, at = [], 0
    for start, end in ranges:
        at, last = _token_span(offsets, start, end, at)
        if max(at, 1) < (last := tokens if end == chars else last):
            spans.append((max(at, 1), last))
    return spans


def _token_span(offsets: Sequence[Span], start: int, end: int, at: int) -> Span:
    """Return the range of tokens that cover the characters [start, end), wholly or in part.

    Args:
        at: where to begin looking: the first token of the range before, if ranges are asked for in turn.
    """
    while at < len(offsets) and offsets[at][1] <= start:
        at += 1
    last = at
    # A tokenizer's own special tokens stand nowhere in the text: (0, 0), also at its end.
    while last < len(offsets) and offsets[last][0] < end and offsets[last] != (0, 0):
        last += 1
    return at, last
