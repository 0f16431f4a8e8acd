"""The parts of the fused loss that work on one chunk: raw logits of some rows, their loss, and the gradients.

On a CPU what is large is kept or cut into blocks: memory above 32 MB is mapped anew, page by page, each time it is
allocated, which took a third of a product's time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers

CHUNK_BYTES = 2**27  # of logits held at once: large enough for the matrix kernels, small beside a model
CPU_CHUNK_BYTES = (
    2**26
)  # on a CPU, where they are kept from step to step; at least `CPU_ROW_BYTES` // element size rows
CPU_ROW_BYTES = 768
ROW_BLOCK = 64  # rows of a chunk divide by it: the matrix kernels are a fifth slower on others
VOCABULARY_BLOCK = 2048  # rows of the head's gradient that a CPU computes and adds up while they are in its cache
CACHE_BYTES = 2**22  # of float32 logits processed at once on a CPU, so that they stay in its cache
HALF_SCALE = 1024.0  # keeps fp16 gradients of the logits of a large vocabulary above the smallest normal number


class LogitTransform(NamedTuple):
    """What a model family does to the logits of its head."""

    scale: float = 1.0
    softcap: float | None = None  # logits are bounded to +-softcap by tanh, after scaling

    @classmethod
    def of(cls, model: transformers.PreTrainedModel) -> LogitTransform:
        """Read a model's scale (Cohere's logit_scale, Granite's logits_scaling) and soft-cap (Gemma 2)."""
        config = model.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        return cls(scale, getattr(config, "final_logit_softcapping", None))


def _block_loss(
    logits: torch.Tensor, targets: torch.Tensor, transform: LogitTransform, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss and the hits of raw float32 `logits` [rows, vocabulary], overwritten with their gradient.

    Without a gradient `logits` are overwritten with intermediate values. The softmax is computed in place, relative
    to the largest logit of each row, without a second tensor of that size.
    """
    scale, softcap = transform
    if scale != 1.0:
        logits.mul_(scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    slope = 1 - (logits / softcap).square_() if softcap is not None and with_gradient else None
    picked = logits.gather(1, targets[:, None])
    largest = logits.amax(-1, keepdim=True)
    sums = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    total = (sums.log() + largest - picked).sum()
    if with_gradient:
        logits.div_(sums)
        logits.scatter_add_(1, targets[:, None], logits.new_full((len(targets), 1), -1.0))
        if slope is not None:
            logits.mul_(slope)
        if scale != 1.0:
            logits.mul_(scale)
    return total, (picked >= largest).sum()


def chunk_loss(
    logits: torch.Tensor, targets: torch.Tensor, transform: LogitTransform, half_scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss and the hits of one chunk of raw logits, overwritten with `half_scale` x their gradient.

    With `half_scale` None no gradient is computed. Logits in 16 bits are converted to float32 a block of rows at a
    time, on a CPU one that stays in its cache.
    """
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    hits = torch.zeros((), dtype=torch.int64, device=logits.device)
    rows = max(CACHE_BYTES // (4 * logits.shape[1]), 1) if logits.device.type == "cpu" else len(targets)
    for block, wanted in zip(logits.split(rows), targets.split(rows), strict=True):
        exact = block.float()
        loss, right = _block_loss(exact, wanted, transform, half_scale is not None)
        total += loss
        hits += right
        if half_scale is not None and exact is not block:
            block.copy_(exact.mul_(half_scale) if half_scale != 1.0 else exact)
    return total, hits


def added(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    """Return `total` + `part` in float32: in 16 bits the small contributions of many chunks would be lost."""
    return part.float() if total is None else total.add_(part)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return `left @ right`; of fp16 in float32, since the sum over many rows of a frequent token exceeds fp16.

    Such an overflow would come before any loss scale could prevent it.
    """
    if left.dtype != torch.float16:
        return left @ right
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def chunk_rows(hidden: torch.Tensor, vocabulary: int) -> int:
    """Return how many rows are projected to the vocabulary at once."""
    size = hidden.element_size()
    if hidden.device.type != "cpu":
        return max(CHUNK_BYTES // (size * vocabulary), ROW_BLOCK)
    rows = max(CPU_CHUNK_BYTES // (size * vocabulary), CPU_ROW_BYTES // size)
    return rows // ROW_BLOCK * ROW_BLOCK


_kept: dict[torch.dtype, torch.Tensor] = {}  # a CPU's memory of raw logits, one for each dtype


def raw_logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `hidden @ weight.T + bias`; on a CPU in memory that the next call overwrites.

    A block of this size is mapped anew each time it is allocated, page by page: a third of the product's time.
    """
    if hidden.device.type != "cpu" or type(hidden) is not torch.Tensor:  # the plan of a run computes without memory
        return F.linear(hidden, weight, bias)
    size = len(hidden) * len(weight)
    kept = _kept.get(hidden.dtype)
    if kept is None or len(kept) < size:
        kept = _kept[hidden.dtype] = torch.empty(size, dtype=hidden.dtype)
    out = kept[:size].view(len(hidden), len(weight))
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)


def with_weight_gradient(total: torch.Tensor | None, logits: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return `total` plus the head's gradient from one chunk, in float32; on a CPU block by block of the vocabulary."""
    if logits.device.type != "cpu":
        return added(total, product(logits.t(), hidden))
    if total is None:
        total = torch.zeros(logits.shape[1], hidden.shape[1], dtype=torch.float32)
    for rows, columns in zip(total.split(VOCABULARY_BLOCK), logits.split(VOCABULARY_BLOCK, dim=1), strict=True):
        rows.add_(product(columns.t(), hidden))
    return total
