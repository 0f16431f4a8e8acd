"""The loss of a batch: cross-entropy summed over its label tokens, in float32; the caller averages over the step.

The fused loss projects to the vocabulary only at label positions, a chunk of them at a time, so the full
[tokens, vocabulary] logits never exist. Gradients are computed in the same pass over a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from utils.module.attention import set_documents

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
CHUNK_BYTES = 2**27  # of logits held at once: large enough for the matrix kernels, small beside a model
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


def summed_loss(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Sum the negative log-likelihoods of all label tokens of `batch` (of this rank's part): a float32 scalar.

    `model` (or the model inside the engine) has been through `install_loss`. A batch without a label gives 0
    with a gradient, so that every rank runs the same backward.
    """
    set_documents(batch.get("document_lengths"), batch.get("cu_seqlens"), batch.get("part", (0, 1)))
    inputs = {key: batch[key] for key in MODEL_INPUTS if key in batch}
    return model(**inputs, use_cache=False, positions=batch["positions"], targets=batch["targets"])


def install_loss(model: transformers.PreTrainedModel, fused: bool) -> None:
    """Make `model(..., positions=, targets=)` return the summed loss; without them it returns what it did before.

    The loss is computed inside the model's forward, so DeepSpeed's hooks run around it (ZeRO 3 gathers the head by
    them).

    Args:
        fused: project to the vocabulary chunk by chunk; otherwise plain cross-entropy of full logits.
    """
    original = getattr(model, "forward_without_loss", model.forward)
    head = model.get_output_embeddings()
    transform = LogitTransform.of(model)
    if fused and not hasattr(head, "forward_without_targets"):
        head.forward_without_targets = head.forward
        head.forward = lambda hidden, targets=None: (
            head.forward_without_targets(hidden)
            if targets is None
            else fused_loss(hidden, head.weight, head.bias, targets, transform)
        )

    def forward(*args: Any, positions: torch.Tensor | None = None, targets: Any = None, **inputs: Any) -> Any:
        if targets is None:
            return original(*args, **inputs)
        if fused:
            hidden = model.base_model(**inputs).last_hidden_state
            return head(hidden.flatten(0, 1).index_select(0, positions), targets=targets)
        picked = original(**inputs).logits.flatten(0, 1).index_select(0, positions)
        return F.cross_entropy(picked.float(), targets, reduction="sum")

    model.forward_without_loss = original
    model.forward = forward


def can_fuse(model: transformers.PreTrainedModel) -> bool:
    """Return whether the head is a plain Linear on the base model's output (with LoRA on the head it is not)."""
    return type(model.get_output_embeddings()) is nn.Linear and model.base_model is not model


def fused_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    transform: LogitTransform,
) -> torch.Tensor:
    """Sum the cross-entropy of `transform(hidden @ weight.T + bias)` over all rows, chunk by chunk: a float32 scalar.

    Args:
        hidden: [rows, width], at label positions.
        weight: [vocabulary, width].
        bias: [vocabulary].
        targets: [rows], the label tokens.
    """
    return _FusedLoss.apply(hidden, weight, bias, targets, transform, torch.is_grad_enabled())


def _block_loss(
    logits: torch.Tensor, targets: torch.Tensor, transform: LogitTransform, with_gradient: bool
) -> torch.Tensor:
    """Return the summed loss of raw float32 `logits` [rows, vocabulary], overwritten with their gradient.

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
    return total


def _chunk_loss(
    logits: torch.Tensor, targets: torch.Tensor, transform: LogitTransform, half_scale: float | None
) -> torch.Tensor:
    """Return the summed loss of one chunk of raw logits, overwritten with `half_scale` times their gradient.

    With `half_scale` None no gradient is computed. Logits in 16 bits are converted to float32 a block of rows at a
    time, on a CPU one that stays in its cache.
    """
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    rows = max(CACHE_BYTES // (4 * logits.shape[1]), 1) if logits.device.type == "cpu" else len(targets)
    for block, wanted in zip(logits.split(rows), targets.split(rows), strict=True):
        exact = block.float()
        total += _block_loss(exact, wanted, transform, half_scale is not None)
        if half_scale is not None and exact is not block:
            block.copy_(exact.mul_(half_scale) if half_scale != 1.0 else exact)
    return total


def _added(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    """Return `total` + `part` in float32: in 16 bits the small contributions of many chunks would be lost."""
    return part.float() if total is None else total.add_(part)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return `left @ right`; of fp16 in float32, since the sum over many rows of a frequent token exceeds fp16.

    Such an overflow would come before any loss scale could prevent it.
    """
    if left.dtype != torch.float16:
        return left @ right
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


class _FusedLoss(torch.autograd.Function):
    """`fused_loss` with its gradients computed in the forward, chunk by chunk.

    The method is that of Liger Kernel's fused linear cross-entropy (Hsu et al. 2024,
    https://arxiv.org/abs/2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        transform: LogitTransform,
        with_gradient: bool,  # grad mode of the caller: it is always off in here
    ) -> torch.Tensor:
        wants_hidden, wants_weight, wants_bias = (wanted and with_gradient for wanted in ctx.needs_input_grad[:3])
        half_scale = HALF_SCALE if hidden.dtype == torch.float16 else 1.0
        factor = half_scale if wants_hidden or wants_weight or wants_bias else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if wants_hidden else None
        grad_weight = grad_bias = None
        rows = max(CHUNK_BYTES // (hidden.element_size() * weight.shape[0]), 64)
        for start in range(0, max(len(targets), 1), rows):  # without a label once as well: gradients are 0 then
            part = slice(start, start + rows)
            logits = F.linear(hidden[part], weight, bias)
            total += _chunk_loss(logits, targets[part], transform, factor)
            if wants_hidden:
                grad_hidden[part] = _product(logits, weight)
            if wants_weight:
                grad_weight = _added(grad_weight, _product(logits.t(), hidden[part]))
            if wants_bias:
                grad_bias = _added(grad_bias, logits.sum(0, dtype=torch.float32))
        ctx.half_scale = half_scale
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        factor = grad_output / ctx.half_scale
        gradients = (
            None if saved is None else saved.mul_(factor).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, None, None, None)
