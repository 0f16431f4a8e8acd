"""Figures of a device that are wanted without waiting for it: values on their way, and moments in its work."""

import time
from collections.abc import Sequence

import torch
from deepspeed.accelerator import get_accelerator


class OnItsWay:
    """Tensors being copied to the host; `get` waits for the copies alone, not for work given to the device since."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        # From CUDA the copies go to pinned memory: others would wait for the device here.
        self.tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self.copied: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors) and torch.cuda.is_available():
            self.copied = torch.cuda.Event()
            self.copied.record()

    def get(self) -> list[torch.Tensor]:
        """Return the tensors on the host."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.tensors


class Moment:
    """A moment in the work of the device: now, once it has done what it was given so far."""

    def __init__(self, device: torch.device) -> None:
        """Note the moment; on CUDA without waiting for it, on other accelerators by waiting."""
        self.event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()
        elif device.type != "cpu":
            get_accelerator().synchronize()
        self.time = time.perf_counter()

    def seconds_until(self, later: "Moment") -> float:
        """Return the seconds between two moments; waits until the later one has come."""
        if self.event is None or later.event is None:
            return later.time - self.time
        later.event.synchronize()
        return self.event.elapsed_time(later.event) / 1000


def can_run_ahead(device: torch.device) -> bool:
    """Whether the device works on while the program does something else, so that reading a figure can wait."""
    return device.type == "cuda"
