"""Tensors that ZeRO 3 has partitioned: their whole size, and gathering them."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import deepspeed
import torch


def _is_partitioned(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "ds_id")


def gather(tensors: Iterable[torch.Tensor]) -> AbstractContextManager:
    """Within it, those of the tensors that ZeRO 3 has partitioned are whole. A collective."""
    partitioned = [tensor for tensor in tensors if _is_partitioned(tensor)]
    return deepspeed.zero.GatheredParameters(partitioned) if partitioned else nullcontext()
