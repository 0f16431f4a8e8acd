"""Answers --help and wrong values at once, before torch, transformers and DeepSpeed are imported (seconds)."""

import sys

from utils.arguments.parser import parse_args
from utils.arguments.values import check_values
from utils.distributed.launchers import adopt_launcher, launched_rank
from utils.errors import EXIT_USER_ERROR, UserError, join_problems
from utils.machine.interrupts import end_at_interrupt
from utils.machine.streams import check_working_directory, open_closed_streams


def answer_early() -> None:
    """Parse the command line and check its values; end the program where help is asked for or a value is wrong.

    One rank speaks; the others go on, find the same mistake later, and are ended by their launcher.
    """
    end_at_interrupt()
    open_closed_streams()
    problems = []

    def check_arguments() -> None:
        problems.extend(check_values(parse_args(announce=False)))

    for check in (check_working_directory, adopt_launcher, check_arguments):
        try:
            check()
        except UserError as err:
            problems.append(str(err))
    if problems and launched_rank() == 0:
        print(f"error: {join_problems(problems)}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
