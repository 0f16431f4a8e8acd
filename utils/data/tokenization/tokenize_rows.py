"""Turns rows into token ids: each text encoded as a whole, ended by one end token, truncated to `max_seq_len`."""

import copy
from typing import Any, NamedTuple

import datasets
from transformers import PreTrainedTokenizerBase

from utils.data.formats.base import PromptRawDataset
from utils.data.prompt_dataset import ID_COLUMNS
from utils.data.tokenization.byte_bpe import ByteBpe, quick_tokenizer
from utils.errors import UserError

DEFAULT_END_TOKEN = "<|endoftext|>"


class SampleForm(NamedTuple):
    """What a sample is."""

    tokenizer: PreTrainedTokenizerBase
    end_token: str  # the token that ends every sample, as text
    max_seq_len: int  # longer samples are truncated
    completion_only: bool = False  # label only the responses (phase 1)
    end_text: str | None = None  # in place of `end_token`: added to each text before it is encoded

    @property
    def end_id(self) -> int | None:
        """The id of the end token, see `end_token_id`; None with `end_text`.

        Read it once, not per row: it looks up the whole vocabulary.
        """
        return None if self.end_text is not None else end_token_id(self.tokenizer, self.end_token)


def end_token_id(tokenizer: PreTrainedTokenizerBase, end_of_conversation_token: str) -> int:
    """Return the id that ends every sample.

    Raises:
        UserError: the tokenizer has no such single token.
    """
    token_id = tokenizer.get_vocab().get(end_of_conversation_token)
    if token_id is None:
        raise UserError(
            f"the end-of-conversation token {end_of_conversation_token!r} is not one token of this tokenizer "
            f"(its own end token is {tokenizer.eos_token!r}): use that, or add it with --add_eot_token."
        )
    return token_id


def end_of_conversation_token(tokenizer: PreTrainedTokenizerBase, eot_token: str | None, model_name: str) -> str:
    """Return the text of the token that ends every sample: `eot_token`, or the tokenizer's eos where it is None.

    Args:
        eot_token: `--eot_token` where `--add_eot_token` is given, else None.
        model_name: the model whose tokenizer this is, for the message.

    Raises:
        UserError: there is no end token, or it is not one token of the tokenizer.
    """
    token = tokenizer.eos_token if eot_token is None else eot_token
    if token is None:
        raise UserError(f"the tokenizer of {model_name} has no end token: add one with --add_eot_token.")
    end_token_id(tokenizer, token)
    return token


def sample_features(phase: int, completion_only: bool) -> datasets.Features:
    """Return the columns of tokenized samples."""
    ids = {name: datasets.List(datasets.Value("int32")) for name in ID_COLUMNS[phase]}
    features = datasets.Features({**ids, "truncated": datasets.Value("bool")})
    if completion_only:
        features["label_spans"] = datasets.List(datasets.Value("int32"))
    return features


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
    arguments = {"source": source, "tokenizer": tokenizer, "end_id": sample.end_id, "max_seq_len": sample.max_seq_len}
    if not sample.completion_only:
        arguments |= {"phase": phase, "end_text": sample.end_text}
    return {
        "function": tokenize_completions if sample.completion_only else tokenize,
        "batched": True,
        "fn_kwargs": arguments,
        "features": sample_features(phase, sample.completion_only),
    }


def tokenize(
    columns: dict[str, list],
    source: PromptRawDataset,
    tokenizer: Any,
    phase: int,
    end_id: int | None,
    max_seq_len: int,
    end_text: str | None = None,
) -> dict[str, list]:
    """Turn one batch of rows into the phase's id columns and `truncated`; drops rows without a text or a label."""
    rows = _rows(columns)
    if source.has_ids and phase == 1:
        return _given(rows, source, max_seq_len, may_mask=False)
    if phase == 1:
        for row in rows:
            source.refuse_unlabelled(row)
    added = end_text if end_text and phase < 3 else ""
    flat = [text + added for pair in _texts(rows, source, phase) for text in pair]
    encoded = []
    if flat:
        encoded = tokenizer(
            flat, return_attention_mask=False, verbose=False, add_special_tokens=source.add_special_tokens
        )["input_ids"]
    if phase == 3:
        kept = [ids for ids in encoded if 0 < len(ids) <= max_seq_len]
        return {"prompt_ids": kept, "truncated": [False] * len(kept)}
    whole = encoded if end_id is None else [_with_end(ids, end_id) for ids in encoded]
    names = ID_COLUMNS[phase]
    result: dict[str, list] = {name: [] for name in [*names, "truncated"]}
    for start in range(0, len(whole), len(names)):
        pair = whole[start : start + len(names)]
        if min(map(len, pair)) < 2:  # nothing follows the first token, so there is no label
            continue
        for name, ids in zip(names, pair, strict=True):
            result[name].append(ids[:max_seq_len])
        result["truncated"].append(max(map(len, pair)) > max_seq_len)
    return result


