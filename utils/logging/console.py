"""The terminal: lines on stdout, and below them one live line on stderr where that is a terminal.

Without a terminal, or on another rank than 0, there is no live line, and nothing here draws anything.
"""

import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

import torch.distributed as dist
from tqdm import tqdm

PRINTED = "print"  # the logger that gets what libraries print
TICK_SECONDS = 0.5
RUN_FORMAT = "{desc} step {n_fmt}/{total_fmt} |{bar:6}| {remaining} left{postfix}"
NARROW_FORMAT = "{desc} {n_fmt}/{total_fmt} {remaining}{postfix}"
NARROW = 115  # columns; with fewer the words around the figures make room for them
PHASE_FORMAT = "{desc} {elapsed}{postfix}"

_run_bar: tqdm | None = None  # the training's, from its first step to its last
_stdout: TextIO | None = None  # the real one, while the prints of libraries go elsewhere


def has_live_line() -> bool:
    """Whether this process may draw one: it is rank 0, and stderr is a terminal."""
    is_first = not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0
    return is_first and sys.stderr.isatty()


def is_narrow() -> bool:
    """Whether the terminal is too narrow for the live line's words."""
    return os.get_terminal_size(sys.stderr.fileno()).columns < NARROW


def say(line: str) -> None:
    """Print a line on stdout, above the live line if there is one. Any rank may call it."""
    output = _stdout or sys.stdout
    with tqdm.external_write_mode(file=output):
        output.write(f"{line}\n")
        output.flush()


class PrintLog(io.TextIOBase):
    """A file that makes records of what is printed into it, one per line."""

    def write(self, text: str) -> int:
        """Nothing is shown; blank lines are dropped."""
        for line in filter(str.strip, text.splitlines()):
            logging.getLogger(PRINTED).info(line)
        return len(text)


@contextmanager
def chatter_to_log() -> Iterator[None]:
    """Within it (or in a function decorated with it) what libraries print becomes log records; `say` still prints."""
    global _stdout
    before, outer = sys.stdout, _stdout
    _stdout, sys.stdout = outer or before, PrintLog()
    try:
        yield
    finally:
        _stdout, sys.stdout = outer, before


# ------------------------------------------------------------------------------------------ the live line


def open_run_bar(total: int, done: int) -> None:
    """Begin the training's live line: `done` of `total` optimizer steps are behind it."""
    global _run_bar
    close_run_bar()
    if has_live_line():
        form = NARROW_FORMAT if is_narrow() else RUN_FORMAT
        _run_bar = tqdm(
            total=total, initial=done, bar_format=form, dynamic_ncols=True, file=sys.stderr, desc="Training"
        )


def advance_run_bar(epoch: int, epochs: int) -> None:
    """One more step is on its way. No figure is asked for, so no device is waited for."""
    if _run_bar is not None:
        word = "ep" if _run_bar.bar_format == NARROW_FORMAT else "Epoch"
        _run_bar.set_description_str(f"{word} {epoch}/{epochs}", refresh=False)
        _run_bar.update()


def show_figures(text: str) -> None:
    """The figures of the live line, until the next ones."""
    if _run_bar is not None:
        _run_bar.set_postfix_str(text)


def close_run_bar() -> None:
    """End the live line; it stays on the screen as it is."""
    global _run_bar
    if _run_bar is not None:
        _run_bar.close()
        _run_bar = None


@contextmanager
def phase(words: str) -> Iterator[Callable[[str], None]]:
    """What takes its time now, on the live line, with the seconds it has taken.

    Gives a function that shows how far it is (`"3/12"`).
    """
    if not has_live_line():
        yield lambda text: None
        return
    bar, before = _run_bar, ""
    if bar is None:
        bar = tqdm(bar_format=PHASE_FORMAT, dynamic_ncols=True, file=sys.stderr, desc=f"{words} ...", leave=False)
    else:
        before = bar.postfix or ""
        bar.set_postfix_str(f"{words} ...")

    def show(text: str) -> None:
        bar.set_postfix_str(text if bar is not _run_bar else f"{words} {text}", refresh=False)

    over = threading.Event()
    ticker = threading.Thread(target=_tick, args=(bar, over), daemon=True)
    ticker.start()
    try:
        yield show
    finally:
        over.set()
        ticker.join()
        if bar is _run_bar:
            bar.set_postfix_str(before)
        else:
            bar.close()


def _tick(bar: tqdm, over: threading.Event) -> None:
    while not over.wait(TICK_SECONDS):
        bar.refresh()
