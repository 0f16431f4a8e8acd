"""Stale compile locks: lock files that a killed run leaves in torch's extension cache and later runs wait for.

torch compiles DeepSpeed's kernels under a plain lock file and waits as long as that file exists, also when the
process that created it has ended. The creator keeps the file open, so a lock that no process has open is stale.
"""

import hashlib
import os
import sys
import time
from pathlib import Path

from deepspeed.accelerator import get_accelerator
from filelock import FileLock
from torch.utils.cpp_extension import get_default_build_root

LOCK_NAME = "lock"
# Seconds. On a shared home folder another node may hold a lock, and its processes can't be seen from this one.
REMOTE_PATIENCE = 180


def extension_folder() -> Path:
    """Return the folder of torch's compiled extensions, `TORCH_EXTENSIONS_DIR`; set it where the user has not.

    It is set to a folder for this Python environment and this kind of device alone. Environments that share a folder,
    as they share torch's default, rebuild each other's kernels every time, and break them when both build at once; a
    kernel of the same name is another program for a GPU than for a CPU.
    """
    own = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    device = get_accelerator().device_name()
    kind = "" if device == "cpu" else f"-{device}"
    default = os.path.join(get_default_build_root(), f"{os.path.basename(sys.prefix)}-{own}{kind}")
    return Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", default))


def clear_stale_build_locks(folder: Path, several_nodes: bool = False) -> list[Path]:
    """Remove lock files below `folder` that no process has open; return them. Does nothing outside Linux.

    Args:
        several_nodes: another node may hold a lock, so a stale one must also be `REMOTE_PATIENCE` seconds old.
    """
    if not folder.is_dir() or not Path("/proc/self/fd").is_dir():
        return []
    removed = []
    # FileLock is released by the system with its process. Under it no two ranks check the same file at the same time.
    with FileLock(folder / ".stale-locks"):
        for lock in sorted(folder.rglob(LOCK_NAME)):
            while several_nodes and lock.exists() and time.time() - lock.stat().st_mtime < REMOTE_PATIENCE:
                time.sleep(1)
            if _is_stale(lock):
                lock.unlink(missing_ok=True)
                removed.append(lock)
    return removed


def _is_stale(lock: Path) -> bool:
    """Return whether the same file stays while no process has it open.

    It is checked twice: a creator that finishes closes its file a moment before it removes it.
    """
    before = _identity(lock)
    for _ in range(2):
        if before is None or _is_open_somewhere(lock) or _identity(lock) != before:
            return False
        time.sleep(0.2)
    return _identity(lock) == before


def _identity(file: Path) -> tuple[int, int] | None:
    """Return what tells a file from a later one of the same name; None where there is none."""
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
        except OSError:  # the process has ended, or belongs to another user, who doesn't compile into this cache
            continue
    return False
