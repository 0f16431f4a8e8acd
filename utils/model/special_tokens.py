"""The tokens with a task: those that generation stops at, the one that closes an answer, and rows for all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

from utils.distributed.ranks import print_rank_0

SAMPLES_READ = 200
USUAL_SHARE = 0.1  # of the samples: a token that closes fewer is no habit of the data
LONGEST_TAIL = 4  # tokens of white space between what closes an answer and the end token


def token_rows(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many rows an embedding needs: one for every id up to the highest, also where ids are left out."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that are no part of a text: special tokens and those added to the vocabulary."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def end_ids(tokenizer: PreTrainedTokenizerBase, model: transformers.PreTrainedModel) -> list[int]:
    """Return the ids that generation stops at: the tokenizer's end token, then those of the checkpoint's list.

    A single id is no list that somebody chose: the tokenizer's end token takes its place. Many families have a default
    of their own, which is some word of another family's tokenizer.
    """
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = token_rows(tokenizer)
    for settings in (model.generation_config, model.config):
        ids = getattr(settings, "eos_token_id", None)
        found += [end for end in ids if 0 <= end < rows] if isinstance(ids, list) else []
    return list(dict.fromkeys(found))


def stop_at(model: transformers.PreTrainedModel, ids: list[int]) -> None:
    """Have generation stop at these ids, in both configurations; a single one is a plain number."""
    for settings in (model.config, model.generation_config):
        settings.eos_token_id = ids[0] if len(ids) == 1 else list(ids) or None


def closing_ids(samples: Iterable[list[int]], end_id: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that close answers in samples, before the end token and white space."""
    special = special_ids(tokenizer) - {end_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    counts: Counter[int] = Counter()
    read = 0
    for ids in samples:
        if not ids or ids[-1] != end_id:
            continue  # truncated
        read += 1
        tail = ids[-1 - LONGEST_TAIL : -1]
        while tail and tail[-1] not in special and not tokenizer.decode([tail[-1]]).strip():
            tail = tail[:-1]
        if tail and tail[-1] in special:
            counts[tail[-1]] += 1
    return [token for token, count in counts.most_common() if count >= USUAL_SHARE * read]


def stop_where_answers_end(model: transformers.PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Any) -> None:
    """Add what closes the answers of the training data to what generation stops at, and print it.

    A base model may be trained on the turns of a chat template: it learns the token that closes a turn, and has to be
    stopped there.

    Args:
        data: samples with `input_ids`, each ended by the tokenizer's end token.
    """
    samples = (data[place]["input_ids"].tolist() for place in range(min(len(data), SAMPLES_READ)))
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    added = [token for token in closing_ids(samples, tokenizer.eos_token_id, tokenizer) if token not in stops]
    if added:
        stop_at(model, [*stops, *added])
        print_rank_0(
            f"Stop tokens: answers in the data end with {_names(added, tokenizer)}, which generation did not stop at: "
            "added"
        )
    if len(stops) + len(added) > 1:
        print_rank_0(f"Stop tokens: generation stops at {_names([*stops, *added], tokenizer)}")


def _names(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return ", ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in ids)
