"""What the C library does with memory that tensors on a CPU have freed."""

import ctypes
import os
import sys
from contextlib import suppress

from deepspeed.accelerator import get_accelerator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
THRESHOLDS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
LARGEST_KEPT = 32 * 2**20  # bytes; the most that glibc takes for this threshold


def keep_freed_memory() -> None:
    """On a CPU, let freed memory stay with the process for the next tensor; elsewhere nothing changes.

    By default glibc gives the freed end of its heap back to the system in the middle of a step, and the next tensors
    begin with a page fault for each of their pages. Blocks above 32 MB are still mapped and given back each by itself:
    kept too, aligned blocks don't fit into the gaps their predecessors leave, and the heap grows from step to step.
    glibc alone has this switch, other C libraries do as they do. Thresholds set in the environment are left alone.
    """
    if any(name in os.environ for name in THRESHOLDS):
        return
    _ask_c_library("mallopt", M_MMAP_THRESHOLD, LARGEST_KEPT)
    _ask_c_library("mallopt", M_TRIM_THRESHOLD, -1)


def give_back_freed_memory() -> None:
    """On a CPU, return all that is kept, also from gaps nothing fits into: a long run would gather those."""
    _ask_c_library("malloc_trim", 0)


def _ask_c_library(function: str, *values: int) -> None:
    if get_accelerator().device_name() == "cpu" and sys.platform == "linux":
        with suppress(AttributeError):  # not glibc
            getattr(ctypes.CDLL(None), function)(*values)
