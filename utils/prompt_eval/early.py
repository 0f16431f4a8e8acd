"""Answers --help and wrong values of prompt_eval.py before the libraries are imported, which takes seconds."""

import sys

from utils.errors import EXIT_USER_ERROR, UserError
from utils.machine.interrupts import end_at_interrupt
from utils.machine.streams import check_working_directory, open_closed_streams
from utils.prompt_eval.arguments import parse_args


def answer_early() -> None:
    """Parse and check the command line; end the program where help is asked for or a value is wrong."""
    end_at_interrupt()
    open_closed_streams()
    try:
        check_working_directory()
        parse_args()
    except UserError as error:
        print(f"prompt_eval.py: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
