"""Byte-level BPE by tiktoken: the ids of a GPT-2 style tokenizer, several times as fast as `tokenizers` makes them.

Encoded by tiktoken: BPE over bytes without dropout, words split by one regular expression, no normalizer but NFC (OPT,
GPT-2, GPT-NeoX). Left to the tokenizer itself: every other kind; vocabularies whose merges make one token in several
ways (Llama 3); texts that contain an added token, as chat formats do; texts that NFC would change; and texts with a
character outside Unicode 3.2, since the two libraries may implement different versions of Unicode.

Why the ids are the same. Both merge the pair of least rank, the leftmost first, but `tokenizers` ranks pairs and
tiktoken ranks their results. Where every token has one pair, the two differ only when tiktoken joins x and y into a
token t whose pair is another one. Until then both did the same inside t, and so did `tokenizers` with t alone, which
would end at x y. So no such x, y exist if `tokenizers` encodes every token, given as a word, as itself; that is checked
for the whole vocabulary. Words are split by the same expression, on characters that both libraries classify alike:
1,456 characters are tried each time, all of them in `tests/data/test_byte_bpe.py`.
"""

import json
import os
import re
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

try:
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str
except ImportError:  # optional: without it the same ids take longer
    tiktoken = None

SEPARATOR = "\ufdd0"  # Unicode assigns it to no character, so no text encoded here contains it
MAX_THREADS = 8
ROWS_WORTH_IT = 5_000  # making a `ByteBpe` takes half a second, which so many texts save
TRIED = [*range(0x500), *range(0x2000, 0x2070), *range(0x3000, 0x3040)]  # alphabets, spaces, signs
CASE_VARIANTS = "\u017f\u212a"  # some libraries take these for s and k when they ignore case
NOT_IN_UTF8 = {bytes([byte]) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}  # some vocabularies lack them
BYTES = {letter: bytes([byte]) for byte, letter in bytes_to_unicode().items()}


@cache
def unknown_character() -> re.Pattern[str]:
    """Return a pattern that matches all characters but those that Unicode 3.2 (2002) and Python's classify alike."""
    old, new = unicodedata.ucd_3_2_0.category, unicodedata.category
    codes = [code for code in range(0x10000) if old(chr(code)) not in ("Cn", "Cs") and chr(code) not in CASE_VARIANTS]
    codes = [code for code in codes if old(chr(code))[0] == new(chr(code))[0]]
    starts = [code for code, before in zip(codes, [-2, *codes], strict=False) if code != before + 1]
    ends = [code for code, after in zip(codes, [*codes[1:], -2], strict=True) if after != code + 1]
    ranges = "".join(f"\\u{start:04x}-\\u{end:04x}" for start, end in zip(starts, ends, strict=True))
    return re.compile(f"[^{ranges}]")


