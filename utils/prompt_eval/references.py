"""`--references`: prompts of the evaluation data, and how near the answers are to the data's own."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from importlib.util import find_spec
from typing import NamedTuple

from utils.data.formats.base import PromptRawDataset
from utils.data.formats.column_text import Sample
from utils.data.formats.custom import OwnFormatDataset
from utils.data.mixture import TRAINING
from utils.data.open_sets import open_sets
from utils.data.prepare import chosen_rows
from utils.errors import UserError
from utils.model.config_values import max_positions
from utils.prompt_eval.answer_metrics import Figures, words
from utils.prompt_eval.answers import Results
from utils.prompt_eval.config import EvalConfig
from utils.prompt_eval.models import data_options, load_config_and_tokenizer

SCORES = ("exact_match", "rouge_l", "last_number")
MISSING = "--references: the package rouge-score is not installed: pip install -r requirements-eval.txt"
# A minus belongs to a number only where no number or word stands before it: 5-3 ends in 3.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?\d[\d,]*(?:\.\d+)?")


class Reference(NamedTuple):
    """One row of the evaluation data."""

    prompt: str
    answer: str
    adds_special: bool  # whether the tokenizer adds its special tokens to the prompt


def with_references(config: EvalConfig) -> EvalConfig:
    """Return the comparison with the prompts and answers of the evaluation data; unchanged without `--references`.

    Prints how many rows are used, and how many were left out.

    Raises:
        UserError: rouge-score is not installed, the data are bad, or no row has a prompt and an answer.
    """
    if config.args.references is None:
        return config
    if find_spec("rouge_score") is None:
        raise UserError(MISSING)
    found, skipped, long = _draw(config, config.args.references)
    notes = [f"{skipped} rows without a prompt or an answer left out"] * (skipped > 0)
    notes += [f"{long} rows left out whose prompt is too long for --max_seq_len or the model"] * (long > 0)
    line = "; ".join([f"References: the answers of {len(found)} evaluation rows", *notes])
    if not found:
        raise UserError(f"--{line}: there is nothing to compare with; whole texts and token ids have no answers")
    print(line)
    prompts, answers, adds = zip(*found, strict=True)
    return replace(config, prompts=prompts, references=answers, adds_special=adds)


def _draw(config: EvalConfig, wanted: int) -> tuple[list[Reference], int, int]:
    """Return the first rows of each data set, as many of each; and how many had no answer, or too long a prompt."""
    args = config.args
    model, tokenizer = load_config_and_tokenizer(args.model_name_or_path_baseline, config.extra_token)
    room = min(args.max_seq_len, (max_positions(model) or args.max_seq_len + args.max_new_tokens) - args.max_new_tokens)
    own, sources, preparation = data_options(config, tokenizer)
    opened = [one for one in open_sets(sources, preparation, own) if one.use != TRAINING]
    found: list[Reference] = []
    skipped, long = 0, 0
    for place, one in enumerate(opened):
        rows = one.raw.get_eval_data()
        end = len(found) + -(-(wanted - len(found)) // (len(opened) - place))  # what a small set lacks, the next give
        for reference in _references(one.raw, rows.select(chosen_rows(one, "eval", len(rows), preparation))):
            if len(found) == end:
                break
            if reference is None:
                skipped += 1
            elif len(tokenizer(reference.prompt, add_special_tokens=reference.adds_special)["input_ids"]) > room:
                long += 1
            else:
                found.append(reference)
    return found, skipped, long


def _references(raw: PromptRawDataset, rows: Iterator[Sample]) -> Iterator[Reference | None]:
    """Yield prompt and answer of each row; None for a row that has no prompt, or no answer in words."""
    for row in rows:
        if isinstance(raw, OwnFormatDataset):
            prompt, answer, adds = raw.get_prompt(row), raw.reference(row), raw.adds_special(row)
        else:
            prompt, answer, adds = raw.get_prompt(row), raw.get_chosen(row), raw.add_special_tokens
        has_both = prompt and prompt.strip() and answer and answer.strip()
        yield Reference(prompt, answer.strip(), adds) if has_both else None


# -------------------------------------------------------------------------------------------- scores


class Units:
    """The tokenizer of rouge-score's: words in lower case, and each Chinese or Japanese character.

    rouge-score's own keeps a to z and 0 to 9 alone, so that every other script would score 0.
    """

    def tokenize(self, text: str) -> list[str]:
        """Return the units of a text."""
        return words(unicodedata.normalize("NFKC", text))


def exact_match(answer: str, reference: str) -> float:
    """Return 1 where both texts are the same but for white space, else 0."""
    return float(answer.split() == reference.split())


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text, as GSM8K's answers are compared; None where there is none."""
    found = _NUMBER.findall(unicodedata.normalize("NFKC", text))
    return Decimal(found[-1].replace(",", "")) if found else None


def scores_of(answers: Sequence[str], references: Sequence[str]) -> list[dict[str, float | None]]:
    """Return the scores of each answer: 0 to 1, `last_number` None where the reference has no number."""
    from rouge_score.rouge_scorer import RougeScorer  # optional, and slow to import

    scorer = RougeScorer(["rougeL"], tokenizer=Units())
    scores = []
    for answer, reference in zip(answers, references, strict=True):
        wanted = last_number(reference)
        values = (
            exact_match(answer, reference),
            scorer.score(reference, answer)["rougeL"].fmeasure,
            None if wanted is None else float(last_number(answer) == wanted),
        )
        scores.append(dict(zip(SCORES, values, strict=True)))
    return scores


def add_scores(config: EvalConfig, results: dict[str, Results], figures: Figures) -> None:
    """Add each model's mean scores to its figures, and those of every answer under `reference_scores`."""
    if not config.references:
        return
    for strategy, of_strategy in figures.items():
        of_each = of_strategy["reference_scores"] = {}
        for name, result in results.items():
            pairs = [
                (answer.text.strip(), reference)
                for answers, reference in zip(result.answers[strategy], config.references, strict=True)
                for answer in answers
            ]
            of_each[name] = scores_of(*zip(*pairs, strict=True))
            of_strategy[name] |= {key: _mean([one[key] for one in of_each[name]]) for key in SCORES}


def _mean(values: Sequence[float | None]) -> float | None:
    counted = [value for value in values if value is not None]
    return sum(counted) / len(counted) if counted else None
