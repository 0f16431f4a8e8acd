"""The command line of prompt_eval.py: its arguments, their help, and the checks of their values."""

import argparse
import os
import shlex
import shutil
from collections.abc import Sequence

from utils.data.formats.roles import parse_columns
from utils.errors import UserError, join_problems
from utils.notation import check_evaluation_source, is_date, parse_data_split
from utils.prompt_eval.config import (
    BEAM_STRATEGIES,
    CHAT,
    ONE_ANSWER,
    STRATEGIES,
    USUAL_BEAMS,
    WRITTEN,
    choose_beams,
    given_prompts,
    split_strategies,
)
from utils.prompt_eval.prompts import PROMPTS
from utils.shared_flags import add_shared

UNUSED_IN_TALK = ("prompt", "prompt_file", "data_path", "sft_only_data_path", "eval_data_path", "scorer_command")


# An argument per two or three lines is easier to read than a word per line.
# fmt: off
def build_parser() -> argparse.ArgumentParser:
    """Return the parser of prompt_eval.py's arguments."""
    parser = argparse.ArgumentParser(
        description="Compare the answers of a model before and after fine-tuning to the same prompts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    _add_model_arguments(parser)
    _add_prompt_arguments(parser)
    _add_decoding_arguments(parser)
    _add_measure_arguments(parser)
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("models").add_argument
    add("--model_name_or_path_baseline", metavar="NAME",
        help="model before fine-tuning, a hub name or a folder; required, but --interactive needs only one of the two")
    add("--model_name_or_path_finetune", metavar="NAME",
        help="fine-tuned model, a folder (a run's --output_dir) or a hub name; required, but --interactive needs only "
        "one of the two")
    add_shared(add, "trust_remote_code")
    add_shared(add, "dtype",
        help="precision of the loaded models; auto keeps each checkpoint's own, but takes fp32 on a CPU, where half "
        "precision is slow and rounds differently")
    add("--device", default=None, metavar="NAME",
        help="device to run on: cpu, cuda, cuda:1, ...; by default this machine's accelerator")


def _add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("prompts").add_argument
    add("--language", choices=list(PROMPTS), default="English",
        help="language of the six built-in prompts; English as in the original")
    add("--prompt", action="append", metavar="TEXT",
        help="ask this prompt, exactly as written; may be repeated; without it and --prompt_file the built-in prompts "
        "are asked")
    add("--prompt_file", default=None, metavar="FILE",
        help='ask the prompts of this file: the lines of a .txt, or the "prompt" of every object in a .json or .jsonl; '
        "none by default")
    add("--prompt_form", choices=[WRITTEN, CHAT], default=WRITTEN,
        help="how prompts are asked: written, letter by letter; chat, as questions in each model's own chat template, "
        "or in the Human/Assistant form where it has none; written, as in the original")
    add("--interactive", action="store_true",
        help="talk to one or both models in the terminal instead of comparing them; off, because a script has to end "
        "by itself")


def _add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("decoding").add_argument
    add("--strategies", default="greedy", metavar="A,B,...",
        help=f"decode with these strategies: any of {', '.join(STRATEGIES)}, or all; greedy as in the original, which "
        "gives the same answer every time")
    add("--max_new_tokens", type=int, default=100, metavar="N",
        help="maximum number of tokens in an answer; 100 are a few sentences")
    add("--num_return_sequences", type=int, default=1, metavar="N",
        help="answers per prompt; 1, because greedy and contrastive have no second one")
    add("--num_beams", type=int, default=1, metavar="N",
        help=f"number of beams; if left at 1, the original's default, strategies that need beams use {USUAL_BEAMS}")
    add("--num_beam_groups", type=int, default=1, metavar="N",
        help="groups of beams in diverse beam search; if left at 1, the original's default, every beam is its own "
        "group")
    add("--diversity_penalty", type=float, default=0.5, metavar="P",
        help="log-probability that a token loses for every beam of an earlier group that chose it; at 0 all groups "
        "give the same answers")
    add("--top_k", type=int, default=4, metavar="K",
        help="candidates per token in contrastive search; 4 as in the original (for sampling: --sampling_top_k)")
    add("--penalty_alpha", type=float, default=0.6, metavar="A",
        help="weight of contrastive search's penalty for repetition; 0.6 as in the paper and the original")
    add("--temperature", type=float, default=1.0, metavar="T",
        help="temperature of sampling: below 1 prefers likely tokens; 1 samples the model's own distribution")
    add("--sampling_top_k", type=int, default=50, metavar="K",
        help="sample from so many likeliest tokens, 0: from all of them; 50 as in the original, whose sampling has "
        "transformers' default")
    add("--top_p", type=float, default=1.0, metavar="P",
        help="sample from the likeliest tokens whose probabilities add up to this; 1 excludes none")
    add("--repetition_penalty", type=float, default=1.0, metavar="P",
        help="above 1, make tokens of the prompt and of the answer so far less likely, in every strategy; 1 leaves "
        "the model's probabilities unchanged")
    add_shared(add, "seed",
        help="seed of sampling, and of the data split as in training; 1234 is training's default")
    add("--stop_at_human", action=argparse.BooleanOptionalAction, default=True,
        help='end an answer at the next "Human:"; on, because what a model writes there is its own question; '
        "--no-stop_at_human shows it, as the original does")
    add("--batch_size", type=int, default=24, metavar="N",
        help="prompts answered at once, which changes no greedy answer; 24 at once are 3 to 6 times as fast on a CPU "
        "as one by one")


def _add_measure_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("measures and report").add_argument
    add("--report", default=None, metavar="DIR",
        help="write report.html, report.md and results.jsonl to this folder; none by default, because the terminal "
        "shows the answers")
    add("--scorer_command", default=None, metavar="COMMAND",
        help='score the answers with this command, which reads one JSON line {"prompt": ..., "answer": ...} per answer '
        "and prints one number for each, higher is better; by default answers are not scored")
    add("--references", type=int, nargs="?", const=100, default=None, metavar="N",
        help="ask the first N prompts of the evaluation part of --data_path (100 without N) and compare the answers "
        "with the data's own: exact match, ROUGE-L, last number; None asks other prompts, which have no such answers")
    add("--data_path", nargs="*", default=[], metavar="NAME",
        help="measure both models' perplexity on the evaluation part of these data sets, named as in training; none "
        "by default")
    add_shared(add, "sft_only_data_path",
        help="data sets used whole, beside --data_path, as in training; none, as there")
    add_shared(add, "eval_data_path",
        help="data sets to measure on, whole, in place of the evaluation part of the others, as in training; none, as "
        "there")
    add_shared(add, "data_split",
        help="shares of the three phases, as in training, so that the evaluation part is the same; None, as there")
    add_shared(add, "columns",
        help="names of the columns of your own data, as in training; None, as there")
    add_shared(add, "chat_template",
        help="how your own data become text, as in training: auto takes the baseline's chat template for both models, "
        "since training took that")
    add_shared(add, "template_date",
        help="the date that a chat template writes; None takes that of the fine-tuned model's training, else today")
    add_shared(add, "train_turns",
        help="which answers --completion_only_loss measures, as in training; all, as there")
    add_shared(add, "data_output_path",
        help="cache folder of split indexes and tokenized data; training's default, so that its data are found there")
    add_shared(add, "max_seq_len",
        help="maximum tokens per sample, as in training, so that the perplexity is comparable")
    add_shared(add, "overlong",
        help="what becomes of samples longer than --max_seq_len, as in training; truncate, as there")
    add_shared(add, "add_eot_token",
        help="add --eot_token to the tokenizer and end every sample with it, as in training with this flag; off as in "
        "training")
    add_shared(add, "eot_token",
        help="end token that --add_eot_token adds, as in training; the default is GPT models' end token")
    add_shared(add, "completion_only_loss",
        help="measure the perplexity of the responses alone, as in training with this flag; off as in training")
# fmt: on


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line; returns the arguments as typed.

    Raises:
        UserError: everything that is wrong with them, in one message.
    """
    args = build_parser().parse_args(argv)
    problems = _wrong_models(args) + _wrong_values(args) + _wrong_strategies(args) + _wrong_prompts(args)
    if problems:
        raise UserError(join_problems(problems))
    return args


def with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """Return a copy of `args` in which every missing argument has its default.

    Callers of the original's `prompt_eval` pass a Namespace with the original's arguments only.
    """
    return argparse.Namespace(**{**vars(build_parser().parse_args([])), **vars(args)})


def _wrong_models(args: argparse.Namespace) -> list[str]:
    """Return what is wrong with the choice of models."""
    given = {name: getattr(args, name) for name in ("model_name_or_path_baseline", "model_name_or_path_finetune")}
    missing = [f"--{name} is missing" for name, value in given.items() if not value]
    if args.interactive:
        missing = ["--interactive: give a model to talk to"] if len(missing) == len(given) else []
        if args.report:
            missing.append("--report: a conversation has no report; leave out --interactive or --report")
        unused = [f"--{name}" for name in UNUSED_IN_TALK if getattr(args, name)]
        if unused:
            missing.append(f"--interactive asks what you type and measures nothing: leave out {', '.join(unused)}")
    return missing


def _wrong_values(args: argparse.Namespace) -> list[str]:
    """Return what is wrong with single values, whatever the other arguments are."""
    problems = []
    at_least_one = ("max_new_tokens", "num_return_sequences", "num_beams", "num_beam_groups", "top_k", "batch_size")
    for name in at_least_one:
        if getattr(args, name) < 1:
            problems.append(f"--{name} {getattr(args, name)}: at least 1 is needed")
    if args.max_seq_len < 2:
        problems.append(f"--max_seq_len {args.max_seq_len}: at least 2 is needed")
    for name, low, high in (("penalty_alpha", 0, 1), ("top_p", 0, 1), ("seed", 0, 2**32 - 1)):
        if not low <= getattr(args, name) <= high or (name == "top_p" and args.top_p == 0):
            problems.append(f"--{name} {getattr(args, name)}: it must lie between {low} and {high}")
    for name in ("temperature", "repetition_penalty"):
        if not 0 < getattr(args, name) < float("inf"):
            problems.append(f"--{name} {getattr(args, name)}: it must be above 0")
    if args.sampling_top_k < 0:
        problems.append(f"--sampling_top_k {args.sampling_top_k}: at least 0 is needed; 0 draws from all tokens")
    if not 0 <= args.diversity_penalty < float("inf"):
        problems.append(f"--diversity_penalty {args.diversity_penalty}: it must be at least 0")
    if args.scorer_command is not None:
        problems += _wrong_command(args.scorer_command)
    if args.report and os.path.exists(args.report) and not os.path.isdir(args.report):
        problems.append(f"--report {args.report}: that is a file, not a folder")
    if args.template_date is not None and not is_date(args.template_date):
        problems.append(f"--template_date {args.template_date}: write a date as YYYY-MM-DD")
    if args.train_turns != "all" and not args.completion_only_loss:
        problems.append("--train_turns says what --completion_only_loss measures: give that flag too")
    checks = [(parse_data_split, args.data_split)] if args.data_split is not None else []
    checks += [(parse_columns, args.columns)]
    checks += [(check_evaluation_source, name) for name in args.eval_data_path]
    for check, value in checks:
        try:
            check(value)
        except UserError as err:
            problems.append(str(err))
    return problems


def _wrong_command(command: str) -> list[str]:
    """Return what is wrong with `--scorer_command`, without running it."""
    try:
        words = shlex.split(command)
    except ValueError as err:
        return [f"--scorer_command {command}: {err}"]
    if not words or shutil.which(words[0]) is None:
        return [f"--scorer_command {command!r}: there is no program {words[0] if words else ''!r} to run"]
    return []


def _wrong_strategies(args: argparse.Namespace) -> list[str]:
    """Return what is wrong with the strategies and with the numbers of beams and answers they are given."""
    names = split_strategies(args.strategies)
    problems = []
    unknown = [name for name in names if name not in STRATEGIES]
    if unknown:
        listed = ", ".join(map(repr, unknown))
        problems.append(f"--strategies {args.strategies}: {listed} is none of {', '.join(STRATEGIES)}, all")
    beams, groups = choose_beams(args, names)
    if "diverse_beam" in names and groups > 0 and beams % groups:
        problems.append(f"--num_beams {beams}: no multiple of --num_beam_groups {groups}")
    answers = args.num_return_sequences
    if answers > beams and set(names) & set(BEAM_STRATEGIES):
        problems.append(f"--num_return_sequences {answers}: {beams} beams give at most {beams} answers")
    one_answer = [name for name in names if name in ONE_ANSWER]
    if answers > 1 and one_answer:
        problems.append(
            f"--num_return_sequences {answers}: {' and '.join(one_answer)} decoding has one answer per prompt; leave "
            "it at 1, or name other --strategies"
        )
    return problems


def _wrong_prompts(args: argparse.Namespace) -> list[str]:
    """Return what is wrong with the prompts of the command line and of the file."""
    problems = _wrong_references(args)
    if any(not prompt.strip() for prompt in args.prompt or []):
        problems.append("--prompt: an empty prompt cannot be answered")
    try:
        given_prompts(args)
    except UserError as err:
        problems.append(str(err))
    return problems


def _wrong_references(args: argparse.Namespace) -> list[str]:
    """Return what keeps `--references` from taking its prompts from the data."""
    if args.references is None:
        return []
    problems = [f"--references {args.references}: at least 1 is needed"] * (args.references < 1)
    if not (args.data_path or args.sft_only_data_path or args.eval_data_path):
        problems.append("--references needs --data_path: its prompts and answers are those of the evaluation data")
    others = [f"--{name}" for name in ("prompt", "prompt_file", "interactive") if getattr(args, name)]
    others += ["--prompt_form chat"] * (args.prompt_form == CHAT)
    if others:
        problems.append(f"--references asks the data's prompts in training's form: leave {' and '.join(others)} out")
    return problems
