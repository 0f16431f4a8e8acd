"""Read the device: its name, free and peak memory, random states; move batches to it."""

import os
import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator


def free_memory() -> float:
    """Bytes of CPU memory that are free for each rank of this node."""
    free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    return free / ranks_here()


def ranks_here() -> int:
    """Ranks of this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))


def to_device(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Move every tensor of a batch to `device` without waiting for the copy."""
    return {
        key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value for key, value in batch.items()
    }


def set_random_seed(seed: int) -> None:
    """Seed Python, numpy, torch and the accelerator."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    get_accelerator().manual_seed_all(seed)


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this rank has held so far: of its device, or of the process where that is a CPU."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kilobytes on Linux
    return get_accelerator().max_memory_allocated() / 1e9


def device_label() -> str:
    """The device's product name where it has one (GPUs), else its kind ("cpu")."""
    name = get_accelerator().device_name()
    module = torch.get_device_module(name)
    return module.get_device_name() if hasattr(module, "get_device_name") else name


def random_states() -> dict[str, Any]:
    """Every random state of this rank."""
    accelerator = get_accelerator()
    on_device = accelerator.device_name() != "cpu"
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": accelerator.get_rng_state() if on_device else None,
    }