def tokenize_completions(
    columns: dict[str, list], source: PromptRawDataset, tokenizer: Any, end_id: int, max_seq_len: int
) -> dict[str, list]:
    """Turn rows into phase 1 samples as `tokenize` does, and add `label_spans`: starts and ends of responses in turn.

    Prompt and responses are encoded together, so the ids are those of `tokenize`; where a response begins and ends is
    read off the characters that each token covers. A token that covers both prompt and response belongs to the
    response. The end token belongs to a response that ends the text.
    """
    if source.has_ids:
        return _given(_rows(columns), source, max_seq_len, may_mask=True)
    pairs = [pair for row in _rows(columns) for pair in source.labelled_texts(row)]
    result: dict[str, list] = {"input_ids": [], "label_spans": [], "truncated": []}
    if not pairs:
        return result
    encoded = tokenizer(
        [text for text, _ in pairs], return_attention_mask=False, return_offsets_mapping=True, verbose=False,
        add_special_tokens=source.add_special_tokens,
    )  # fmt: skip
    for (text, ranges), ids, offsets in zip(pairs, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        whole = _with_end(ids, end_id)
        kept = min(len(whole), max_seq_len)
        spans = []
        for start, end in ranges:
            first, last = _token_span(offsets, start, end)
            last = len(whole) if end == len(text) else last
            if max(first, 1) < min(last, kept):  # nothing predicts the first token
                spans += [max(first, 1), min(last, kept)]
        if spans:  # without one there is no label
            result["input_ids"].append(whole[:kept])
            result["label_spans"].append(spans)
            result["truncated"].append(len(whole) > max_seq_len)
    return result


def _given(rows: list[dict], source: PromptRawDataset, max_seq_len: int, may_mask: bool) -> dict[str, list]:
    """Return the samples of rows that bring token ids, as they are; with `may_mask`, with the spans of their labels."""
    result: dict[str, list] = {"input_ids": [], "truncated": []} | ({"label_spans": []} if may_mask else {})
    for row in rows:
        ids, edges = source.given_ids(row, may_mask)
        pairs = zip(edges[::2], edges[1::2], strict=True)
        spans = [at for start, end in pairs if start < max_seq_len for at in (start, min(end, max_seq_len))]
        if len(ids) < 2 or not spans:
            continue
        result["input_ids"].append(ids[:max_seq_len])
        result["truncated"].append(len(ids) > max_seq_len)
        if may_mask:
            result["label_spans"].append(spans)
    return result


def _rows(columns: dict[str, list]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _texts(rows: list[dict], source: PromptRawDataset, phase: int) -> list[tuple[str, ...]]:
    """Return the texts that each row gives this phase; drops rows that lack one."""
    ways = {
        1: (source.get_prompt_and_chosen,),
        2: (source.get_prompt_and_chosen, source.get_prompt_and_rejected),
        3: (source.get_prompt,),
    }[phase]
    texts = [tuple(way(row) for way in ways) for row in rows]
    return [pair for pair in texts if None not in pair]


def _with_end(ids: list[int], end_id: int) -> list[int]:
    """Return `ids` ending in `end_id` exactly once (some tokenizers append it themselves)."""
    return ids if ids and ids[-1] == end_id else [*ids, end_id]


def _token_span(offsets: list[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """Return the range of tokens that cover the characters [start, end), wholly or in part."""
    first = next((at for at, (_, stop) in enumerate(offsets) if stop > start), len(offsets))
    last = next((at for at in range(len(offsets) - 1, first - 1, -1) if offsets[at][0] < end), first - 1)
    return first, last + 1
