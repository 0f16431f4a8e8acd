"""What the libraries say of themselves goes to `{output_dir}/library.log`; what is an error is shown as well.

Imported before DeepSpeed, which talks while it is imported. What native code and the launchers write to the terminal
themselves stays there: moving it would hide the last words of a crash.
"""

import logging
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from utils.logging.console import PRINTED, close_run_bar, has_live_line

LOG_FILE = "library.log"
KEPT = 1000  # records from before it is known where they go
# Libraries with handlers of their own; all others leave theirs to Python's root logger.
WITH_HANDLERS = ("transformers", "datasets", "huggingface_hub", "torch")
FORMAT = "[%(asctime)s] [rank {rank}] [%(levelname)s] [%(name)s] %(message)s"


class LibraryLog(logging.Handler):
    """Keeps records until `open` says where they go."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: deque[logging.LogRecord] = deque(maxlen=KEPT)
        self.path: str | None = None
        self.is_decided = False

    def open(self, output_dir: str | None) -> None:
        """From here on: to that folder's log or, without a folder, warnings to stderr and the rest nowhere."""
        self.path = os.path.join(output_dir, LOG_FILE) if output_dir else None
        self.setFormatter(logging.Formatter(FORMAT.format(rank=os.environ.get("RANK", "0"))))
        if self.path:
            os.makedirs(output_dir, exist_ok=True)
        self.is_decided = True
        while self.kept:
            self._write(self.kept.popleft())

    def close_file(self) -> None:
        """The run is over; what comes now waits for the next one."""
        self.kept.clear()
        self.path, self.is_decided = None, False

    def emit(self, record: logging.LogRecord) -> None:
        """An error is shown at once; everything is written where the log is."""
        if record.levelno >= logging.ERROR:
            self._show(record)
        if self.is_decided:
            self._write(record)
        else:
            self.kept.append(record)

    def _write(self, record: logging.LogRecord) -> None:
        if self.path:
            try:
                # Opened for each: ranks share the file, and lines appended whole don't mix.
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(f"{self.format(record)}\n")
            except OSError:  # a full disk ends the run where its own files are written, with advice
                self._show(record)
        elif logging.WARNING <= record.levelno < logging.ERROR:
            self._show(record)

    def _show(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"[{record.levelname}] [{record.name}] {record.getMessage()}\n")


LOG = LibraryLog()


def _take(record: logging.LogRecord) -> bool:
    """As a filter of DeepSpeed's logger: it makes its handler while it is imported, and nothing gets there."""
    LOG.handle(record)
    return False


logging.getLogger("DeepSpeed").addFilter(_take)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within it libraries talk to the log; their progress bars are shown where there is a terminal, on rank 0."""
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
    """Progress bars of loading, tokenising and downloading: where there is a terminal, on rank 0."""
    import datasets
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    if has_live_line() and os.environ.get("RANK", "0") == "0":
        datasets.enable_progress_bars()
        enable_progress_bars()
        transformers_logging.enable_progress_bar()
    else:
        datasets.disable_progress_bars()
        disable_progress_bars()
        transformers_logging.disable_progress_bar()
