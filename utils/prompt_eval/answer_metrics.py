"""Figures about answers, computed from their texts alone, without a model or files."""

import re
from collections.abc import Sequence
from typing import Any

REPEATED_N = 4
# strategy -> "baseline" and "finetuned": what `summarize` returns; if scored, "scores" per model and "wins"
Figures = dict[str, dict[str, Any]]
# Scripts without spaces are counted by character, all others by word.
_UNIT = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+(?:'\w+)?")


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation; each Chinese or Japanese character is a word."""
    return _UNIT.findall(text.lower())


def ngrams(units: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Return every sequence of n consecutive units."""
    return [tuple(units[start : start + n]) for start in range(len(units) - n + 1)]


def distinct_share(texts: Sequence[str], n: int) -> float | None:
    """Return distinct-n (Li et al. 2016, https://arxiv.org/abs/1510.03055): distinct n-grams / n-grams, of all texts.

    None if no text has n words.
    """
    found = [gram for text in texts for gram in ngrams(words(text), n)]
    return len(set(found)) / len(found) if found else None


def repeated_share(texts: Sequence[str], n: int = REPEATED_N) -> float | None:
    """Return the share of n-grams that occur earlier in the same text (rep-n of Su et al. 2022), over all texts.

    None if no text has n words.
    """
    per_text = [ngrams(words(text), n) for text in texts]
    total = sum(map(len, per_text))
    return 1 - sum(len(set(grams)) for grams in per_text) / total if total else None


def summarize(texts: Sequence[str], tokens: Sequence[int], ended: Sequence[bool]) -> dict[str, float | None]:
    """Return the figures of one model's answers by one strategy.

    Args:
        texts, tokens, ended: of every answer, at least one: its text, its length, whether it ended by itself.
    """
    count = len(texts)
    return {
        "answers": count,
        "mean_tokens": sum(tokens) / count,
        "mean_words": sum(len(words(text)) for text in texts) / count,
        "ended_share": sum(ended) / count,
        "distinct_1": distinct_share(texts, 1),
        "distinct_2": distinct_share(texts, 2),
        f"repeated_{REPEATED_N}": repeated_share(texts),
    }


def compare_scores(baseline: Sequence[float], finetuned: Sequence[float]) -> dict[str, int]:
    """Count how often the fine-tuned model's score is higher ("win"), equal ("tie") and lower ("loss").

    Args:
        baseline, finetuned: scores of the answers, in the same order.
    """
    pairs = list(zip(baseline, finetuned, strict=True))
    return {
        "win": sum(after > before for before, after in pairs),
        "tie": sum(after == before for before, after in pairs),
        "loss": sum(after < before for before, after in pairs),
    }
