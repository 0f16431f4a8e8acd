"""Answers of a model before and after fine-tuning to the same prompts, side by side, with numbers and a report.

What it does
  * asks both models the same prompts in batches, with any of six decoding strategies, each model with its own
    tokenizer; an answer ends at the end token or at the next "Human:";
  * measures the answers (length, how they end, how varied they are), both perplexities where `--data_path` is given,
    and wins and losses where `--scorer_command` is given;
  * prints the answers one under the other and, with `--report`, writes a page to share;
  * with `--interactive`, talks.

One model is in memory at a time, but for a conversation with both. Everything that can be known to be wrong is said
before the first one is loaded.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from utils.data.prompt_dataset import PromptDataset
from utils.errors import UserError, join_problems
from utils.machine.device import set_random_seed
from utils.prompt_eval.answer_metrics import compare_scores, summarise
from utils.prompt_eval.answers import (
    STRATEGIES,
    Answers,
    Results,
    answer_batch,
    answer_prompts,
    check_length,
    decoding,
)
from utils.prompt_eval.arguments import build_parser, parse_args  # noqa: F401
from utils.prompt_eval.chat import Speaker, chat
from utils.prompt_eval.models import check_fit, chosen_device, evaluation_data, load, look_at, measure_perplexity
from utils.prompt_eval.prompts import PROMPTS  # noqa: F401
from utils.prompt_eval.report import write_report
from utils.prompt_eval.scorer import score_answers
from utils.prompt_eval.search import contrastive_search, diverse_beam_search

# What the terminal has always called the two models.
HEADINGS = {"baseline": "Baseline", "finetuned": "finetune"}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parse_args(argv)
    device = chosen_device(args.device)
    if args.interactive:
        talk(args, device)
        return
    data = check_sides(args)
    results = {name: ask_side(args, name, path, data[name], device) for name, path in sides(args).items()}
    show(args.prompts, results, args.strategies)
    figures, problem = measure(args, results)
    print_figures(figures, results)
    if args.report:
        print(f"Report: {write_report(args.report, args, results, figures)}")
    if problem:
        raise problem


def sides(args: argparse.Namespace) -> dict[str, str]:
    """name -> model, of those that were given."""
    both = {"baseline": args.model_name_or_path_baseline, "finetuned": args.model_name_or_path_finetune}
    return {name: path for name, path in both.items() if path}


def extra_token(args: argparse.Namespace) -> str | None:
    """The end token that training added, if it did."""
    return args.eot_token if args.add_eot_token else None


def check_sides(args: argparse.Namespace) -> dict[str, PromptDataset | None]:
    """What can be known to fail without a model is found here, all at once; returns each side's evaluation data."""
    problems, tokenizers = [], {}
    for name, path in sides(args).items():
        try:
            config, tokenizers[name] = look_at(path, extra_token(args))
        except UserError as err:
            problems.append(str(err))
            continue
        for number, ids in enumerate(tokenizers[name](args.prompts)["input_ids"], start=1):
            try:
                check_length(config, len(ids), args.max_new_tokens, f"{path}: prompt {number}")
            except UserError as err:
                problems.append(str(err))
    if problems:
        raise UserError(join_problems(list(dict.fromkeys(problems))))
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers.values()]
    if vocabularies[0] != vocabularies[1]:
        print(
            "Tokenizers: the two models have different ones; each answers with its own. Answer lengths in tokens and "
            "perplexities are per token of each and can't be compared: look at words"
        )
    return {name: evaluation_data(args, tokenizer) for name, tokenizer in tokenizers.items()}


def ask_side(args: argparse.Namespace, name: str, path: str, data: PromptDataset | None, device: str) -> Results:
    """Load one model, let it answer every prompt with every strategy, measure its perplexity, and let it go."""
    model, tokenizer = load(path, device, args.dtype, extra_token(args))
    print(f"{HEADINGS[name]}: {path} on {device} in {model.dtype}", flush=True)
    answers = ask(args, model, tokenizer, name)
    # Last: measuring changes the model's forward.
    results = Results(answers, measure_perplexity(model, tokenizer, data) if data is not None and len(data) else None)
    if data is not None and not len(data):
        print("no evaluation data: no perplexity")
    del model
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    return results


