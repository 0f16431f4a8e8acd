"""Attention that knows documents: one row of many documents, each attending to itself alone.

`use_document_attention(model)` makes a model of any family that takes its attention from transformers'
`AttentionInterface` use `document_attention`; `set_documents` tells it how the next forward's row is cut. The
layout stays until the next one is set, so that gradient checkpointing's second forward sees the same.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

from utils.module.cpu_attention import cpu_attention

NAME = "documents"
_UNSUPPORTED = ("position_bias", "s_aux", "cache")  # learned biases, sinks, paged caches: refused, never ignored

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a torch built without it
    varlen_attn = None
FLASH_CAPABILITY = (8, 0)  # Ampere: the flash kernels behind it raise an error on older GPUs


class Documents:
    """How the row of the current forward is cut: `lengths` on the host, their running sum on the device."""

    lengths: list[int] | None = None
    cumulative: torch.Tensor | None = None
    part: tuple[int, int] = (0, 1)  # this rank has part k of N of the row
    # What brings the parts of a row together for attention (`utils.module.sequence_parallel`).
    exchange: Callable[..., tuple[torch.Tensor, None]] | None = None


def set_documents(
    lengths: list[int] | None, cumulative: torch.Tensor | None = None, part: tuple[int, int] = (0, 1)
) -> None:
    """Set the layout of the next forward.

    Args:
        lengths: tokens of each document in the row; None when rows are documents.
        cumulative: [documents + 1] int32 on the model's device, 0 and the running sums of `lengths`.
        part: (k, N) when this rank's input is part k of N of the row and the other parts are on other ranks.
    """
    Documents.lengths, Documents.cumulative, Documents.part = lengths, cumulative, part


def document_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document of the current layout.

    Args:
        query: [batch, heads, length, head size]; key and value may have fewer heads (grouped queries).
        scaling: factor on the scores; None for 1 / sqrt(head size).
        sliding_window: tokens a query sees, itself included.
        softcap: scores are squashed to +-softcap by tanh (Gemma 2).

    Returns:
        ([batch, length, heads, head size], None), the interface's convention.

    Raises:
        NotImplementedError: something the row layout can't honour; never silently wrong.
    """
    refused = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if refused or attention_mask is not None or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"document attention can't honour {', '.join(refused) or 'this mask'}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    lengths = Documents.lengths or [query.shape[2]]
    if sum(lengths) != query.shape[2]:
        raise NotImplementedError(f"documents of {sum(lengths)} tokens in a row of {query.shape[2]}")
    if Documents.lengths and _can_use_varlen(query, value, dropout, softcap):
        return _varlen(query, key, value, scaling, sliding_window, max(lengths)), None
    if _can_use_cpu_kernel(query, value, dropout, softcap, sliding_window, max(lengths)):
        return cpu_attention(query, key, value, lengths, scaling), None
    # Cut and joined where a token's heads lie together: each piece is one block of memory, in the backward too.
    pieces = ([part.transpose(1, 2) for part in tensor.transpose(1, 2).split(lengths, dim=1)]
              for tensor in (query, key, value))  # fmt: skip
    parts = []
    for q, k, v in zip(*pieces, strict=True):
        if softcap is None:
            part = _one_document(q, k, v, scaling, dropout, sliding_window)
        else:
            part = _one_document_softcapped(q, k, v, scaling, dropout, sliding_window, softcap)
        parts.append(part.transpose(1, 2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), None


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """[length, length] bool: the keys each query sees, itself and `window - 1` before."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < window)


def _one_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    dropout: float,
    window: int | None,
) -> torch.Tensor:
    length = query.shape[2]
    band = _band(length, window, query.device) if window is not None and length > window else None
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=band, dropout_p=dropout, is_causal=band is None, scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip


def _one_document_softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    dropout: float,
    window: int | None,
    softcap: float,
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = torch.tanh(query @ key.transpose(-1, -2) * scaling / softcap) * softcap
    length = query.shape[2]
    seen = _band(length, window if window is not None else length, query.device)
    weights = torch.softmax(scores.float().masked_fill(~seen, float("-inf")), dim=-1).to(query.dtype)
    return F.dropout(weights, dropout, training=dropout > 0) @ value


def _can_use_varlen(query: torch.Tensor, value: torch.Tensor, dropout: float, softcap: float | None) -> bool:
    """torch's own flash kernel: CUDA from Ampere on, 16 bits, no dropout or soft-cap, head sizes it has kernels for."""
    return (
        varlen_attn is not None
        and query.device.type == "cuda"
        and torch.cuda.get_device_capability(query.device) >= FLASH_CAPABILITY
        and query.dtype in (torch.float16, torch.bfloat16)
        and dropout == 0
        and softcap is None
        and query.shape[0] == 1
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
    )


def _can_use_cpu_kernel(
    query: torch.Tensor, value: torch.Tensor, dropout: float, softcap: float | None, window: int | None, longest: int
) -> bool:
    return (
        query.device.type == "cpu"
        and dropout == 0
        and softcap is None
        and (window is None or longest <= window)
        and query.shape[-1] == value.shape[-1]
    )


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None, longest: int
) -> torch.Tensor:
    """[1, length, heads, head size] through torch's varlen kernel."""
    takes = _varlen_arguments()
    options: dict[str, Any] = {"window_size": ((window or 0) - 1, 0)} if "window_size" in takes else {"is_causal": True}
    if window is not None and "window_size" not in takes and longest > window:
        raise NotImplementedError("this torch's varlen attention has no sliding window")
    # What the kernel doesn't take is settled beforehand, which costs a rounding or memory.
    if "scale" in takes:
        options["scale"] = scaling
    else:
        query = query * (scaling * query.shape[-1] ** 0.5)
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and "enable_gqa" in takes:
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    query, key, value = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    cumulative = Documents.cumulative
    return varlen_attn(query, key, value, cumulative, cumulative, longest, longest, **options)[None]


@functools.cache
def _varlen_arguments() -> frozenset[str]:
    """Names this torch's varlen_attn takes: scale and window_size came with 2.11, enable_gqa with 2.12."""
    return frozenset(inspect.signature(varlen_attn).parameters)


def row_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """`document_attention` of a whole row, or of one whose parts are on several ranks."""
    attend = document_attention if Documents.part[1] == 1 else Documents.exchange
    return attend(module, query, key, value, *args, **kwargs)


AttentionInterface.register(NAME, row_attention)


def use_document_attention(model: PreTrainedModel) -> str:
    """Switch `model` to document attention; returns the name of the one it had, for `restore_attention`.

    No mask function is registered under this name, so transformers builds no mask for it.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    return before


def restore_attention(model: PreTrainedModel, name: str) -> None:
    """Give `model` back the attention it had."""
    set_documents(None)
    model.set_attn_implementation(name)
