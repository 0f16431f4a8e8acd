"""What a run and its continuation share beside arguments and data: the base model's configuration, and the tokenizer.

Both are read again where a run goes on, and may have been edited under the same path.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from utils.errors import UserError
from utils.model.weight_files import path_of

# Entries of config.json that no forward reads.
NOT_COMPUTED = {
    "_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "tie_word_embeddings",
}  # fmt: skip
SHOWN = 3


def configuration_record(name: str) -> dict[str, Any] | None:
    """Return what config.json of a model says that its forwards read, by dotted names; None where it can't be read.

    Whether the head is tied is left out: a run writes down what it found in the files.
    """
    try:
        path = path_of(name, "config.json")
        with open(path or "", encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, UserError):
        return None
    return dict(_entries(content, "")) if isinstance(content, dict) else None


def _entries(content: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if key in NOT_COMPUTED or key.endswith("_token_id"):
            continue
        if isinstance(value, dict):
            yield from _entries(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def changed_configuration(then: dict[str, Any] | None, now: dict[str, Any] | None) -> str:
    """Return words on the entries that differ, the first few; "" where none does or one of the two is not known."""
    if then is None or now is None:
        return ""
    names = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    words = [f"{name}: {then.get(name)} then, {now.get(name)} now" for name in names[:SHOWN]]
    return "; ".join([*words, f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else words)


def vocabulary_record(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of every token and its id, and of the special ones."""
    content = [sorted(tokenizer.get_vocab().items()), str(tokenizer.special_tokens_map)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
