"""The processor's description, which DeepSpeed's builders of kernels ask for."""

from contextlib import suppress
from functools import cache
from importlib import import_module


def cache_cpu_info() -> None:
    """Make `cpuinfo.get_cpu_info` answer a second call from memory; a second call of this changes nothing.

    DeepSpeed's builders ask twice, and each answer takes a Python process of 1.2 s.
    """
    with suppress(ImportError):  # DeepSpeed builds its kernels without cpuinfo as well
        cpuinfo = import_module("cpuinfo")
        if not hasattr(cpuinfo.get_cpu_info, "cache_clear"):
            cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info)
