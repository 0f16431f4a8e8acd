"""The loss of a batch: cross-entropy summed over its label tokens, in float32; the caller averages over the step.

The fused loss projects to the vocabulary only at label positions, a chunk of them at a time, so the full
[tokens, vocabulary] logits never exist. Gradients are computed in the same pass over a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from utils.module.attention import set_documents
from utils.module.chunk_loss import (
    HALF_SCALE,
    LogitTransform,
    added,
    chunk_loss,
    chunk_rows,
    product,
    raw_logits,
    with_weight_gradient,
)
from utils.module.router_loss import Router, balance, router_logits_of, router_of

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


class BatchFigures(NamedTuple):
    """What a forward with targets measures beside its loss; stays on the device."""

    hits: torch.Tensor  # label tokens that no other token outdid in likelihood, int64
    router_loss: torch.Tensor | None = None  # before its coefficient; None without routers, or outside of training
    expert_tokens: torch.Tensor | None = None  # [layers, experts] tokens that each expert got


def summed_loss(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Sum the negative log-likelihoods of all label tokens of `batch` (of this rank's part): a float32 scalar.

    `model` (or the model inside the engine) has been through `install_loss`. A batch without a label gives 0
    with a gradient, so that every rank runs the same backward. Where the model's configuration asks for the routers'
    auxiliary loss, it is added in training, times its coefficient and the number of label tokens: the mean over them is
    then the loss that transformers' models return.
    """
    set_documents(batch.get("document_lengths"), batch.get("cu_seqlens"), batch.get("part", (0, 1)))
    inputs = {key: batch[key] for key in MODEL_INPUTS if key in batch}
    return model(**inputs, use_cache=False, positions=batch["positions"], targets=batch["targets"])


def install_loss(model: transformers.PreTrainedModel, fused: bool) -> None:
    """Make `model(..., positions=, targets=)` return the summed loss; without them it returns what it did before.

    The loss is computed inside the model's forward, so DeepSpeed's hooks run around it (ZeRO 3 gathers the head by
    them). `model.figures` is then the `BatchFigures` of the last such call.

    Args:
        fused: project to the vocabulary chunk by chunk; otherwise plain cross-entropy of full logits.
    """
    original = getattr(model, "forward_without_loss", model.forward)
    head = model.get_output_embeddings()
    transform = LogitTransform.of(model)
    router = router_of(model)
    if fused and not hasattr(head, "forward_without_targets"):
        head.forward_without_targets = head.forward
        head.forward = lambda hidden, targets=None: (
            head.forward_without_targets(hidden) if targets is None else _loss_of_head(head, hidden, targets, transform)
        )

    def forward(*args: Any, positions: torch.Tensor | None = None, targets: Any = None, **inputs: Any) -> Any:
        if targets is None:
            return original(*args, **inputs)
        if router is not None:
            inputs["output_router_logits"] = model.training
        if fused:
            outputs = model.base_model(**inputs)
            loss = head(outputs.last_hidden_state.flatten(0, 1).index_select(0, positions), targets=targets)
            hits = head.hits
        else:
            outputs = original(**inputs)
            picked = outputs.logits.flatten(0, 1).index_select(0, positions).float()
            loss = F.cross_entropy(picked, targets, reduction="sum")
            hits = _hits(picked.detach(), targets)
        model.figures, added = _figures(router, outputs, inputs.get("attention_mask"), hits)
        return loss if added is None else loss + added * len(targets)

    model.forward_without_loss = original
    model.forward = forward


@contextmanager
def without_loss(model: transformers.PreTrainedModel) -> Iterator[None]:
    """Give `model` the forward it had before `install_loss` within the block: `generate` reads its signature."""
    forward, model.forward = model.forward, model.forward_without_loss
    try:
        yield
    finally:
        model.forward = forward


def _figures(
    router: Router | None, outputs: Any, attention_mask: torch.Tensor | None, hits: torch.Tensor
) -> tuple[BatchFigures, torch.Tensor | None]:
    """Return the figures of a forward, and the auxiliary loss to add for each label token; None for none."""
    logits = router_logits_of(outputs)
    if router is None or not logits:
        return BatchFigures(hits), None
    loss, expert_tokens = balance(router, logits, attention_mask)
    return BatchFigures(hits, loss.detach(), expert_tokens), router.coefficient * loss if router.coefficient else None


def _loss_of_head(
    head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, transform: LogitTransform
) -> torch.Tensor:
    """Return the fused loss of a head, and leave the number of hits in `head.hits`."""
    loss, head.hits = _FusedLoss.apply(hidden, head.weight, head.bias, targets, transform, torch.is_grad_enabled())
    return loss


def _hits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Count the rows of `logits` in which none exceeds the target's: an int64 scalar."""
    return (logits.gather(1, targets[:, None])[:, 0] >= logits.amax(-1)).sum()


def last_figures(model: nn.Module) -> BatchFigures:
    """Return the figures of the last forward with targets of `model`, or of the model inside an engine."""
    return getattr(model, "module", model).figures


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
    return _FusedLoss.apply(hidden, weight, bias, targets, transform, torch.is_grad_enabled())[0]


class _FusedLoss(torch.autograd.Function):
    """`fused_loss` and its hits, with the gradients computed in the forward, chunk by chunk.

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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wants_hidden, wants_weight, wants_bias = (wanted and with_gradient for wanted in ctx.needs_input_grad[:3])
        half_scale = HALF_SCALE if hidden.dtype == torch.float16 else 1.0
        factor = half_scale if wants_hidden or wants_weight or wants_bias else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hits = torch.zeros((), dtype=torch.int64, device=hidden.device)
        grad_hidden = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if wants_hidden else None
        grad_weight = grad_bias = None
        rows = chunk_rows(hidden, weight.shape[0])
        for start in range(0, max(len(targets), 1), rows):  # without a label once as well: gradients are 0 then
            part = slice(start, start + rows)
            logits = raw_logits(hidden[part], weight, bias)
            loss, right = chunk_loss(logits, targets[part], transform, factor)
            total += loss
            hits += right
            if wants_hidden:
                grad_hidden[part] = product(logits, weight)
            if wants_weight:
                grad_weight = with_weight_gradient(grad_weight, logits, hidden[part])
            if wants_bias:
                grad_bias = added(grad_bias, logits.sum(0, dtype=torch.float32))
        ctx.half_scale = half_scale
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.mark_non_differentiable(hits)
        return total, hits

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        factor = grad_output / ctx.half_scale
        gradients = (
            None if saved is None else saved.mul_(factor).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, None, None, None)
