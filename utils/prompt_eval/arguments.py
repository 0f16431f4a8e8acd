"""The command line of prompt_eval.py: every argument with its help, its checks, and the decisions made from it."""

import argparse
import os
import shlex
import shutil
from collections.abc import Sequence

from utils.data.cache import default_cache_folder
from utils.data.splits import parse_data_split
from utils.errors import UserError, join_problems
from utils.prompt_eval.answers import ONE_ANSWER, STRATEGIES
from utils.prompt_eval.prompts import PROMPTS, read_prompt_file

USUAL_BEAMS = 4
BEAM_STRATEGIES = ("beam", "beam_multinomial", "diverse_beam")


# One argument per two or three lines reads better than one word per line.
# fmt: off
def build_parser() -> argparse.ArgumentParser:
    """The parser of prompt_eval.py."""
    parser = argparse.ArgumentParser(
        description="Answers of a model before and after fine-tuning to the same prompts.",
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
        help="hub name or folder of the model before fine-tuning; required, but with --interactive one model will do")
    add("--model_name_or_path_finetune", metavar="NAME",
        help="folder of the fine-tuned model (its --output_dir); required, but with --interactive one model will do")
    add("--dtype", choices=["auto", "bf16", "fp16", "fp32"], default="auto",
        help="auto: as each checkpoint is stored, on a CPU fp32, where half precision is slow and rounds differently")
    add("--device", default=None, metavar="NAME",
        help="cpu, cuda, cuda:1, ...; by default the accelerator this machine has")


def _add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("prompts").add_argument
    add("--language", choices=list(PROMPTS), default="English",
        help="language of the six built-in prompts; English as in the original")
    add("--prompt", action="append", metavar="TEXT",
        help="a prompt in place of the built-in ones, as the model shall see it; may be given several times")
    add("--prompt_file", default=None, metavar="FILE",
        help=".txt with a prompt a line, or .json or .jsonl with objects that hold a prompt; none by default")
    add("--interactive", action="store_true",
        help="talk to one or both models in the terminal; off, since scripts want an end")


def _add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("decoding").add_argument
    add("--strategies", default="greedy", metavar="A,B,...",
        help=f"any of {', '.join(STRATEGIES)}, or all; greedy, as in the original, is the same every time")
    add("--max_new_tokens", type=int, default=100, metavar="N",
        help="most tokens in an answer; 100 are a few sentences")
    add("--num_return_sequences", type=int, default=1, metavar="N",
        help="answers per prompt; greedy and contrastive have one")
    add("--num_beams", type=int, default=1, metavar="N",
        help=f"beams; at 1, the original's default, strategies that need beams take {USUAL_BEAMS}")
    add("--num_beam_groups", type=int, default=1, metavar="N",
        help="groups of diverse beam search; at 1, the original's default, every beam is a group of its own")
    add("--diversity_penalty", type=float, default=0.5, metavar="P",
        help="what a token loses for every beam of an earlier group that took it; at 0 all groups agree")
    add("--top_k", type=int, default=4, metavar="K",
        help="candidates of contrastive search; 4 as in the original, sampling draws from all tokens")
    add("--penalty_alpha", type=float, default=0.6, metavar="A",
        help="weight of contrastive search's penalty for repeating; 0.6 as in the paper and the original")
    add("--temperature", type=float, default=1.0, metavar="T",
        help="of sampling: below 1 prefers likely tokens; 1 samples the model's own distribution")
    add("--top_p", type=float, default=1.0, metavar="P",
        help="sample from the likeliest tokens that together have this probability; 1 leaves none out")
    add("--repetition_penalty", type=float, default=1.0, metavar="P",
        help="above 1 makes tokens that stood there less likely, in every strategy; 1 shows the model as it is")
    add("--seed", type=int, default=1234, metavar="N",
        help="of sampling, and of the data split as in training; 1234 as there")
    add("--batch_size", type=int, default=24, metavar="N",
        help="prompts answered at once; it changes no greedy answer, and 24 at once are 3 to 6 times as fast on a CPU")


def _add_measure_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("measures and report").add_argument
    add("--report", default=None, metavar="DIR",
        help="write report.html, report.md and results.jsonl there; none by default, the terminal shows the answers")
    add("--scorer_command", default=None, metavar="COMMAND",
        help='gets one JSON line {"prompt": ..., "answer": ...} per answer and prints one number for each, higher is '
        "better; without it nothing is won or lost")
    add("--data_path", nargs="*", default=[], metavar="NAME",
        help="data sets as in training, for the perplexity of both models on their evaluation part; none by default")
    add("--data_split", default="2,4,4", metavar="A,B,C", help="as in training, for the same evaluation part")
    add("--data_output_path", default=default_cache_folder(), metavar="DIR",
        help="cache of split indexes and tokenised data; the one of training, so that its data is found there")
    add("--max_seq_len", type=int, default=512, metavar="TOKENS", help="as in training, for the same figure")
    add("--add_eot_token", action="store_true", help="as in training, for the same figure; off as there")
    add("--eot_token", default="<|endoftext|>", metavar="TOKEN", help="as in training; the one GPT models use")
    add("--completion_only_loss", action="store_true",
        help="perplexity of the responses alone, as in training with this flag; off as there")