class ByteBpe:
    """Gives the ids of the tokenizer it replaces in `tokenize_rows.py`, which still encodes what tiktoken can't."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pattern: str, ids: dict[str, int], nfc: bool) -> None:
        self.tokenizer = tokenizer
        self.bos_token = tokenizer.bos_token
        self.nfc = nfc
        ranks = {b"".join(BYTES[letter] for letter in token): rank for rank, token in enumerate(ids)}
        self.encoding = tiktoken.Encoding(
            "", pat_str=pattern, mergeable_ranks=ranks, special_tokens={SEPARATOR: len(ids)}
        )
        self.ids = np.fromiter([*ids.values(), -1], dtype=np.int32, count=len(ids) + 1)
        added = [re.escape(token) for token in tokenizer.get_added_vocab()]
        self.added = re.compile("|".join(added) or r"(?!)")
        bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        at = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
        self.before, self.after = whole[:at], whole[at + len(bare) :]

    def takes(self, text: str) -> bool:
        """Whether `text` is encoded here, not by the tokenizer."""
        plain = text.isascii() or (
            not unknown_character().search(text) and (not self.nfc or unicodedata.is_normalized("NFC", text))
        )
        return plain and not self.added.search(text)

    def __call__(self, texts: list[str], add_special_tokens: bool = True, **options: Any) -> dict[str, list[list[int]]]:
        """Return the token ids of each text, under "input_ids"."""
        here = [self.takes(text) for text in texts]
        others = [text for text, taken in zip(texts, here, strict=True) if not taken]
        made_there = iter(
            self.tokenizer(others, add_special_tokens=add_special_tokens, **options)["input_ids"] if others else ()
        )
        made_here = self._encoded([text for text, taken in zip(texts, here, strict=True) if taken])
        before, after = (self.before, self.after) if add_special_tokens else ([], [])
        ids = [[*before, *next(made_here), *after] if taken else next(made_there) for taken in here]
        return {"input_ids": ids}

    def _encoded(self, texts: list[str]) -> Iterator[list[int]]:
        """Encode the texts over as many threads as `tokenizers` uses."""
        many = os.environ.get("TOKENIZERS_PARALLELISM", "true").lower() not in ("false", "0", "off", "no", "f", "n")
        threads = min(os.cpu_count() or 1, MAX_THREADS, len(texts)) if many else 1
        if threads < 2:
            yield from self._encoded_as_one(texts)
            return
        # Each thread joins its texts to one, since threads run in parallel only within a call of tiktoken.
        parts = [texts[len(texts) * n // threads : len(texts) * (n + 1) // threads] for n in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            for part in pool.map(self._encoded_as_one, parts):
                yield from part

    def _encoded_as_one(self, texts: list[str]) -> list[list[int]]:
        joined = "".join(text + SEPARATOR for text in texts)
        ranks = self.encoding.encode_to_numpy(joined, allowed_special={SEPARATOR}, disallowed_special=())
        ends = np.flatnonzero(ranks == len(self.ids) - 1).tolist()
        ids = self.ids[ranks]
        return [ids[start:end].tolist() for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]


def quick_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int) -> PreTrainedTokenizerBase | ByteBpe:
    """Return what to encode `rows` texts with: `tokenizer`, or a `ByteBpe` with its ids where that saves time."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if tiktoken is None or backend is None or rows < ROWS_WORTH_IT:
        return tokenizer
    return _byte_bpe(tokenizer, backend.to_str()) or tokenizer


@lru_cache(maxsize=1)  # a run encodes several parts of data sets with one tokenizer
def _byte_bpe(tokenizer: PreTrainedTokenizerBase, content: str) -> ByteBpe | None:
    """Return a `ByteBpe` with the ids of `tokenizer`, whose tokenizer.json this is; None where that is not certain."""
    rules = json.loads(content)
    pattern, ids = _word_pattern(rules["pre_tokenizer"]), _ids_in_order(rules["model"])
    normalizer = (rules["normalizer"] or {}).get("type")
    if pattern is None or ids is None or normalizer not in (None, "NFC"):
        return None
    model = tokenizer.backend_tokenizer.model  # does not split words, so each token is encoded as one word
    if any(len(model.tokenize(token)) != 1 for token in ids):
        return None
    quick = ByteBpe(tokenizer, pattern, ids, normalizer == "NFC")
    letters = "".join(f"{letter}a {letter}" for letter in map(chr, range(0xD800)))
    if quick.encoding.decode(quick.encoding.encode_ordinary(letters)) != letters:
        return None  # `tokenizers` makes words of what the expression does not match; tiktoken drops it
    tried = [f"a{letter}1{letter} {letter}.{letter}{letter}\n" for letter in map(chr, TRIED)]
    return quick if quick(tried) == {"input_ids": tokenizer(tried)["input_ids"]} else None


def _word_pattern(rules: dict[str, Any] | None) -> str | None:
    """Return the expression by which a tokenizer.json's pre_tokenizer splits words; None where it does more."""
    steps = (rules or {}).get("pretokenizers") or [rules or {}]
    *cuts, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):
        return None if cuts else r50k_pat_str  # GPT-2's
    if len(cuts) != 1 or cuts[0].get("type") != "Split" or cuts[0]["behavior"] != "Isolated" or cuts[0]["invert"]:
        return None
    return cuts[0]["pattern"].get("Regex")


def _ids_in_order(model: dict[str, Any]) -> dict[str, int] | None:
    """Return the id of each token of a tokenizer.json's model, bytes first, then merges; None for other kinds."""
    different = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    if model["type"] != "BPE" or any(model.get(name) for name in different):
        return None
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    tokens = [
        *(letter for letter, byte in BYTES.items() if byte not in NOT_IN_UTF8),
        *("".join(pair) for pair in pairs),
    ]
    if len(set(tokens)) < len(tokens) or not all(token in model["vocab"] for token in tokens):
        return None
    return {token: model["vocab"][token] for token in tokens}
