"""The console: lines on stdout and, where stderr is a terminal, one live line on stderr below them.

Without a terminal, or on another rank than 0, there is no live line: the functions that would draw it do nothing.
"""

import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from tqdm import tqdm

PRINTED = "print"  # name of the logger that gets what libraries print
TICK_SECONDS = 0.5
RUN_FORMAT = "{desc} step {n_fmt}/{total_fmt} |{bar:6}| {remaining} left{postfix}"
NARROW_FORMAT = "{desc} {n_fmt}/{total_fmt} {remaining}{postfix}"
NARROW = 126  # columns; a terminal with fewer gets the short format
PHASE_FORMAT = "{desc} {elapsed}{postfix}"

_run_bar: tqdm | None = None  # the live line of training, between open_run_bar and close_run_bar
_stage = "starting"  # what the program is doing, for the message of an error
_stdout: TextIO | None = None  # the real stdout within chatter_to_log, which replaces sys.stdout


def launcher_rank() -> str:
    """Return this process's rank by the launcher's variable, which is set before the process group is started."""
    return os.environ.get("RANK", "0")


def has_live_line() -> bool:
    """Return whether this process draws a live line: it is rank 0, and stderr is a terminal."""
    return launcher_rank() == "0" and sys.stderr.isatty()


def is_narrow() -> bool:
    """Return whether the terminal is too narrow for the long format of the live line."""
    return os.get_terminal_size(sys.stderr.fileno()).columns < NARROW


def print_any_text() -> None:
    """Have what stdout and stderr can't encode printed as "?": under latin-1 a Chinese text would end the program."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape") and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def begin(stage: str) -> None:
    """Note what the program does from here on, in words that follow "while"."""
    global _stage
    _stage = stage


def current_stage() -> str:
    """Return what the program was doing last."""
    return _stage


def say(line: str) -> None:
    """Print a line on stdout, above the live line if there is one, on any rank that calls this.

    A stdout that takes no more (its reader or terminal is gone, the disk of its file is full) does not end what may be
    days of training: the run goes on without it, and says so on stderr.
    """
    output = _stdout or sys.stdout
    try:
        with tqdm.external_write_mode(file=output):
            output.write(f"{line}\n")
            output.flush()
    except OSError as err:
        _lose_stdout(output, err)


def _lose_stdout(output: TextIO, err: OSError) -> None:
    """Lead stdout to nowhere: its buffer still holds a line, and native code has the same descriptor."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, output.fileno())
    os.close(nowhere)
    with suppress(OSError):
        sys.stderr.write(f"stdout can't be written any more ({err.strerror}): the run goes on without printing\n")
        sys.stderr.flush()


class PrintLog(io.TextIOBase):
    """A text file that turns each line written to it into a log record."""

    def write(self, text: str) -> int:
        """Log each line of `text` but blank ones; return the number of characters, as files do."""
        for line in filter(str.strip, text.splitlines()):
            logging.getLogger(PRINTED).info(line)
        return len(text)


@contextmanager
def chatter_to_log() -> Iterator[None]:
    """Turn what libraries print within this context, or in a function decorated with it, into log records.

    `say` still prints.
    """
    global _stdout
    before, outer = sys.stdout, _stdout
    _stdout, sys.stdout = outer or before, PrintLog()
    try:
        yield
    finally:
        _stdout, sys.stdout = outer, before


# ------------------------------------------------------------------------------------------ the live line


def open_run_bar(total: int, done: int) -> None:
    """Draw the live line of training, of which `done` of `total` optimizer steps are done."""
    global _run_bar
    close_run_bar()
    if has_live_line():
        form = NARROW_FORMAT if is_narrow() else RUN_FORMAT
        _run_bar = tqdm(
            total=total, initial=done, bar_format=form, dynamic_ncols=True, file=sys.stderr, desc="Training"
        )


def advance_run_bar(epoch: int, epochs: int) -> None:
    """Advance the live line by a step without reading metrics, so the device is not synchronized."""
    if _run_bar is not None:
        word = "ep" if _run_bar.bar_format == NARROW_FORMAT else "Epoch"
        _run_bar.set_description_str(f"{word} {epoch}/{epochs}", refresh=False)
        _run_bar.update()


def show_figures(text: str) -> None:
    """Show `text` at the end of the live line until the next call."""
    if _run_bar is not None:
        _run_bar.set_postfix_str(text)


def close_run_bar() -> None:
    """End the live line; what it last showed stays on the screen."""
    global _run_bar
    if _run_bar is not None:
        _run_bar.close()
        _run_bar = None


@contextmanager
def phase(name: str) -> Iterator[Callable[[str], None]]:
    """Show on the live line what the program is doing within this context, and for how long already.

    It is the program's stage too, until the context ends well. Yields a function that shows its progress, such as
    "3/12".
    """
    outer = _stage
    begin(name)
    if not has_live_line():
        yield lambda text: None
    else:
        with _live_phase(name) as show:
            yield show
    begin(outer)


@contextmanager
def _live_phase(name: str) -> Iterator[Callable[[str], None]]:
    """Draw a phase on the live line."""
    bar, before = _run_bar, ""
    if bar is None:
        bar = tqdm(bar_format=PHASE_FORMAT, dynamic_ncols=True, file=sys.stderr, desc=f"{name} ...", leave=False)
    else:
        before = bar.postfix or ""
        bar.set_postfix_str(f"{name} ...")

    def show(text: str) -> None:
        bar.set_postfix_str(text if bar is not _run_bar else f"{name} {text}", refresh=False)

    ended = threading.Event()
    ticker = threading.Thread(target=_tick, args=(bar, ended), daemon=True)
    ticker.start()
    try:
        yield show
    finally:
        ended.set()
        ticker.join()
        if bar is _run_bar:
            bar.set_postfix_str(before)
        else:
            bar.close()


def _tick(bar: tqdm, ended: threading.Event) -> None:
    while not ended.wait(TICK_SECONDS):
        bar.refresh()
