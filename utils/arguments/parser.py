"""The command line of main.py: its parser, and what --like and --config add to it; the flags are in `flags.py`."""

import argparse
import sys

from utils.arguments.flags import GROUPS
from utils.arguments.replay import merged_words
from utils.distributed.launchers import launched_rank
from utils.logging.console import say


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of main.py."""
    parser = argparse.ArgumentParser(
        description="Supervised fine-tuning of a causal language model with DeepSpeed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    for add_group in GROUPS:
        add_group(parser)
    return parser


def _typed(words: list[str]) -> list[str]:
    """Return the names of the arguments that stand in `words`, with their default or not."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return sorted(vars(parser.parse_args(words)).keys() - {"config", "like"})  # whose arguments stand in `words` too


def parse_args(
    argv: list[str] | None = None, description: str | None = None, announce: bool = True
) -> argparse.Namespace:
    """Parse the command line of main.py, or of a program (`description`) that takes the same arguments.

    `utils.arguments.preflight.check_run` checks it. `typed` of the result names what was given.

    Args:
        announce: print what came from `--like` and `--config`.

    Raises:
        UserError: the file of one of them can't be used.
    """
    parser = build_parser()
    parser.description = description or parser.description
    words, lines = merged_words(parser, sys.argv[1:] if argv is None else argv)
    if announce and launched_rank() == 0:
        for line in lines:
            say(line)
    args = parser.parse_args(words)
    args.typed = _typed(words)
    if args.save_strategy is None:
        args.save_strategy = "no" if args.save_steps is None else "steps"
    return args
