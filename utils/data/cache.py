"""Folders that are complete or absent, with one writer at a time."""

import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from utils.errors import UserError

WORK_PREFIX = ".incomplete-"


@contextmanager
def cache_lock(folder: str) -> Iterator[None]:
    """Hold the cache folder's lock; the operating system frees it when its holder is killed."""
    try:
        os.makedirs(folder, exist_ok=True)
        lock = FileLock(os.path.join(folder, ".lock"))
        lock.acquire()
    except OSError as err:
        raise UserError(
            f"the cache folder {folder} can't be written ({err}): give another with --data_output_path."
        ) from err
    try:
        yield
    finally:
        lock.release()


def build_folder(path: str, build: Callable[[str], None]) -> None:
    """Make the folder `path` with `build(work_folder)`, written aside and renamed. Call it under the lock.

    What an earlier, killed writer left aside is swept away first.
    """
    parent = os.path.dirname(path)
    for name in os.listdir(parent):
        if name.startswith(WORK_PREFIX):
            shutil.rmtree(os.path.join(parent, name), ignore_errors=True)
    work = os.path.join(parent, f"{WORK_PREFIX}{os.path.basename(path)}-{uuid.uuid4().hex[:8]}")
    os.makedirs(work)
    try:
        build(work)
        shutil.rmtree(path, ignore_errors=True)
        os.rename(work, path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def checksum(file: str | Path) -> int:
    """CRC-32 of a file's bytes: about a second a gigabyte, and what a bad disk or a stray write did shows."""
    value = 0
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 24):
            value = zlib.crc32(chunk, value)
    return value
