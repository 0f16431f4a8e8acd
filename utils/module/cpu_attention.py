"""Document attention on a CPU as one autograd function, which saves the row's tensors but no copy of a document.

The row is split into documents outside of autograd. Saved for the backward are query, key, value and output of the
row in the model's dtype, and a float32 logsumexp for each head and token.
"""

from itertools import accumulate, pairwise
from typing import Any

import torch

from utils.machine.precision import cpu_has_bf16

# The kernels that torch.nn.functional.scaled_dot_product_attention calls on a CPU.
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Up to so many tokens a document is faster in float32 than in 16 bits: the kernel multiplies small blocks, where
# converting costs more than it saves (`benchmarks/attention.py`). A processor that has no bf16 instructions is always
# faster in float32.
FASTER_IN_FLOAT32 = 400


def cpu_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scaling: float
) -> torch.Tensor:
    """Compute causal attention inside each document of a row.

    Args:
        query: [batch, heads, length, head size]; key and value may have fewer heads (grouped queries).
        lengths: tokens of each document; their sum is length.
        scaling: factor on the scores.

    Returns:
        [batch, length, heads, head size].
    """
    return _RowAttention.apply(query, key, value, lengths, scaling)


class _RowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scaling: float
    ) -> torch.Tensor:
        batch, heads, total, size = query.shape
        output = query.new_empty(batch, total, heads, size)
        logsumexp = torch.empty(batch, heads, total, dtype=torch.promote_types(query.dtype, torch.float32))
        for document in _slices(lengths):
            pieces = _pieces(document, query, key, value)
            part, sums = _forward(*pieces, 0.0, True, scale=scaling)
            output[:, document] = part.transpose(1, 2)
            logsumexp[:, :, document] = sums
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.lengths, ctx.scaling = lengths, scaling
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, logsumexp = ctx.saved_tensors
        rows = [torch.empty_like(tensor.transpose(1, 2)) for tensor in (query, key, value)]
        for document in _slices(ctx.lengths):
            pieces = _pieces(document, query, key, value)
            around = _pieces(document, gradient.transpose(1, 2), output.transpose(1, 2))
            sums = logsumexp[:, :, document].contiguous()
            parts = _backward(around[0], *pieces, around[1], sums, 0.0, True, scale=ctx.scaling)
            for row, part in zip(rows, parts, strict=True):
                if part.shape[1] > row.shape[2]:  # a key or value head was repeated for each query head of its group
                    part = part.unflatten(1, (row.shape[2], -1)).sum(2)
                row[:, document] = part.transpose(1, 2)
        return *(row.transpose(1, 2) for row in rows), None, None


def _slices(lengths: list[int]) -> list[slice]:
    """Return the place of each document in the row."""
    return [slice(start, end) for start, end in pairwise(accumulate(lengths, initial=0))]


def _pieces(document: slice, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return one document of each tensor [batch, heads, length, size], in the faster dtype for its length.

    Tensors with fewer heads than the first one have them repeated.
    """
    pieces = [tensor[:, :, document] for tensor in tensors]
    if document.stop - document.start <= FASTER_IN_FLOAT32 or not cpu_has_bf16():
        pieces = [piece.to(torch.promote_types(piece.dtype, torch.float32)) for piece in pieces]
    heads = pieces[0].shape[1]
    return [piece if piece.shape[1] == heads else piece.repeat_interleave(heads // piece.shape[1], dim=1)
            for piece in pieces]  # fmt: skip
