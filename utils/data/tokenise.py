"""From rows to token ids: whole texts, encoded jointly, ended once, cut to length."""

from typing import Any

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
    encoded = tokenizer(flat, return_attention_mask=False, verbose=False)["input_ids"] if flat else []
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


def _common_prefix(prompt: str, text: str) -> int:
    """How many characters of `text` are the prompt's; all of them, unless a set joins the two in its own way."""
    if text.startswith(prompt):
        return len(prompt)
    return next(at for at, pair in enumerate(zip(f"{prompt}\0", f"{text}\1", strict=False)) if pair[0] != pair[1])


def tokenise_completions(
    columns: dict[str, list], source: PromptRawDataset, tokenizer: Any, end_id: int, max_seq_len: int
) -> dict[str, list]:
    """As `tokenise` for phase 1, with `prompt_tokens`: how many tokens stand before the response.

    Prompt and response are encoded jointly, so the ids are the same as without; the boundary is read off the
    characters each token covers. A token that covers both belongs to the response.
    """
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    rows = [row for row in rows if source.get_prompt_and_chosen(row) is not None]
    texts = [source.get_prompt_and_chosen(row) for row in rows]
    result: dict[str, list] = {"input_ids": [], "prompt_tokens": [], "cut": []}
    if not rows:
        return result
    encoded = tokenizer(texts, return_attention_mask=False, return_offsets_mapping=True, verbose=False)
    for row, text, ids, offsets in zip(rows, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        boundary = _common_prefix(source.get_prompt(row) or "", text)
        before = next((at for at, (_, end) in enumerate(offsets) if end > boundary), len(ids))
        whole = _with_end(ids, end_id)
        if max(before, 1) < min(len(whole), max_seq_len):  # else no label is left
            result["input_ids"].append(whole[:max_seq_len])
            result["prompt_tokens"].append(before)
            result["cut"].append(len(whole) > max_seq_len)
    return result
