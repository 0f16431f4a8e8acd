"""Standard streams that whoever started the process has closed (`>&-`, a service without a terminal)."""

import os
import sys


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
