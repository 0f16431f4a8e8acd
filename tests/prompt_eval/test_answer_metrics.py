"""Figures about answers, on texts whose figures can be counted by hand."""

import pytest

from utils.prompt_eval.answer_metrics import compare_scores, distinct_share, repeated_share, summarize, words


def test_words():
    assert words("It's a dog, isn't it?  DOG-days: 3.5") == ["it's", "a", "dog", "isn't", "it", "dog", "days", "3", "5"]
    assert words("你好,Microsoft 很大。") == ["你", "好", "microsoft", "很", "大"]
    assert words("カエルは Kaeru") == ["カ", "エ", "ル", "は", "kaeru"]
    assert words(" ... ") == []


def test_distinct_share_counts_over_all_texts():
    # a b a b | a b: 4 + 2 words of which 2 differ; ab ba ab | ab: 4 pairs of which 2 differ
    assert distinct_share(["a b a b", "A b!"], 1) == pytest.approx(2 / 6)
    assert distinct_share(["a b a b", "A b!"], 2) == pytest.approx(2 / 4)
    assert distinct_share(["a", ""], 2) is None


def test_repeated_share_counts_within_each_text():
    # "a b c d a b c d": abcd bcda cdab dabc abcd; the last one stood there before
    assert repeated_share(["a b c d a b c d"]) == pytest.approx(1 / 5)
    assert repeated_share(["a b c d", "a b c d"]) == 0
    assert repeated_share(["x x x x x", "a b c d"]) == pytest.approx(1 / 3)
    assert repeated_share(["a b c"]) is None


def test_summarize():
    assert summarize(["one two", "one"], [4, 1], [True, False]) == {
        "answers": 2, "mean_tokens": 2.5, "mean_words": 1.5, "ended_share": 0.5, "distinct_1": pytest.approx(2 / 3),
        "distinct_2": 1.0, "repeated_4": None,
    }  # fmt: skip


def test_compare_scores():
    assert compare_scores([1, 2, 3, 4], [2, 2, 1, 9]) == {"win": 2, "tie": 1, "loss": 1}
