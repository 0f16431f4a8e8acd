"""The log of the libraries: their messages go to `{output_dir}/library.log`, and errors also to stderr.

This module must be imported before DeepSpeed, which logs while it is imported. What native code and the launchers write
to the terminal directly stays there: redirecting it would hide the last output of a crash.
"""

import logging
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from utils.logging.console import PRINTED, close_run_bar, has_live_line, launcher_rank

LOG_FILE = "library.log"
KEPT = 1000  # records kept at most before the log is opened
# Libraries whose loggers have handlers; records of all others reach Python's root logger.
WITH_HANDLERS = ("transformers", "datasets", "huggingface_hub", "torch")
FORMAT = "[%(asctime)s] [rank {rank}] [%(levelname)s] [%(name)s] %(message)s"


class LibraryLog(logging.Handler):
    """A log handler that keeps records in memory until `open` gives it a folder."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: deque[logging.LogRecord] = deque(maxlen=KEPT)
        self.path: str | None = None
        self.last_path: str | None = None  # of the run, also once its log is closed
        self.is_decided = False
        self.has_folder = False

    def open(self, output_dir: str | None) -> None:
        """Write kept and later records to that folder's log; without a folder, show warnings and drop the rest."""
        self.path = os.path.join(output_dir, LOG_FILE) if output_dir else None
        self.last_path = self.path
        self.setFormatter(logging.Formatter(FORMAT.format(rank=launcher_rank())))
        self.is_decided = True
        while self.kept:
            self._write(self.kept.popleft())

    def close_file(self) -> None:
        """End a run's log; later records are kept for the next run's."""
        self.kept.clear()
        self.path, self.is_decided, self.has_folder = None, False, False

    def emit(self, record: logging.LogRecord) -> None:
        """Show an error at once; write or keep every record."""
        if record.levelno >= logging.ERROR:
            self._show(record)
        if self.is_decided:
            self._write(record)
        else:
            self.kept.append(record)

    def _write(self, record: logging.LogRecord) -> None:
        if self.path:
            try:
                if not self.has_folder:  # made with the first record: a run that ends before leaves no empty folder
                    os.makedirs(os.path.dirname(self.path), exist_ok=True)
                    self.has_folder = True
                # Opened for each record: ranks share the file, and whole lines that are appended don't mix.
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(f"{self.format(record)}\n")
            except OSError:  # a full disk ends the run with advice where metrics or checkpoints are written
                self._show(record)
        elif logging.WARNING <= record.levelno < logging.ERROR:
            self._show(record)

    def _show(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # a terminal that is gone
            sys.stderr.write(f"[{record.levelname}] [{record.name}] {record.getMessage()}\n")


LOG = LibraryLog()  # the one log of the process; `quiet_libraries` closes it


def _take(record: logging.LogRecord) -> bool:
    """Filter of DeepSpeed's logger: pass every record to LOG and none to the handler DeepSpeed makes for itself.

    DeepSpeed makes it while it is imported, so the filter must already be there.
    """
    LOG.handle(record)
    return False


logging.getLogger("DeepSpeed").addFilter(_take)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Send the messages of libraries to the log within this context; show their progress bars on rank 0's terminal."""
    LOG.last_path = None
    root, loggers = logging.getLogger(), [logging.getLogger(name) for name in WITH_HANDLERS]
    before = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [], True
    logging.getLogger(PRINTED).setLevel(logging.INFO)
    root.addHandler(LOG)
    logging.captureWarnings(True)
    show_library_bars()
    try:
        yield
    finally:
        close_run_bar()
        logging.captureWarnings(False)
        root.removeHandler(LOG)
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
        LOG.close_file()


def show_library_bars() -> None:
    """Turn the progress bars of loading, tokenizing and downloading on in rank 0's terminal, and off elsewhere."""
    import datasets
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    if has_live_line():
        datasets.enable_progress_bars()
        enable_progress_bars()
        transformers_logging.enable_progress_bar()
    else:
        datasets.disable_progress_bars()
        disable_progress_bars()
        transformers_logging.disable_progress_bar()
