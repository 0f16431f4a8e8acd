"""Swap files of `--offload nvme`: one folder for each process, removed when the run ends.

DeepSpeed's swapper (ZeRO-Infinity, Rajbhandari et al. 2021, https://arxiv.org/abs/2104.07857) keeps at stage 3 the
parts of weights, float32 masters, moments and gradients in files, one folder a rank, and reads each where it is needed
into buffers of a fixed size. What is below a megabyte a rank stays in memory.
"""

import os
import shutil
import socket
import tempfile
from pathlib import Path

from deepspeed.accelerator import get_accelerator
from filelock import FileLock, Timeout

from utils.errors import UserError

SWAP_PREFIX = "swap-"


def check_async_io() -> None:
    """Raise a UserError when the operator that reads and writes swap files can't be compiled here."""
    builder = get_accelerator().create_op_builder("AsyncIOBuilder")
    if builder is None or not builder.is_compatible(verbose=False):
        raise UserError(
            "--offload nvme needs DeepSpeed's operator async_io, and that libaio with its headers: install libaio-dev "
            "(apt) or libaio-devel (dnf, yum), or leave it at --offload cpu."
        )


_held: dict[str, FileLock] = {}  # this process's folders, each with its lock


def open_swap_folder(root: str) -> str:
    """Make a folder for this process's swap files below `root` and return it; `remove_swap_folders` removes it.

    Folders of processes that were killed are removed: a folder is in use as long as its lock is held.
    """
    os.makedirs(root, exist_ok=True)
    for lock_file in Path(root).glob(f"{SWAP_PREFIX}*.lock"):
        lock = FileLock(lock_file)
        try:
            with lock.acquire(timeout=0):
                shutil.rmtree(lock_file.with_suffix(""), ignore_errors=True)
                lock_file.unlink(missing_ok=True)
        except Timeout:
            continue
    folder = os.path.join(root, f"{SWAP_PREFIX}{socket.gethostname()}-{os.getpid()}")
    _held[folder] = FileLock(folder + ".lock")
    _held[folder].acquire()
    os.makedirs(folder)
    return folder


def remove_swap_folders() -> None:
    """Remove this process's swap files."""
    for folder, lock in _held.items():
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()
        Path(folder + ".lock").unlink(missing_ok=True)
    _held.clear()


def check_swap_folder(root: str) -> None:
    """Raise a UserError when `root` can't hold swap files, which bypass the system's cache (O_DIRECT)."""
    existing = os.path.abspath(root)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    try:
        with tempfile.NamedTemporaryFile(dir=existing) as probe:
            os.close(os.open(probe.name, os.O_RDWR | os.O_DIRECT))
    except OSError as err:
        raise UserError(
            f"--nvme_path {root} can't hold swap files ({err}): give a folder on a local disk you may write to; memory "
            "file systems and some network ones can't be read past the cache (O_DIRECT)."
        ) from err
