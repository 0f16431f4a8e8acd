"""Numbers about answers, from their texts alone. Pure: no model, no files."""

import re
from collections.abc import Sequence

REPEATED_N = 4
# Scripts without spaces count by character, all others by word.
_UNIT = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+(?:'\w+)?")


def words(text: str) -> list[str]:
    """The words of a text in lower case, punctuation left out; Chinese and Japanese ones are single characters."""
    return _UNIT.findall(text.lower())


def ngrams(units: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Every run of n neighbours."""
    return [tuple(units[start : start + n]) for start in range(len(units) - n + 1)]


def distinct_share(texts: Sequence[str], n: int) -> float | None:
    """distinct-n (Li et al. 2016, https://arxiv.org/abs/1510.03055): different n-grams of all texts / all n-grams.

    None where no text has n words.
    """
    found = [gram for text in texts for gram in ngrams(words(text), n)]
    return len(set(found)) / len(found) if found else None


def repeated_share(texts: Sequence[str], n: int = REPEATED_N) -> float | None:
    """Share of n-grams that stood earlier in the same text (Su et al. 2022's rep-n, over all texts' n-grams)."""
    per_text = [ngrams(words(text), n) for text in texts]
    total = sum(map(len, per_text))
    return 1 - sum(len(set(grams)) for grams in per_text) / total if total else None


def summarise(texts: Sequence[str], tokens: Sequence[int], ended: Sequence[bool]) -> dict[str, float | None]:
    """The figures of one model's answers under one strategy; texts, tokens and ended are [answers], at least one."""
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
    """How often the fine-tuned model's score is the higher one, the same, the lower one; both [answers]."""
    pairs = list(zip(baseline, finetuned, strict=True))
    return {
        "win": sum(after > before for before, after in pairs),
        "tie": sum(after == before for before, after in pairs),
        "loss": sum(after < before for before, after in pairs),
    }
