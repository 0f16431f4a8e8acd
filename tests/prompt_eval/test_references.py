"""`--references`: the data's own answers, the scores, and where they are shown."""

import json
from decimal import Decimal

import pytest
from conftest import make_tiny_opt
from fork_runs import finished_run
from transformers import AutoTokenizer

import prompt_eval
from utils.errors import UserError
from utils.prompt_eval import references
from utils.prompt_eval.arguments import parse_args
from utils.prompt_eval.references import exact_match, last_number, scores_of

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def longest_common(left: list[str], right: list[str]) -> int:
    """Length of the longest common subsequence, by its definition."""
    if not left or not right:
        return 0
    if left[0] == right[0]:
        return 1 + longest_common(left[1:], right[1:])
    return max(longest_common(left[1:], right), longest_common(left, right[1:]))


@pytest.mark.parametrize(
    ("answer", "reference", "units"),
    [
        ("The owl sees at night", "An owl sees well at night.", str.split),
        ("望远镜收集光", "望远镜可以收集很多光", list),
        ("", "An owl", str.split),
    ],
)
def test_rouge_l_is_that_of_the_longest_common_subsequence(answer, reference, units):
    said, wanted = (units(text.lower().strip(".")) for text in (answer, reference))
    common = longest_common(said, wanted)
    expected = 2 * common / (len(said) + len(wanted))
    assert scores_of([answer], [reference])[0]["rouge_l"] == pytest.approx(expected)
    if answer.isascii():  # rouge-score's own tokenizer gives the same for English, and nothing for Chinese
        from rouge_score.rouge_scorer import RougeScorer

        own = RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
        assert own == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 + 7 = 12 #### 12", "12"), ("It costs $1,234.50.", "1234.50"), ("from 5-3", "3"), ("It is -7.", "-7"),
        ("no number", None), ("答案是４２。", "42"), ("3 of 10", "10"),
    ],
)  # fmt: skip
def test_the_last_number(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_scores_count_what_they_can():
    assert scores_of(["12", "x"], ["the sum is 12.0", "none"]) == [
        {"exact_match": 0.0, "rouge_l": pytest.approx(0.333, abs=0.1), "last_number": 1.0},
        {"exact_match": 0.0, "rouge_l": 0.0, "last_number": None},
    ]
    assert exact_match(" two  words\n", "two words") == 1 and exact_match("Two words", "two words") == 0


@pytest.fixture(scope="module")
def learned(tmp_path_factory, cache_folder):
    """A model with a chat template, and one trained until it knows four answers by heart: (base, trained, data)."""
    folder = tmp_path_factory.mktemp("learned")
    base = make_tiny_opt(folder / "base", dropout=0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.save_pretrained(base)
    rows = {"sums": [("3 and 4?", "It is 7."), ("2 and 2?", "It is 4.")],
            "owls": [("What is an owl?", "A bird."), ("Why?", "Owls see at night.")]}  # fmt: skip
    for name, pairs in rows.items():
        (folder / name).mkdir()
        records = [{"prompt": prompt, "response": answer} for prompt, answer in pairs]
        for part in ("train", "eval"):
            (folder / name / f"{part}.jsonl").write_text("\n".join(map(json.dumps, records)))
    data = ["--data_path", folder / "sums", folder / "owls", "--data_output_path", cache_folder, "--max_seq_len", "64"]
    finished_run(
        [
            "--model_name_or_path", base, *data, "--dtype", "fp32", "--per_device_train_batch_size", "4",
            "--max_steps", "60", "--learning_rate", "1e-2", "--output_dir", folder / "out",
        ]
    )  # fmt: skip
    return base, folder / "out", [str(word) for word in data]


def test_answers_are_compared_with_the_data_s_own(learned, tmp_path, capsys):
    base, trained, data = learned
    models = ["--model_name_or_path_baseline", str(base), "--model_name_or_path_finetune", str(trained)]
    prompt_eval.main([*models, *data, "--references", "--max_new_tokens", "12", "--report", str(tmp_path / "report")])
    printed = capsys.readouterr().out
    assert "References: the answers of 4 evaluation rows" in printed
    assert "Greedy, finetune: " in printed and "exact_match 1, rouge_l 1, last_number 1" in printed
    assert "exact_match 0, rouge_l" in printed
    assert printed.count("finetune, on ") == 2 and "finetune: token accuracy: " in printed
    records = [json.loads(line) for line in (tmp_path / "report" / "results.jsonl").read_text().splitlines()]
    after = [record for record in records if record["model"] == "finetuned"]
    assert after[0]["prompt"] == "<user>3 and 4?<end><assistant>"
    assert [record["reference"] for record in after] == ["It is 7.", "It is 4.", "A bird.", "Owls see at night."]
    assert [record["last_number"] for record in after] == [1.0, 1.0, None, None]
    assert all(record["exact_match"] == 1 and record["rouge_l"] == 1 for record in after)
    html = (tmp_path / "report" / "report.html").read_text()
    text = (tmp_path / "report" / "report.md").read_text()
    assert "<b>reference</b> It is 7." in html and "100.0%" in html and "exact match" in html
    assert "**reference**" in text and "ROUGE-L (F1)" in text


def test_the_first_rows_of_each_set(learned, capsys):
    base, trained, data = learned
    models = ["--model_name_or_path_baseline", str(base), "--model_name_or_path_finetune", str(trained)]
    args = parse_args([*models, *data, "--references", "3"])
    config = references.with_references(prompt_eval.EvalConfig.resolve(args))
    assert config.references == ("It is 7.", "It is 4.", "A bird.") and config.adds_special == (False,) * 3
    args = parse_args([*models, *data[:-1], "8", "--references", "3"])
    with pytest.raises(UserError, match=r"4 rows left out whose prompt is too long.*nothing to compare"):
        references.with_references(prompt_eval.EvalConfig.resolve(args))


def test_what_can_not_be_asked(learned, monkeypatch):
    base, trained, data = learned
    models = ["--model_name_or_path_baseline", str(base), "--model_name_or_path_finetune", str(trained)]
    with pytest.raises(UserError, match="--references needs --data_path"):
        parse_args([*models, "--references"])
    with pytest.raises(UserError, match="leave --prompt and --prompt_form chat out"):
        parse_args([*models, *data, "--references", "2", "--prompt", "x", "--prompt_form", "chat"])
    monkeypatch.setattr(references, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="rouge-score is not installed: pip install"):
        prompt_eval.main([*models, *data, "--references"])
