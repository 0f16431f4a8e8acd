"""The loss of a batch as a float32 sum over its label tokens; averaging is the caller's, over the whole step.

The fused way projects to the vocabulary only at label positions and a chunk of them at a time, so the full
[tokens, vocabulary] logits never exist. Gradients are worked out in the same pass over a chunk.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from utils.attention import set_documents

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
CHUNK_BYTES = 2**27  # float32 logits held at once: large enough for the matrix kernels, small beside a model
HALF_SCALE = 1024.0  # fp16 probabilities of a large vocabulary are below its smallest normal number


def summed_loss(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Sum of the negative log-likelihoods of all label tokens of `batch` (of this rank's part): a float32 scalar.

    `model` (or the model inside the engine) has been through `install_loss`. A batch without a label gives 0
    with a gradient, so that every rank runs the same backward.
    """
    set_documents(batch.get("document_lengths"), batch.get("cumulative"), batch.get("part", (0, 1)))
    inputs = {key: batch[key] for key in MODEL_INPUTS if key in batch}
    return model(**inputs, use_cache=False, positions=batch["positions"], targets=batch["targets"])


def install_loss(model: PreTrainedModel, fused: bool) -> None:
    """Let `model(..., positions=, targets=)` return the summed loss; without them it answers as before.

    Being inside the model's own forward, DeepSpeed's hooks (ZeRO 3 gathers the head by them) see it as usual.
    """
    original = getattr(model, "forward_without_loss", model.forward)
    head = model.get_output_embeddings()
    scale, softcap = logit_scale(model), getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if fused and not hasattr(head, "forward_without_targets"):
        head.forward_without_targets = head.forward
        head.forward = lambda hidden, targets=None: (
            head.forward_without_targets(hidden)
            if targets is None
            else _FusedLoss.apply(hidden, head.weight, head.bias, targets, scale, softcap, torch.is_grad_enabled())
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


def can_fuse(model: PreTrainedModel) -> bool:
    """True where the head is a plain Linear on the base model's output (not so with LoRA on the head)."""
    return type(model.get_output_embeddings()) is nn.Linear and model.base_model is not model


def logit_scale(model: PreTrainedModel) -> float:
    """What the family multiplies its logits by (Cohere's logit_scale, Granite's logits_scaling)."""
    config = model.config.get_text_config()
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)


class _Chunk(NamedTuple):
    total: torch.Tensor  # summed negative log-likelihood
    gradient: torch.Tensor  # of the raw logits, [rows, vocabulary] float32


def _chunk_loss(
    logits: torch.Tensor, targets: torch.Tensor, scale: float, softcap: float | None, with_gradient: bool
) -> _Chunk:
    """Loss of one chunk of raw float32 logits, which are overwritten."""
    if scale != 1.0:
        logits.mul_(scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    log_sum = torch.logsumexp(logits, dim=-1, keepdim=True)
    total = (log_sum - logits.gather(1, targets[:, None])).sum()
    if not with_gradient:
        return _Chunk(total, logits)
    slope = None if softcap is None else 1 - (logits / softcap).square_()
    gradient = logits.sub_(log_sum).exp_()
    gradient.scatter_add_(1, targets[:, None], gradient.new_full((len(targets), 1), -1.0))
    if slope is not None:
        gradient.mul_(slope)
    return _Chunk(total, gradient.mul_(scale) if scale != 1.0 else gradient)


class _FusedLoss(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T + bias`, chunk by chunk, gradients in the same pass.

    The idea is that of Liger Kernel's fused linear cross-entropy (Hsu et al. 2024, https://arxiv.org/abs/2410.10989).
    hidden [rows, width], weight [vocabulary, width], bias [vocabulary] or None, targets [rows].
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        scale: float,
        softcap: float | None,
        with_gradient: bool,
    ) -> torch.Tensor:
        wants_hidden, wants_weight, wants_bias = (wanted and with_gradient for wanted in ctx.needs_input_grad[:3])
        half_scale = HALF_SCALE if hidden.dtype == torch.float16 else 1.0
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        # Sums over many chunks are kept in float32: in 16 bits small contributions would be lost.
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=torch.float32, device=weight.device) if wants_bias else None
        grad_hidden = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if wants_hidden else None
        rows = max(CHUNK_BYTES // (4 * weight.shape[0]), 64)
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            logits = F.linear(hidden[part], weight, bias).float()
            chunk = _chunk_loss(logits, targets[part], scale, softcap, wants_hidden or wants_weight or wants_bias)
            total += chunk.total
            gradient = (
                chunk.gradient.mul_(half_scale).to(hidden.dtype) if half_scale != 1 else chunk.gradient.to(hidden.dtype)
            )
            if wants_hidden:
                grad_hidden[part] = gradient @ weight
            if wants_weight:
                grad_weight += gradient.t() @ hidden[part]
            if wants_bias:
                grad_bias += gradient.float().sum(0)
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
        return (*gradients, None, None, None, None)