def ask(args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> Answers:
    """Every strategy's answers of one model. Each begins with the same seed, so that none depends on the others."""
    answers = {}
    total = len(args.prompts) * len(args.strategies)
    with logging.tqdm(total=total, desc=HEADINGS[name], unit="prompt", file=sys.stderr) as bar:
        for strategy in args.strategies:
            set_random_seed(args.seed)
            settings = decoding(strategy, args)
            answers[strategy] = answer_prompts(model, tokenizer, args.prompts, settings, args.batch_size, bar.update)
    return answers


def prompt_eval(
    args: argparse.Namespace,
    model_baseline: PreTrainedModel,
    model_fintuned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device | str,
    prompts: Sequence[str],
    tokenizer_fintuned: PreTrainedTokenizerBase | None = None,
) -> None:
    """Prints the answers of two loaded models; `tokenizer` is the baseline's, and both models' if alone."""
    asked = argparse.Namespace(**{**vars(args), "prompts": list(prompts)})
    models = {
        "baseline": (model_baseline.to(device), tokenizer),
        "finetuned": (model_fintuned.to(device), tokenizer if tokenizer_fintuned is None else tokenizer_fintuned),
    }
    results = {name: Results(ask(asked, model, own, name)) for name, (model, own) in models.items()}
    show(asked.prompts, results, args.strategies)


def show(prompts: Sequence[str], results: dict[str, Results], strategies: Sequence[str]) -> None:
    """Prints both models' answers to each prompt, one under the other."""
    for number in range(len(prompts)):
        for strategy in strategies:
            for name, result in results.items():
                print(f"=========={HEADINGS[name]}: {STRATEGIES[strategy]}=========")
                print_utils([answer.prompt + answer.text for answer in result.answers[strategy][number]])
        print("====================prompt end=============================\n\n", flush=True)


def print_utils(gen_output: Sequence[str]) -> None:
    """Prints the answers, each between empty lines."""
    for text in gen_output:
        print(f"\n{text}\n")


def measure(
    args: argparse.Namespace, results: dict[str, Results]
) -> tuple[dict[str, dict[str, Any]], UserError | None]:
    """Per strategy: each model's figures, both models' scores, and wins; and what went wrong with the scorer.

    A scorer that fails costs its own figures only, not the answers.
    """
    figures: dict[str, dict[str, Any]] = {}
    flat = {
        (strategy, name): [answer for several in result.answers[strategy] for answer in several]
        for strategy in args.strategies
        for name, result in results.items()
    }
    for (strategy, name), answers in flat.items():
        texts, tokens, ended = zip(*((answer.text, answer.tokens, answer.ended) for answer in answers), strict=True)
        figures.setdefault(strategy, {})[name] = summarise(texts, tokens, ended)
    if args.scorer_command is None:
        return figures, None
    try:
        pairs = [(answer.prompt, answer.text.strip()) for answers in flat.values() for answer in answers]
        scores = iter(score_answers(args.scorer_command, pairs))
    except UserError as err:
        return figures, err
    for (strategy, name), answers in flat.items():
        figures[strategy].setdefault("scores", {})[name] = [next(scores) for _ in answers]
    for of_strategy in figures.values():
        of_strategy["wins"] = compare_scores(*of_strategy["scores"].values())
    return figures, None


def print_figures(figures: dict[str, dict[str, Any]], results: dict[str, Results]) -> None:
    """The numbers beside the texts, one line per strategy and model."""
    for strategy, of_strategy in figures.items():
        for name in results:
            values = ", ".join(
                f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {'none' if value is None else value}"
                for key, value in of_strategy[name].items()
            )
            print(f"{STRATEGIES[strategy]}, {HEADINGS[name]}: {values}")
        if "wins" in of_strategy:
            wins = of_strategy["wins"]
            print(f"{STRATEGIES[strategy]}: finetune wins {wins['win']}, ties {wins['tie']}, loses {wins['loss']}")
    for name, result in results.items():
        if result.perplexity:
            print(f"{HEADINGS[name]}: ppl: {result.perplexity[0]}, loss: {result.perplexity[1]}")


def talk(args: argparse.Namespace, device: str) -> None:
    """A conversation with the models that were given."""
    check_fit(list(sides(args).values()), device, args.dtype)
    loaded = {name: load(path, device, args.dtype, extra_token(args)) for name, path in sides(args).items()}
    chat([Speaker(HEADINGS[name], *pair) for name, pair in loaded.items()], args)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Any,
    num_beams: int = 1,
    num_beam_groups: int = 1,
    do_sample: bool = False,
    num_return_sequences: int = 1,
    max_new_tokens: int = 100,
    diversity_penalty: float = 0.5,
) -> list[str]:
    """Prompt and answer, without special tokens, for every row of `inputs` (what `tokenizer` returned)."""
    if num_return_sequences > 1 and num_beams == 1 and not do_sample:
        raise UserError(f"greedy decoding has one answer, not num_return_sequences={num_return_sequences}")
    settings: dict[str, Any] = {"num_beams": num_beams, "num_return_sequences": num_return_sequences}
    if do_sample:
        settings |= {"do_sample": True, "top_k": 0}
    if num_beam_groups > 1:
        settings |= {"num_beam_groups": num_beam_groups, "diversity_penalty": diversity_penalty}
        settings["custom_generate"] = diverse_beam_search
    answers = answer_batch(model, tokenizer, inputs, max_new_tokens=max_new_tokens, **settings)
    return [answer.prompt + answer.text for answer in answers]


def generate_constrastive_search(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Any,
    top_k: int = 4,
    penalty_alpha: float = 0.6,
    num_return_sequences: int = 1,
    max_new_tokens: int = 100,
) -> list[str]:
    """Like `generate`, with contrastive search."""
    if num_return_sequences > 1:
        raise UserError(f"contrastive search has one answer, not num_return_sequences={num_return_sequences}")
    answers = answer_batch(
        model, tokenizer, inputs, max_new_tokens=max_new_tokens, num_return_sequences=num_return_sequences,
        top_k=top_k, penalty_alpha=penalty_alpha, custom_generate=contrastive_search,
    )  # fmt: skip
    return [answer.prompt + answer.text for answer in answers]


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"prompt_eval.py: {error}", file=sys.stderr)
        sys.exit(2)
