"""Tensors that are not what they stand for: their whole size, and gathering them.

A parameter that ZeRO 3 partitioned is an empty tensor on every rank; DeepSpeed keeps what it stands for in `ds_`
attributes. A weight in 4 bits is a column of bytes, of which bitsandbytes keeps shape and scales in `quant_state`.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Return whether ZeRO 3 divides this parameter among the ranks."""
    return hasattr(tensor, "ds_id")


def is_quantized(tensor: torch.Tensor) -> bool:
    """Return whether this is a weight in 4 bits (`utils.module.quantized`)."""
    return getattr(tensor, "quant_state", None) is not None


def whole_numel(tensor: torch.Tensor) -> int:
    """Return the number of elements of the whole tensor, or of what a weight in 4 bits stands for."""
    return tensor.ds_numel if is_partitioned(tensor) else whole_shape(tensor).numel()


def whole_shape(tensor: torch.Tensor) -> torch.Size:
    """Return the shape of the whole tensor, or of what a weight in 4 bits stands for."""
    if is_quantized(tensor):
        return torch.Size(tensor.quant_state.shape)
    return tensor.ds_shape if is_partitioned(tensor) else tensor.shape


def params_to_fetch(param_list: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return those of the parameters whose values are not on this rank: partitioned, and not gathered already."""
    partitioned = [param for param in param_list if is_partitioned(param)]
    return [param for param in partitioned if param.ds_status.name == "NOT_AVAILABLE"]


def has_partitioned(model: torch.nn.Module) -> bool:
    """Return whether ZeRO 3 divides any parameter of the model among the ranks."""
    return any(is_partitioned(parameter) for parameter in model.parameters())


def gather(tensors: Iterable[torch.Tensor], modifier_rank: int | None = None) -> AbstractContextManager:
    """Return a context in which the partitioned ones of `tensors` are whole; every rank must enter it.

    Args:
        modifier_rank: the rank whose changes are kept and partitioned again; None: changes are lost.
    """
    partitioned = [tensor for tensor in tensors if is_partitioned(tensor)]
    if not partitioned:
        return nullcontext()
    import deepspeed  # slow to import, and only ZeRO 3 needs it here

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=modifier_rank)
