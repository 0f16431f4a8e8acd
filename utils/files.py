"""Write files and folders so that they are complete or absent, and have them on the disk before going on.

Everything is written beside its place, under a name that begins with `.incomplete-`, and moved into place when it is
whole. A reader never sees half of it; what a killed writer left can be told by its name.
"""

import difflib
import errno
import fcntl
import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from utils.errors import UserError

INCOMPLETE = ".incomplete-"
RUN_FILE = "run.json"  # what a run leaves of itself beside its model
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)  # model, or owner/model


def check_place(name: str) -> bool:
    """Check that what can only be a folder's path, and no name on the hub, is a folder; returns True.

    Raises:
        UserError: there is no such folder, or it is a file.
    """
    if os.path.isfile(name):
        raise UserError(f"{name} is a file: give the folder it is in.")
    if os.path.isdir(name) or (not name.startswith(("/", ".", "~")) and HUB_NAME.fullmatch(name)):
        return True
    raise UserError(f"{name}: there is no such folder{similar_folder(name)}")


def similar_folder(path: str) -> str:
    """Return words on a folder of a similar name beside `path`; nothing where there is none."""
    parent, last = os.path.split(os.path.abspath(path))
    beside = [entry.name for entry in os.scandir(parent) if entry.is_dir()] if os.path.isdir(parent) else []
    near = difflib.get_close_matches(last, beside, n=1)
    return f" (do you mean {os.path.join(parent, near[0])}?)" if near else ""


@contextmanager
def write_aside(path: str) -> Iterator[BinaryIO]:
    """Open a binary file that takes the place of `path` in one step, once it is complete.

    It is written under a name of its own in the same folder (made if missing), so any number of processes may write
    the same path at once.
    """
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    aside = os.path.join(folder, f"{INCOMPLETE}{name}-{uuid.uuid4().hex[:8]}")
    try:
        with open(aside, "xb") as file:
            yield file
        os.replace(aside, path)
    finally:
        if os.path.exists(aside):
            os.remove(aside)


def write_json(path: str, value: Any) -> None:
    """Write `value` as an indented JSON file, whole or not at all."""
    with write_aside(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def build_folder(path: str, build: Callable[[str], None]) -> None:
    """Make the folder `path` with `build(work_folder)`, written aside and renamed. Call it under the lock.

    Folders that killed writers left beside it are removed first.
    """
    parent = os.path.dirname(path)
    remove_incomplete(parent)
    work = os.path.join(parent, f"{INCOMPLETE}{os.path.basename(path)}-{uuid.uuid4().hex[:8]}")
    os.makedirs(work)
    try:
        build(work)
        replace_folder(work, path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def replace_folder(work: str, path: str) -> None:
    """Give the complete folder `work` the name `path`; a folder of that name makes way and is removed."""
    sync(work)
    replaced = f"{work}-replaced"
    if os.path.isdir(path):
        shutil.rmtree(replaced, ignore_errors=True)  # of a writer that was killed before it had removed its own
        os.rename(path, replaced)
    os.rename(work, path)
    sync(os.path.dirname(os.path.abspath(path)))
    shutil.rmtree(replaced, ignore_errors=True)


def remove_incomplete(parent: str) -> None:
    """Remove the folders that killed writers left in `parent` (made if missing). Nothing else may be writing there."""
    os.makedirs(parent, exist_ok=True)
    for name in os.listdir(parent):
        if name.startswith(INCOMPLETE):
            shutil.rmtree(os.path.join(parent, name), ignore_errors=True)


def try_lock(path: str, holder: str) -> tuple[int | None, str]:
    """Take the lock file `path`, which says `holder` while it is held; never waits.

    A lock on a range of bytes (POSIX): the system frees it when this process ends in any way, workers forked from it
    do not inherit it, and network file systems keep it over hosts. Nothing else in this process may open the file.

    Returns:
        (an open descriptor that `free_lock` takes, ""), or (None, what the holder says).

    Raises:
        OSError: the file can't be made, or its file system has no locks.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            words = os.read(descriptor, 4096).decode(errors="replace").strip()
            os.close(descriptor)
            if err.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            return None, words
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, holder.encode())
                return descriptor, ""
        os.close(descriptor)  # its holder removed the file between our opening and locking it


def free_lock(path: str, descriptor: int) -> None:
    """Free a lock that `try_lock` took, and remove its file."""
    with suppress(OSError):
        os.remove(path)
    os.close(descriptor)


def checksum(file: str | Path) -> int:
    """Return the CRC-32 of a file's bytes, which shows damage by a bad disk; about a second a gigabyte."""
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


def sync_tree(folder: str) -> dict[str, int]:
    """Have every file below `folder` on the disk; returns the size of each by its path within the folder."""
    sizes = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            sync(path)
            sizes[os.path.relpath(path, folder)] = os.path.getsize(path)
    return sizes


def read_run_file(folder: str) -> dict[str, Any]:
    """Return the content of the run.json in `folder`; nothing where there is none that can be read."""
    try:
        with open(os.path.join(folder, RUN_FILE), encoding="utf-8") as file:
            run = json.load(file)
    except (OSError, ValueError):
        return {}
    return run if isinstance(run, dict) else {}
