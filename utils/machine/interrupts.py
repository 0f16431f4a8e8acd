"""Ctrl-C while the libraries are imported, which takes seconds: the program ends at once and without a traceback."""

import signal


def end_at_interrupt() -> None:
    """Have Ctrl-C end this process by the signal itself, unless it is ignored, as in a shell's background."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_at_interrupt() -> None:
    """Have Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
