"""From rows to token ids: whole texts, encoded jointly, ended once, cut to length."""

from argparse import Namespace
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from utils.data.prompt_dataset import ID_COLUMNS
from utils.data.raw_datasets import PromptRawDataset
from utils.errors import UserError

DEFAULT_END_TOKEN = "<|endoftext|>"


def end_token_id(tokenizer: PreTrainedTokenizerBase, end_of_conversation_token: str) -> int:
    """The one id that ends every sample; UserError when the tokenizer has no such single token."""
    token_id = tokenizer.get_vocab().get(end_of_conversation_token)
    if token_id is None and end_of_conversation_token == DEFAULT_END_TOKEN:
        token_id = tokenizer.eos_token_id  # nobody asked for the default: the tokenizer's own end is meant
    if token_id is None:
        raise UserError(
            f"the end-of-conversation token {end_of_conversation_token!r} is not one token of this tokenizer "
            f"(its own end token is {tokenizer.eos_token!r}): use that, or add it with --add_eot_token."
        )
    return token_id


def sample_features(phase: int, completion_only: bool) -> datasets.Features:
    """The columns of tokenised samples."""
    ids = {name: datasets.List(datasets.Value("int32")) for name in ID_COLUMNS[phase]}
    features = datasets.Features({**ids, "cut": datasets.Value("bool")})
    if completion_only:
        features["label_spans"] = datasets.List(datasets.Value("int32"))
    return features


def _with_end(ids: list[int], end_id: int) -> list[int]:
    """`ids` ending in `end_id` exactly once (some tokenizers append it themselves)."""
    return ids if ids and ids[-1] == end_id else [*ids, end_id]


def _texts(rows: list[dict], source: PromptRawDataset, phase: int) -> list[tuple[str, ...]]:
    """The texts each row gives this phase; rows that lack one are left out."""
    ways = {
        1: (source.get_prompt_and_chosen,),
        2: (source.get_prompt_and_chosen, source.get_prompt_and_rejected),
        3: (source.get_prompt,),
    }[phase]
    texts = [tuple(way(row) for way in ways) for row in rows]
    return [pair for pair in texts if None not in pair]


def tokenise(
    columns: dict[str, list], source: PromptRawDataset, tokenizer: Any, phase: int, end_id: int, max_seq_len: int
) -> dict[str, list]:
    """One batch of rows -> the phase's id columns and `cut`; rows without a text or a label are left out."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    flat = [text for pair in _texts(rows, source, phase) for text in pair]
    encoded = []
    if flat:
        encoded = tokenizer(
            flat, return_attention_mask=False, verbose=False, add_special_tokens=source.add_special_tokens
        )["input_ids"]
    if phase == 3:
        kept = [ids for ids in encoded if 0 < len(ids) <= max_seq_len]
        return {"prompt_ids": kept, "cut": [False] * len(kept)}
    whole = [_with_end(ids, end_id) for ids in encoded]
    names = ID_COLUMNS[phase]
    result: dict[str, list] = {name: [] for name in [*names, "cut"]}
    for start in range(0, len(whole), len(names)):
        pair = whole[start : start + len(names)]
        if min(map(len, pair)) < 2:  # nothing follows the first token: no label
            continue
        for name, ids in zip(names, pair, strict=True):
            result[name].append(ids[:max_seq_len])
        result["cut"].append(max(map(len, pair)) > max_seq_len)
    return result


def _token_span(offsets: list[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """The tokens that cover the characters [start, end); one that covers others too belongs to them."""
    first = next((at for at, (_, stop) in enumerate(offsets) if stop > start), len(offsets))
    last = next((at for at in range(len(offsets) - 1, first - 1, -1) if offsets[at][0] < end), first - 1)
    return first, last + 1


def tokenise_completions(
    columns: dict[str, list], source: PromptRawDataset, tokenizer: Any, end_id: int, max_seq_len: int
) -> dict[str, list]:
    """As `tokenise` for phase 1, with `label_spans`: the tokens of the responses, as start and end by turns.

    Prompt and responses are encoded jointly, so the ids are the same as without; the boundaries are read off the
    characters each token covers. A token that covers both belongs to the response. What follows a response that
    ends the text, the end token, belongs to it too.
    """
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    pairs = [(row, source.get_prompt_and_chosen(row)) for row in rows]
    pairs = [(row, text) for row, text in pairs if text is not None]
    result: dict[str, list] = {"input_ids": [], "label_spans": [], "cut": []}
    if not pairs:
        return result
    encoded = tokenizer(
        [text for _, text in pairs], return_attention_mask=False, return_offsets_mapping=True, verbose=False,
        add_special_tokens=source.add_special_tokens,
    )  # fmt: skip
    for (row, text), ids, offsets in zip(pairs, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        whole = _with_end(ids, end_id)
        kept = min(len(whole), max_seq_len)
        spans = []
        for start, end in source.response_spans(row, text):
            first, last = _token_span(offsets, start, end)
            last = len(whole) if end == len(text) else last
            if max(first, 1) < min(last, kept):  # a first token is predicted by nothing
                spans += [max(first, 1), min(last, kept)]
        if spans:  # else no label is left
            result["input_ids"].append(whole[:kept])
            result["label_spans"].append(spans)
            result["cut"].append(len(whole) > max_seq_len)
    return result


def end_of_conversation_token(args: Namespace, tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that ends every sample: `--eot_token` if it was asked for, else the tokenizer's own eos."""
    token = args.eot_token if args.add_eot_token else tokenizer.eos_token
    if token is None:
        raise UserError(f"the tokenizer of {args.model_name_or_path} has no end token: add one with --add_eot_token.")
    end_token_id(tokenizer, token)
    return token
