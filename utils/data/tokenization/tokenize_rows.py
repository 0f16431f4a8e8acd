"""Turns rows into token ids: each text encoded as a whole, then made a sample by `utils.data.tokenization.entries`."""

import copy
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from utils.data.formats.base import PromptRawDataset, RowTexts
from utils.data.formats.column_text import Span
from utils.data.formats.rendered import begins_with, pattern_of
from utils.data.outcomes import FIRST_TOKEN, Note
from utils.data.reading.schema import LATE
from utils.data.tokenization.byte_bpe import ByteBpe, quick_tokenizer
from utils.data.tokenization.entries import Entries
from utils.data.tokenization.sample_form import (
    DEFAULT_END_TOKEN,
    Rule,
    SampleForm,
    end_of_conversation_token,
    end_token_id,
    sample_features,
)

__all__ = [
    "DEFAULT_END_TOKEN",
    "SampleForm",
    "encode",
    "end_of_conversation_token",
    "end_token_id",
    "has_own_bos",
    "map_arguments",
    "row_tokenizer",
    "sample_features",
    "tokenize",
]


def row_tokenizer(sample: SampleForm, rows: int) -> PreTrainedTokenizerBase | ByteBpe:
    """Return what encodes `rows` texts: the sample's tokenizer, or tiktoken where it is faster and gives the same ids.

    tiktoken does not tell which characters a token covers, which completion-only loss needs.
    """
    return sample.tokenizer if sample.completion_only else quick_tokenizer(sample.tokenizer, rows)


def map_arguments(
    raw: PromptRawDataset, sample: SampleForm, phase: int, tokenizer: PreTrainedTokenizerBase | ByteBpe
) -> dict[str, Any]:
    """Return the arguments of a data set's `map` that tokenize the rows of `raw` for one phase.

    Args:
        tokenizer: made by `row_tokenizer`.
    """
    source = copy.copy(raw)
    source.raw_datasets = None  # a worker process needs to know how texts are made, not the data
    rule = Rule(phase, sample.end_id, sample, sample.tokenizer.bos_token, sample.special)
    return {
        "function": tokenize,
        "batched": True,
        "fn_kwargs": {"source": source, "tokenizer": tokenizer, "rule": rule},
        "features": sample_features(phase, sample.completion_only),
    }


def tokenize(
    columns: dict[str, list], source: PromptRawDataset, tokenizer: PreTrainedTokenizerBase | ByteBpe, rule: Rule
) -> dict[str, list]:
    """Turn one batch of rows into the phase's id columns and the columns `BOOKS` and `UNREAD`.

    With completion-only loss, `label_spans` holds starts and ends of responses in turn. Prompt and responses are
    encoded together, so the ids are the same with and without it.

    Returns:
        an entry for each sample, and one without ids for each row, or answer, that gives none.

    Raises:
        UserError: a row can't be used as it asks to be, or is too long where that is an error.
    """
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    entries = Entries(rule)
    labels = rule.sample.completion_only
    if source.has_ids and rule.phase == 1:
        for row in rows:
            entries.name_unread(row.get(LATE) or ())
            entries.add_given(*source.given_ids(row, labels))
        return entries.finished()
    read = [source.read_row(row, rule.phase, labels) for row in rows]
    own_bos = [has_own_bos(row.samples[0][0], rule.bos) if row.samples else False for row in read]
    ids, offsets = _encoded(read, own_bos, tokenizer, rule)
    words = "\n".join(word for row in read for word in row.words)
    # Once for all rows: hardly any has a special token, and looking for a plain word is far quicker.
    pattern = pattern_of(tuple(rule.special)) if any(token in words for token in rule.special) else None
    at = 0
    late = columns.get(LATE) or [None] * len(rows)
    for row, is_own, names in zip(read, own_bos, late, strict=True):
        if row.unread or names:
            entries.name_unread((*row.unread, *(names or ())))
        if not row.samples:
            entries.drop(row.dropped)
            continue
        books = _books(row, is_own, rule, pattern)
        for number, texts in enumerate(row.samples):
            if len(row.samples) > 1:
                books.append(int(Note.SPLIT_SAMPLE))
            parts = ids[at : at + len(texts)]
            if labels:
                entries.add(parts, books, row.spans[number], offsets[at], len(texts[0]))
            else:
                entries.add(parts, books)
            at += len(texts)
            books = []  # said once for a row
    return entries.finished()


def has_own_bos(text: str, bos: str | None) -> bool:
    """Whether a text begins with BOS, so that the tokenizer must add none."""
    return bos is not None and begins_with(text, bos)


def encode(
    tokenizer: PreTrainedTokenizerBase | ByteBpe, texts: list[str], adds_special: list[bool], **options: Any
) -> tuple[list[list[int]], list[list[Span]]]:
    """Return the ids of each text, and with `return_offsets_mapping` the characters of each token.

    Args:
        adds_special: of each text, whether the tokenizer adds its special tokens.
    """
    ids: list[list[int]] = [[]] * len(texts)
    offsets: list[list[Span]] = [[]] * len(texts)
    for kind in set(adds_special):
        places = [place for place, adds in enumerate(adds_special) if adds == kind]
        chosen = texts if len(places) == len(texts) else [texts[place] for place in places]
        found = tokenizer(chosen, return_attention_mask=False, verbose=False, add_special_tokens=kind, **options)
        if chosen is texts:
            return found["input_ids"], found.get("offset_mapping") or offsets
        for at, place in enumerate(places):
            ids[place] = found["input_ids"][at]
            offsets[place] = found["offset_mapping"][at] if options.get("return_offsets_mapping") else []
    return ids, offsets


def _encoded(
    read: list[RowTexts], own_bos: list[bool], tokenizer: PreTrainedTokenizerBase | ByteBpe, rule: Rule
) -> tuple[list[list[int]], list[list[Span]]]:
    """Return ids, and where labels are asked for the characters of each token, of all texts in turn."""
    added = rule.sample.end_text if rule.sample.end_text and rule.phase < 3 else ""
    texts = [text + added for row in read for texts in row.samples for text in texts]
    adds = [
        row.adds_special and not is_own
        for row, is_own in zip(read, own_bos, strict=True) for texts in row.samples for _ in texts
    ]  # fmt: skip
    options = {"return_offsets_mapping": True} if rule.sample.completion_only else {}
    return encode(tokenizer, texts, adds, **options)


def _books(row: RowTexts, is_own_bos: bool, rule: Rule, pattern: re.Pattern[str] | None) -> list[int]:
    """Return what is to be said of a row, its special tokens too, but BOS and end token around a whole text.

    Args:
        pattern: of the special tokens; None where the row has none.
    """
    words = () if pattern is None else [text for text in row.words if pattern.search(text)]
    if not row.notes and not is_own_bos and not words:
        return []
    books = [*map(int, row.notes)]
    if is_own_bos and row.adds_special:
        books.append(int(Note.OWN_BOS))
    for text in words:
        if text is row.samples[0][0]:
            text = text.lstrip().removeprefix(rule.bos or "").removesuffix(rule.sample.end_token)
        found = {FIRST_TOKEN + rule.special[match[0]] for match in pattern.finditer(text)}
        books += sorted(found.difference(books))
    return books
