"""Compare two models: a model before and after fine-tuning answers the same prompts, side by side.

What it does
  * asks both models the same prompts in batches, by any of six decoding strategies, each model with its own
    tokenizer; an answer ends at the end token or at the next "Human:" (`--no-stop_at_human`: at the end token alone);
  * measures the answers (length, how they end, how varied they are), both perplexities with `--data_path`, how near
    they are to the data's own with `--references`, and wins and losses with `--scorer_command`;
  * prints the answers one below the other, and with `--report` writes a page to share;
  * with `--interactive`, holds a conversation in the terminal instead.

One model is in memory at a time, except in a conversation with both. What can be found wrong without a model is
reported before the first one is loaded.
"""

if __name__ == "__main__":
    from utils.prompt_eval.early import answer_early

    answer_early()  # what needs none of the libraries below, whose import takes seconds

import gc
import os
import sys
from argparse import Namespace
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.data.prompt_dataset import PromptDataset
from utils.distributed.failures import (
    EXIT_BY_SIGINT,
    EXIT_BY_SIGPIPE,
    EXIT_CRASH,
    EXIT_USER_ERROR,
    as_user_error,
    describe_failure,
    keep_traceback,
)
from utils.logging.console import begin, print_any_text
from utils.machine.interrupts import raise_at_interrupt
from utils.machine.streams import open_closed_streams
from utils.module.remote_code import trust_remote_code
from utils.prompt_eval.answers import Results, generate, generate_constrastive_search
from utils.prompt_eval.arguments import parse_args, with_defaults
from utils.prompt_eval.chat import Speaker, chat
from utils.prompt_eval.comparison import ask, check_checkpoints, measure
from utils.prompt_eval.config import HEADINGS, EvalConfig
from utils.prompt_eval.models import check_fit, chosen_device, evaluation_data, load, measure_perplexity
from utils.prompt_eval.prompts import PROMPTS
from utils.prompt_eval.references import with_references
from utils.prompt_eval.report import write_report
from utils.prompt_eval.same_texts import describe_samples, describe_training
from utils.prompt_eval.show import print_utils, show_answers, show_figures

__all__ = [
    "PROMPTS", "generate", "generate_constrastive_search", "main", "parse_args", "print_utils", "prompt_eval",
]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Compare the two models that the command line names, or talk to them."""
    args = parse_args(argv)
    trust_remote_code(args.trust_remote_code)
    config = with_references(EvalConfig.resolve(args))
    device = chosen_device(args.device)
    print(f"Settings: {', '.join(config.settings)}")
    if args.interactive:
        talk(config, device)
        return

    begin("checking the checkpoints")
    tokenizers = check_checkpoints(config)
    baseline = tokenizers["baseline"]
    begin("preparing the evaluation data")
    data = {
        name: evaluation_data(config, tokenizer, config.models[name], baseline)
        for name, tokenizer in tokenizers.items()
    }
    ends = {name: tokenizer.eos_token for name, tokenizer in tokenizers.items()}
    if line := describe_samples(data, ends):
        print("\n".join(filter(None, [line, describe_training(config.models["finetuned"], args)])))
    results = {name: ask_checkpoint(config, name, data[name], device) for name in config.models}
    begin("measuring and showing the answers")
    show_answers(config, results)
    figures, scorer_error = measure(config, results)
    show_figures(figures, results)
    if args.report:
        print(f"Report: {write_report(args.report, config, results, figures)}")
    if scorer_error:
        raise scorer_error


def ask_checkpoint(config: EvalConfig, name: str, data: PromptDataset | None, device: str) -> Results:
    """Load one model and return its answers and, given evaluation data, its perplexity; then free its memory."""
    path = config.models[name]
    begin(f"loading {path}")
    model, tokenizer = load(path, device, config.args.dtype, config.extra_token)
    print(f"{HEADINGS[name]}: {path} on {device} in {model.dtype}", flush=True)
    begin(f"asking {path}")
    answers, evaluation = ask(config, model, tokenizer, name), None
    if data is not None and len(data):
        evaluation = measure_perplexity(model, tokenizer, data)  # last: it changes the model's forward
    elif data is not None:
        print("no evaluation data: no perplexity")
    del model
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    return Results(answers, evaluation)


def talk(config: EvalConfig, device: str) -> None:
    """Hold a conversation with the models that were given, all in memory at once."""
    begin("loading the models")
    check_fit(list(config.models.values()), device, config.args.dtype)
    speakers = [
        Speaker(HEADINGS[name], *load(path, device, config.args.dtype, config.extra_token))
        for name, path in config.models.items()
    ]
    begin("talking")
    chat(speakers, config)


def prompt_eval(
    args: Namespace,
    model_baseline: PreTrainedModel,
    model_fintuned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device | str,
    prompts: Sequence[str],
    tokenizer_fintuned: PreTrainedTokenizerBase | None = None,
) -> None:
    """Print the answers of two loaded models to `prompts`.

    Args:
        args: of `parse_args`, or the original's; what these lack has its default.
        tokenizer: the baseline's, and both models' where `tokenizer_fintuned` is None.
    """
    config = EvalConfig.resolve(with_defaults(args), prompts)
    models = {
        "baseline": (model_baseline.to(device), tokenizer),
        "finetuned": (model_fintuned.to(device), tokenizer if tokenizer_fintuned is None else tokenizer_fintuned),
    }
    results = {name: Results(ask(config, model, own, name)) for name, (model, own) in models.items()}
    show_answers(config, results)


def run(argv: Sequence[str] | None = None) -> None:
    """Run `main`; an error ends it with one message on stderr: status 2 for a user's mistake, 130 for Ctrl-C."""
    open_closed_streams()
    print_any_text()
    try:
        main(argv)
    except KeyboardInterrupt:
        print("\nprompt_eval.py: stopped", file=sys.stderr)
        sys.exit(EXIT_BY_SIGINT)
    except BrokenPipeError:  # whoever read the answers, `head` say, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BY_SIGPIPE)
    except Exception as error:
        known = as_user_error(error)
        where = "" if known else f" ({keep_traceback(error)})"
        print(f"prompt_eval.py: {describe_failure(error)}{where}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR if known else EXIT_CRASH)


if __name__ == "__main__":
    raise_at_interrupt()
    run()
