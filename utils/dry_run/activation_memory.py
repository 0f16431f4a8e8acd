"""Count the bytes one micro batch allocates, by running it without data: every tensor is on the meta device.

The model, its LoRA layers, checkpointing, the loss and the backward are the run's own; a dispatch mode adds up the
sizes of the tensors that are alive. So no family needs a formula of its own, and a model of any size takes a second.
The closed formulas for transformer blocks are in Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198).
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from utils.model.build import ModelForm, create_meta_model
from utils.module.fused_loss import can_fuse, install_loss, summed_loss
from utils.module.lora_names import find_blocks

NAME = "simulated"
FEW, MANY = 3, 6  # blocks


class Layout(NamedTuple):
    """The largest micro batch of a run, as the model gets it."""

    rows: int
    length: int  # of a row, in tokens
    labels: int  # label tokens in all rows
    on_cpu: bool = False
    parts: int = 1  # ranks that share a row, of which `length` is one's part


class Counts(NamedTuple):
    """What the estimate needs to know of a model and its largest micro batch; sizes in bytes are of one device."""

    parameters: int  # each counted once
    trainable: int
    largest: int  # weights of the largest single parameter
    activations: int  # bytes kept for the backward when the last block is done
    forward: int  # most bytes alive in the forward, the loss and what it keeps for the backward included
    backward: int  # most bytes alive in the backward, finished gradients of weights not counted
    with_gradients: int  # the same, counting them
    offloaded: int  # bytes that wait in CPU memory for the backward
    quantized: int = 0  # parameters in 4 bits, among the others
    largest_quantized: int = 0  # of one weight


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that ops make, from their birth to their end; those of `model` are there already."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        super().__init__()
        tensors = (*model.parameters(), *model.buffers())
        self.known: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in tensors}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.known:
            self.known[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self.known.pop(key, 0)


class _Attention(torch.autograd.Function):
    """The tensors of a flash kernel, without its work: keeps query, key, value, output and one float a row and head."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        batch, heads, length, _ = query.shape
        output = query.new_empty(batch, length, heads, value.shape[-1])
        log_sums = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _Shared:
    parts = 1  # ranks that share the row


def _attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    if _Shared.parts > 1:
        # A rank gives all heads of its part and gets its heads of the whole row: as many bytes, but for key heads that
        # are fewer than the ranks, of which each gets one. Both ways a tensor is rearranged, and exchanged for another.
        copies = -(-_Shared.parts // key.shape[1])
        key, value = (tensor.repeat_interleave(copies, dim=1) for tensor in (key, value))
        query, key, value = (tensor.clone().clone() for tensor in (query, key, value))
        return _Attention.apply(query, key, value).clone().clone(), None
    return _Attention.apply(query, key, value), None


def _offloading_checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Checkpoint `function`, add up the bytes it keeps, and hold none of them until the backward."""

    def put_away(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
        _Offloaded.total += tensor.nbytes
        return tensor.shape, tensor.dtype

    with torch.autograd.graph.saved_tensors_hooks(
        put_away, lambda put: torch.empty(put[0], dtype=put[1], device="meta")
    ):
        return checkpoint(function, *args, use_reentrant=False, **kwargs)


class _Offloaded:
    total = 0  # bytes


def simulated_model(
    config: PretrainedConfig, form: ModelForm, dtype: str, entries: int | None = None
) -> transformers.PreTrainedModel:
    """Build the run's model on the meta device, with attention and offloading that allocate as the real ones do.

    Args:
        dtype: "bf16", "fp16" or "fp32".
        entries: of the tokenizer, for which the embeddings may grow.
    """
    offload = form.gradient_checkpointing and form.activation_offloading
    model = create_meta_model(config, form._replace(activation_offloading=False), dtype, entries)
    transformers.AttentionInterface.register(NAME, _attention)
    model.set_attn_implementation(NAME)
    if offload:
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = _offloading_checkpoint
    return model.train()


def count(model: transformers.PreTrainedModel, layout: Layout, fused: bool = True) -> Counts:
    """Run one micro batch of `layout` through a model of `simulated_model`, which is used up by that.

    Models of many blocks are run with 3 and with 6 of them: what is alive grows by the same for every block.

    Args:
        fused: the loss is `utils.module.fused_loss`'s own where the head allows it; False for `--padding max_length`.
    """
    _Shared.parts = layout.parts
    install_loss(model, fused=fused and can_fuse(model))
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    totals = [sum(p.numel() for p in parameters), sum(p.numel() for p in trained), max(p.numel() for p in parameters)]
    gradients = sum(parameter.nbytes for parameter in trained)
    name = find_blocks(model)
    blocks = None if name is None else model.get_submodule(name.rstrip("."))
    if blocks is None or len(blocks) <= MANY:
        sizes = _sizes(model, layout)
    else:
        total = len(blocks)
        del blocks[MANY:]
        many = _sizes(model, layout)
        del blocks[FEW:]
        few = _sizes(model, layout)
        sizes = [high + (high - low) * (total - MANY) // (MANY - FEW) for high, low in zip(many, few, strict=True)]
    return Counts(*totals, *sizes[:3], max(sizes[3], gradients), sizes[4])


def _sizes(model: transformers.PreTrainedModel, layout: Layout) -> list[int]:
    """Return [activations, forward, backward, with_gradients, offloaded] of `Counts`."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    activations, forward, with_gradients = _micro_batch(model, layout)
    _Offloaded.total = 0
    hooks = [parameter.register_post_accumulate_grad_hook(_drop_gradient) for parameter in trained]
    _, _, backward = _micro_batch(model, layout)
    for hook in hooks:
        hook.remove()
    for parameter in trained:
        parameter.grad = None
    return [activations, forward, backward, with_gradients, _Offloaded.total]


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _loss(model: transformers.PreTrainedModel, layout: Layout) -> torch.Tensor:
    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.long, device="meta")

    batch = {
        "input_ids": integers(layout.rows, layout.length), "position_ids": integers(layout.rows, layout.length),
        "positions": integers(layout.labels), "targets": integers(layout.labels),
    }  # fmt: skip
    return summed_loss(model, batch)


def _micro_batch(model: transformers.PreTrainedModel, layout: Layout) -> tuple[int, int, int]:
    """Return the bytes alive when the head begins, and the most in the forward and from there to the backward's end."""
    for parameter in model.parameters():
        parameter.grad = None
    counter, seen = _LiveBytes(model), []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda *_: seen.append(counter.live))
    with counter:
        loss = _loss(model, layout)
        forward, counter.peak = counter.peak, counter.live
        loss.backward()
    hook.remove()
    return seen[0], forward, counter.peak
