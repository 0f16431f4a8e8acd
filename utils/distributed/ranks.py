"""This process's rank, printing on rank 0, and small collectives: sums, means, barriers and broadcasts."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from utils.logging.console import say


def global_rank() -> int:
    """Return this process's rank over all nodes; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_rank_0() -> bool:
    """Return whether this process is rank 0, which prints and writes what all ranks have in common."""
    return global_rank() == 0


def world_size() -> int:
    """Return the number of ranks over all nodes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def print_rank_0(msg: str, rank: int | None = None) -> None:
    """Print on rank 0, and where `rank` is 0 or -1 (callers of DeepSpeed-Chat give it the local rank too)."""
    if (rank is not None and rank <= 0) or is_rank_0():
        say(msg)


def get_all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Average `tensor` over all ranks, in place; return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        tensor /= dist.get_world_size()
    return tensor


def wait_for_all() -> None:
    """Wait until every rank has called this."""
    if dist.is_initialized():
        dist.barrier()


def answer_of_rank_0(answer: Any) -> Any:
    """Return rank 0's `answer` on every rank; every rank must call it."""
    answers = [answer]
    if dist.is_initialized():
        dist.broadcast_object_list(answers, src=0)
    return answers[0]


def gather_from_all(value: Any) -> list[Any]:
    """Return every rank's `value` in the order of the ranks; every rank must call it."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sum_on_device(value: float, device: torch.device | str) -> torch.Tensor:
    """Return the sum of `value` over all ranks as a scalar on the device, without waiting for it."""
    dtype = torch.float32 if get_accelerator().device_name() == "mps" else torch.float64
    tensor = torch.full((), value, dtype=dtype, device=device)  # a kernel's argument: no copy that would wait
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def all_reduce_sum(values: Iterable[float], device: torch.device | str) -> list[float]:
    """Return the sum of each of `values` over all ranks (float64 where the device has it)."""
    dtype = torch.float32 if get_accelerator().device_name() == "mps" else torch.float64
    tensor = torch.tensor(list(values), dtype=dtype, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor.tolist()
