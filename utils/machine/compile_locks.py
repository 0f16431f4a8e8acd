"""Locks that a killed run leaves in torch's extension cache, on which the next run would wait for ever.

torch compiles DeepSpeed's kernels under a plain lock file and waits as long as that file exists, also when
the process that made it is gone. Its maker keeps it open, so a lock no process has open is a left-over.
"""

import hashlib
import os
import sys
import time
from pathlib import Path

from filelock import FileLock
from torch.utils.cpp_extension import get_default_build_root

LOCK_NAME = "lock"
REMOTE_PATIENCE = 180  # seconds: another node may be compiling on a shared home folder, invisible from here


def extension_folder() -> Path:
    """Where torch keeps compiled extensions: `TORCH_EXTENSIONS_DIR`, which is set to a folder of this Python
    environment's own where the user has not set it. Two environments that share one folder, as torch's default is
    shared, rebuild their kernels for each other at every turn, and break each other's when they do so at once.
    """
    own = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    default = os.path.join(get_default_build_root(), f"{os.path.basename(sys.prefix)}-{own}")
    return Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", default))


def clear_stale_build_locks(folder: Path, several_nodes: bool = False) -> list[Path]:
    """Remove lock files below `folder` that no process has open; returns them. Only Linux can tell.

    Args:
        several_nodes: another node may hold a lock, so one must also be `REMOTE_PATIENCE` seconds old.
    """
    if not folder.is_dir() or not Path("/proc/self/fd").is_dir():
        return []
    removed = []
    # Under a lock the system frees itself: two ranks never judge the same file at the same time.
    with FileLock(folder / ".stale-locks"):
        for lock in sorted(folder.rglob(LOCK_NAME)):
            while several_nodes and lock.exists() and time.time() - lock.stat().st_mtime < REMOTE_PATIENCE:
                time.sleep(1)
            if _is_left_over(lock):
                lock.unlink(missing_ok=True)
                removed.append(lock)
    return removed


def _is_left_over(lock: Path) -> bool:
    """True if the very same file stays there with nobody having it open.

    Looked at twice: a maker that is just finishing closes its file a moment before it removes it.
    """
    before = _identity(lock)
    for _ in range(2):
        if before is None or _is_open_somewhere(lock) or _identity(lock) != before:
            return False
        time.sleep(0.2)
    return _identity(lock) == before


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_ctime_ns


def _is_open_somewhere(file: Path) -> bool:
    target = str(file.resolve())
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(entry.path) == target for entry in os.scandir(descriptors)):
                return True
        except OSError:  # the process ended, or is another user's, who has no business in this cache
            continue
    return False
