"""Memory of a run on a CPU beside its tensors: what the C library does with freed blocks, and oneDNN's kernels."""

import ctypes
import os
import sys
from contextlib import suppress

from deepspeed.accelerator import get_accelerator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
THRESHOLDS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
LARGEST_KEPT = 32 * 2**20  # bytes; the most that glibc takes for this threshold
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's own, and torch's of the same
KERNELS_KEPT = 32  # layers share shapes: a step has three for each different Linear, and a few of the loss


def limit_kernel_caches() -> None:
    """Let oneDNN and torch keep 32 kernels each instead of 1,024; call it before the first matrix product.

    On a CPU they make one for every shape of a bf16 product, of about 300 KB in either cache. Without padding nearly
    every step has shapes of its own, so a run would gather 640 MB of kernels it hardly ever needs again. Capacities
    set in the environment are left alone.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(KERNELS_KEPT))


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
