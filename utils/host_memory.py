"""What the C library does with memory that tensors on a CPU have freed."""

import ctypes
import sys
from contextlib import suppress

from deepspeed.accelerator import get_accelerator

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # mallopt(3)


def keep_freed_memory() -> None:
    """On a CPU, let freed memory stay with the process for the next tensor; elsewhere nothing changes.

    glibc gives every block of 32 MB and more back to the system when it is freed, and the next one of that size begins
    with a page fault for each of its pages: logits and DeepSpeed's flat gradients in every step. glibc alone has this
    switch, other C libraries do as they do.
    """
    if get_accelerator().device_name() != "cpu" or sys.platform != "linux":
        return
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
