"""Turns rows into token ids: each text encoded as a whole, then made a sample by `utils.data.tokenization.entries`."""

import copy
import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from utils.data.formats.base import PromptRawDataset, RowTexts
from utils.data.formats.rendered import begins_with, pattern_of
from utils.data.outcomes import Note
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
    """Turn one batch of rows into the phase's id columns and the columns of `BOOKS`.

    With completion-only loss, `label_spans` holds starts and ends of responses in turn. Prompt and responses are
    encoded together, so the ids are the same with and without it.

    Returns:
        an entry for each sample, and one without ids for each row, or answer, that gives none.

    Raises:
        UserError: a row can't be used as it asks to be, or is too long where that is an error.
    """
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    entries = Entries(rule)
    if source.has_ids and rule.phase == 1:
        for row in rows:
            entries.add_given(*source.given_ids(row, rule.sample.completion_only))
        return entries.columns
    read = [source.read_row(row, rule.phase, rule.sample.completion_only) for row in rows]
    encoded = _encoded(read, tokenizer, rule)
    pattern = pattern_of(tuple(rule.special))
    for row in read:
        if not row.samples:
            entries.add([], dropped=row.dropped)
            continue
        notes, special = list(row.notes), _special_in(row, rule, pattern)
        if row.adds_special and begins_with(row.samples[0][0], rule.bos):
            notes.append(Note.OWN_BOS)
        for number, texts in enumerate(row.samples):
            made = [next(encoded) for _ in texts]
            if len(row.samples) > 1:
                notes.append(Note.SPLIT_SAMPLE)
            spans = row.spans[number] if rule.sample.completion_only else None
            entries.add_sample(made, spans, len(texts[0]), notes, special)
            notes, special = [], []  # said once for a row
    return entries.columns


def encode(
    tokenizer: PreTrainedTokenizerBase | ByteBpe, texts: list[str], adds_special: list[bool], **options: Any
) -> list[tuple[list[int], Any]]:
    """Return the ids of each text, and with `return_offsets_mapping` the characters of each token.

    The tokenizer adds its special tokens to the texts for which `adds_special` says so, but to none that begins with
    BOS: that text has its own.
    """
    bos = tokenizer.bos_token
    adds = [add and not begins_with(text, bos) for text, add in zip(texts, adds_special, strict=True)]
    made: dict[bool, Iterator[tuple[list[int], Any]]] = {}
    for kind in set(adds):
        chosen = [text for text, add in zip(texts, adds, strict=True) if add == kind]
        found = tokenizer(chosen, return_attention_mask=False, verbose=False, add_special_tokens=kind, **options)
        made[kind] = zip(found["input_ids"], found.get("offset_mapping") or [None] * len(chosen), strict=True)
    return [next(made[kind]) for kind in adds]


def _encoded(
    read: list[RowTexts], tokenizer: PreTrainedTokenizerBase | ByteBpe, rule: Rule
) -> Iterator[tuple[list[int], Any]]:
    """Return ids, and where labels are asked for the characters of each token, of all texts in turn."""
    added = rule.sample.end_text if rule.sample.end_text and rule.phase < 3 else ""
    texts = [text + added for row in read for texts in row.samples for text in texts]
    adds = [row.adds_special for row in read for texts in row.samples for _ in texts]
    options = {"return_offsets_mapping": True} if rule.sample.completion_only else {}
    return iter(encode(tokenizer, texts, adds, **options))


def _special_in(row: RowTexts, rule: Rule, pattern: re.Pattern[str]) -> list[int]:
    """Return the special tokens inside what the row itself says, without BOS and end token around a whole text."""
    found: set[int] = set()
    for text in row.words:
        if pattern.search(text) is None:
            continue
        if text is row.samples[0][0]:
            bare = text.lstrip()
            text = bare.removeprefix(rule.bos or "").removesuffix(rule.sample.end_token)
        found |= {rule.special[match[0]] for match in pattern.finditer(text)}
    return sorted(found)
