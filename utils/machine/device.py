"""The device: its name, free and peak memory, random states and seed; batches are moved to it."""

import os
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator


def free_memory() -> float:
    """Return the bytes of free CPU memory for each rank of this node."""
    free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    return free / ranks_here()


def ranks_here() -> int:
    """Return the number of ranks of this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))


def to_device(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Return the batch with every tensor on `device`, without waiting for the copies."""
    return {
        key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value for key, value in batch.items()
    }


def set_random_seed(seed: int | None) -> None:
    """Seed the random numbers of Python, numpy, torch and the accelerator; None leaves them as they are."""
    if seed is None:
        return
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    get_accelerator().manual_seed_all(seed)


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory of this rank so far in 1e9 bytes: of its device, or of the process on a CPU."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kilobytes on Linux
    return get_accelerator().max_memory_allocated() / 1e9


def device_label() -> str:
    """Return the device's product name where it has one (GPUs), else its kind ("cpu")."""
    name = get_accelerator().device_name()
    module = torch.get_device_module(name)
    return module.get_device_name() if hasattr(module, "get_device_name") else name


def random_states() -> dict[str, Any]:
    """Return every random state of this rank: Python's, numpy's, torch's and the accelerator's (None on a CPU)."""
    accelerator = get_accelerator()
    on_device = accelerator.device_name() != "cpu"
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": accelerator.get_rng_state() if on_device else None,
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Set every random state of this rank to what `random_states` returned; the accelerator's where there is one."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["device"] is not None and get_accelerator().device_name() != "cpu":
        get_accelerator().set_rng_state(states["device"])


@contextmanager
def kept_random_states() -> Iterator[None]:
    """Leave every random state of this rank as it was before the block."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)
