"""Memory on a CPU that no tensor uses: freed blocks kept by the C library, and cached kernels of oneDNN."""

import ctypes
import os
import sys
from contextlib import suppress

from deepspeed.accelerator import get_accelerator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
THRESHOLDS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
LARGEST_KEPT = 32 * 2**20  # bytes; the largest value glibc accepts for this threshold
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's cache, and torch's above it
KERNELS_KEPT = 32  # enough for a step: three for each shape of Linear, which layers share, and a few for the loss


def limit_kernel_caches() -> None:
    """Limit the kernel caches of oneDNN and torch to 32 kernels each instead of 1,024.

    Must be called before the first matrix product. On a CPU every shape of a bf16 product gets a kernel of about
    300 KB in each cache. Without padding nearly every step has new shapes, so a run would collect 640 MB of kernels
    that it hardly ever uses again. Capacities set in the environment are kept.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(KERNELS_KEPT))


def keep_freed_memory() -> None:
    """Make a run on a CPU keep freed memory for its next tensors; on other devices nothing changes.

    By default glibc returns the freed end of its heap to the system in the middle of a step, and every page of the next
    tensors costs a page fault. Blocks above 32 MB are still mapped and returned one by one: if they were kept too,
    aligned blocks would not fit into the gaps of earlier ones, and the heap would grow from step to step. C libraries
    other than glibc don't have these settings. Thresholds set in the environment are kept.
    """
    if any(name in os.environ for name in THRESHOLDS):
        return
    _ask_c_library("mallopt", M_MMAP_THRESHOLD, LARGEST_KEPT)
    _ask_c_library("mallopt", M_TRIM_THRESHOLD, -1)


def give_back_freed_memory() -> None:
    """Return all freed memory to the system on a CPU, also gaps too small for any block, which a long run collects."""
    _ask_c_library("malloc_trim", 0)


def _ask_c_library(function: str, *values: int) -> None:
    if get_accelerator().device_name() == "cpu" and sys.platform == "linux":
        with suppress(AttributeError):  # the C library is not glibc
            getattr(ctypes.CDLL(None), function)(*values)
