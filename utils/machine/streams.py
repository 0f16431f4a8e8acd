"""What whoever started the process has left it without: standard streams (`>&-`), a working directory."""

import os
import sys

from utils.errors import UserError


def open_closed_streams() -> None:
    """Lead closed standard streams to nowhere: the next file that is opened would take their number.

    What native code writes to stderr would then go into that file, a model's say, and Python's own stream would be
    None.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def check_working_directory() -> None:
    """Check that the working directory is there: native libraries that are loaded without one end the process.

    Raises:
        UserError: it was removed.
    """
    try:
        os.getcwd()
    except OSError as err:
        raise UserError(f"the working directory is not there any more ({err}): cd to a folder that is.") from err
