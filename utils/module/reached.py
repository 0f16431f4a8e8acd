"""Which linear layers a training step reaches, found by a forward and a backward without memory.

Some layers of a model never train: cross attention without an encoder, an indexer whose choice has no gradient, a
tower for pictures where there are none. Others are read as a weight and never called (Mamba's `dt_proj`), so what LoRA
adds in a forward would be passed over.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

FEW = 8  # tokens; families that go through a row token by token are slow
MANY = 144  # more than DeepSeek-V4 joins in one (128)
NAME = "reaching"


def unreached_modules(model: nn.Module) -> set[str]:
    """Return the names of the Linear and Conv1D layers that are not called with a text, or get no gradient from it.

    Empty where it can't be tried: the model is none of transformers', or does something that needs values.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        return set()
    key = (type(model), model.config.to_json_string())
    if key not in _known:
        _known[key] = _tried(model)
    return _known[key]


_known: dict[tuple[type, str], set[str]] = {}  # a run asks for its one model several times


def _tried(model: transformers.PreTrainedModel) -> set[str]:
    """Try a few tokens, and more of them where these do not reach every layer."""
    try:
        return _unreached(_twin(model), FEW) and _unreached(_twin(model), MANY)
    except Exception:  # whatever a family's code raises without values
        return set()


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *more: Any, **named: Any
) -> tuple[torch.Tensor, None]:
    """Attend to everything, without a mask; making one asks for values."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    output = ((query @ key.transpose(2, 3)).softmax(-1) @ value).transpose(1, 2).contiguous()
    for tensor in (*more, *named.values()):  # a bias, a sink: what is made of layers is used
        if torch.is_tensor(tensor) and tensor.requires_grad:
            output = output + tensor.sum()
    return output, None


def _twin(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Return a model of the same configuration without memory; in bf16, in which joined experts are computed so too."""
    transformers.AttentionInterface.register(NAME, _attention)
    with torch.device("meta"):
        twin = type(model)._from_config(copy.deepcopy(model.config), dtype=torch.bfloat16)
    twin.set_attn_implementation(NAME)
    return twin


def _unreached(twin: transformers.PreTrainedModel, tokens: int) -> set[str]:
    called: set[str] = set()
    layers = {name: module for name, module in twin.named_modules() if isinstance(module, (nn.Linear, Conv1D))}

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.add(name)

    for name, module in layers.items():
        module.register_forward_pre_hook(note(name))
    twin.requires_grad_(True).eval()
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, tokens, tokens, dtype=torch.bfloat16, device="meta")
    # Most families do without a mask here; some cut one, some make one of what they are given.
    for more in ({}, {"attention_mask": mask}, {"attention_mask": ids + 1}):
        with suppress(Exception), torch.enable_grad():
            twin(input_ids=ids, position_ids=ids, use_cache=False, **more).logits.sum().backward()
            return {name for name in layers if name not in called or layers[name].weight.grad is None}
    return set()