# fmt: on


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed arguments with `strategies` as a list and `prompts`; everything wrong with them is one `UserError`."""
    args = build_parser().parse_args(argv)
    problems = _wrong_models(args) + _wrong_values(args)
    args.strategies = _strategies(args.strategies, problems)
    _choose_beams(args, problems)
    one_answer = [name for name in args.strategies if name in ONE_ANSWER]
    if one_answer and args.num_return_sequences > 1:
        problems.append(
            f"--num_return_sequences {args.num_return_sequences}: {' and '.join(one_answer)} decoding has one answer "
            "per prompt; leave it at 1, or name other --strategies"
        )
    args.prompts = _prompts(args, problems)
    if problems:
        raise UserError(join_problems(problems))
    return args


def _wrong_models(args: argparse.Namespace) -> list[str]:
    given = {name: getattr(args, name) for name in ("model_name_or_path_baseline", "model_name_or_path_finetune")}
    missing = [f"--{name} is missing" for name, value in given.items() if not value]
    if args.interactive:
        missing = ["--interactive: give a model to talk to"] if len(missing) == len(given) else []
        if args.report:
            missing.append("--report: a conversation has none; leave --interactive or --report out")
    return missing


def _wrong_values(args: argparse.Namespace) -> list[str]:
    """What is wrong with the arguments' values, seen by themselves."""
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
    if not 0 <= args.diversity_penalty < float("inf"):
        problems.append(f"--diversity_penalty {args.diversity_penalty}: it must be at least 0")
    if args.scorer_command is not None:
        problems += _wrong_command(args.scorer_command)
    if args.report and os.path.exists(args.report) and not os.path.isdir(args.report):
        problems.append(f"--report {args.report}: that is a file, not a folder")
    try:
        parse_data_split(args.data_split)
    except UserError as err:
        problems.append(str(err))
    return problems


def _wrong_command(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as err:
        return [f"--scorer_command {command}: {err}"]
    if not words or shutil.which(words[0]) is None:
        return [f"--scorer_command {command!r}: there is no program {words[0] if words else ''!r} to run"]
    return []


def _strategies(text: str, problems: list[str]) -> list[str]:
    """The named strategies, each once, in the order given."""
    names = list(STRATEGIES) if text.strip() == "all" else [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in STRATEGIES]
    if unknown:
        problems.append(f"--strategies {text}: {', '.join(map(repr, unknown))} is none of {', '.join(STRATEGIES)}, all")
    return [name for name in dict.fromkeys(names) if name in STRATEGIES]


def _choose_beams(args: argparse.Namespace, problems: list[str]) -> None:
    """Beams and groups where they were left at 1 but a strategy needs them; says so."""
    beamy = [name for name in args.strategies if name in BEAM_STRATEGIES]
    if not beamy:
        unused = [f"--{name}" for name in ("num_beams", "num_beam_groups") if getattr(args, name) > 1]
        if unused:
            print(f"{' and '.join(unused)}: no strategy with beams is asked for, so it has no effect")
        return
    chosen = []
    if args.num_beams == 1:
        args.num_beams = max(USUAL_BEAMS, args.num_beam_groups, args.num_return_sequences)
        chosen.append(f"{args.num_beams} beams")
    if "diverse_beam" in beamy and args.num_beam_groups == 1:
        args.num_beam_groups = args.num_beams
        chosen.append(f"{args.num_beam_groups} groups of one beam for diverse_beam")
    if chosen:
        print(f"Beams: {', '.join(chosen)} (left at 1; --num_beams and --num_beam_groups set others)")
    if "diverse_beam" in beamy and args.num_beam_groups > 0 and args.num_beams % args.num_beam_groups:
        problems.append(f"--num_beams {args.num_beams}: no multiple of --num_beam_groups {args.num_beam_groups}")
    if args.num_return_sequences > args.num_beams:
        problems.append(
            f"--num_return_sequences {args.num_return_sequences}: {args.num_beams} beams have no more answers than that"
        )


def _prompts(args: argparse.Namespace, problems: list[str]) -> list[str]:
    """Those of the command line, then those of the file; the built-in ones where neither is given."""
    prompts = list(args.prompt or [])
    if any(not prompt.strip() for prompt in prompts):
        problems.append("--prompt: an empty prompt cannot be answered")
    if args.prompt_file:
        try:
            prompts += read_prompt_file(args.prompt_file)
        except UserError as err:
            problems.append(str(err))
    return prompts or PROMPTS[args.language]
