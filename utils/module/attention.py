"""Document attention: causal attention in a row of several documents, each of which attends to itself alone.

`use_document_attention(model)` switches a model of any family that takes its attention from transformers'
`AttentionInterface` to `document_attention`; `set_documents` gives the layout of the next forward's row. The layout
stays until another is set or `clear_documents` is called, so gradient checkpointing's second forward sees the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from utils.module.cpu_attention import cpu_attention
from utils.module.row_kernels import Row, check_kernels, compute, kernels_for

NAME = "documents"
_UNSUPPORTED = ("position_bias", "s_aux", "cache")  # learned biases, sinks, paged caches: refused, never ignored
Attention = Callable[..., tuple[torch.Tensor, None]]


class Documents:
    """The row layout of the current forward, and the attention of rows shared by ranks: the one owner of both.

    Attention layers get no such argument from transformers' models, so they read it here. Only `set_documents`,
    `clear_documents` and `set_exchange` write it.
    """

    lengths: list[int] | None = None  # tokens of each document, on the host; None: every row is one document
    cu_seqlens: torch.Tensor | None = None  # [documents + 1] int32 on the device: 0 and the running sums of `lengths`
    part: tuple[int, int] = (0, 1)  # this rank has part k of N of the row
    # Joins the parts of a row for attention (`utils.module.sequence_parallel`); belongs to the run, not to a row.
    exchange: Attention | None = None


def set_documents(
    lengths: list[int] | None, cu_seqlens: torch.Tensor | None = None, part: tuple[int, int] = (0, 1)
) -> None:
    """Set the row layout of the next forward.

    Args:
        lengths: tokens of each document in the row; None for a padded batch, in which every row is one document.
        cu_seqlens: [documents + 1] int32 on the model's device, 0 and the running sums of `lengths`.
        part: (k, N) when this rank's input is part k of N of the row and the other parts are on other ranks.
    """
    Documents.lengths, Documents.cu_seqlens, Documents.part = lengths, cu_seqlens, part


def clear_documents() -> None:
    """Forget the row layout: in the next forward every row is one document."""
    set_documents(None)


def set_exchange(exchange: Attention | None) -> None:
    """Set the attention of rows whose parts are on several ranks; None for a run without such rows."""
    Documents.exchange = exchange


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
    """Compute causal attention inside each document of the current row layout.

    The signature is that of transformers' attention interface.

    Args:
        query: [batch, heads, length, head size]; key and value may have fewer heads (grouped queries).
        scaling: factor on the scores; None for 1 / sqrt(head size).
        sliding_window: number of tokens a query sees, itself included.
        softcap: bounds the scores to +-softcap by tanh (Gemma 2).

    Returns:
        ([batch, length, heads, head size], None): no attention weights are returned.

    Raises:
        NotImplementedError: an argument can't be honoured in a row of documents; it is never ignored.
    """
    refused = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if refused or attention_mask is not None or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"document attention can't honour {', '.join(refused) or 'this mask'}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    lengths = Documents.lengths or [query.shape[2]]
    if sum(lengths) != query.shape[2]:
        raise NotImplementedError(f"documents of {sum(lengths)} tokens in a row of {query.shape[2]}")
    if Documents.lengths and softcap is None:
        row = Row(Documents.cu_seqlens, max(lengths), scaling, sliding_window, dropout)
        if kernels := kernels_for(query, value, row):
            query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
            return compute(kernels[0], query, key, value, row)[None], None
    if _can_use_cpu_kernel(query, value, dropout, softcap, sliding_window, max(lengths)):
        return cpu_attention(query, key, value, lengths, scaling), None
    # Split and joined as [batch, length, heads, size]: each document is one block of memory, in the backward too.
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
    """Return the [length, length] bool mask of the keys each query sees: itself and the `window - 1` before it."""
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


def _can_use_cpu_kernel(
    query: torch.Tensor, value: torch.Tensor, dropout: float, softcap: float | None, window: int | None, longest: int
) -> bool:
    """Return whether `cpu_attention` computes this: plain attention on a CPU, no document longer than the window."""
    return (
        query.device.type == "cpu"
        and dropout == 0
        and softcap is None
        and (window is None or longest <= window)
        and query.shape[-1] == value.shape[-1]
    )


def row_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Compute `document_attention` of a row that this rank has whole, or whose parts are on several ranks."""
    attend = document_attention if Documents.part[1] == 1 else Documents.exchange
    return attend(module, query, key, value, *args, **kwargs)


def use_document_attention(model: transformers.PreTrainedModel) -> str:
    """Switch `model` to document attention; return the name of its former attention, for `restore_attention`.

    On a GPU the kernels for this model's attention are checked, and a line says which is used. No mask function
    is registered under the name "documents", so transformers builds no mask.
    """
    before = model.config._attn_implementation
    # Not where this file is imported: the interface brings all that models need, and a wrong column needs none of it.
    if NAME not in transformers.AttentionInterface():
        transformers.AttentionInterface.register(NAME, row_attention)
    model.attention_of_its_own = before
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation == NAME:  # some families have attention of their own
        check_kernels(model.config, model.dtype, model.device)
    return before


def keep_attention_uncompiled() -> None:
    """Have torch's compiler leave document attention as it is: the layout it reads changes with every row."""
    transformers.AttentionInterface.register(NAME, torch.compiler.disable(row_attention))


@contextmanager
def own_attention(model: transformers.PreTrainedModel) -> Iterator[None]:
    """Have `model` use the attention it had before document attention, which knows no cache, within the block."""
    clear_documents()
    has_documents = model.config._attn_implementation == NAME
    if has_documents:
        model.set_attn_implementation(model.attention_of_its_own)
    try:
        yield
    finally:
        if has_documents:
            model.set_attn_implementation(NAME)


def restore_attention(model: transformers.PreTrainedModel, name: str) -> None:
    """Switch `model` back to the attention of this name and forget the row layout."""
    clear_documents()
    model.set_attn_implementation(name)
