"""Write files and folders so that they are complete or absent; flush them to disk; checksums."""

import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

WORK_PREFIX = ".incomplete-"


@contextmanager
def write_aside(path: str) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` in one step, once it is complete.

    It is written under a name of its own in the same folder (made if missing), so any number of processes may
    write the same path at once, and a reader never sees half a file.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    aside = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(aside, "xb") as file:
            yield file
        os.replace(aside, path)
    finally:
        if os.path.exists(aside):
            os.remove(aside)


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


def sync(path: str) -> None:
    """Have a file, or a folder's list of names, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
