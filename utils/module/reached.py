"""Which linear layers a training step reaches, found by a forward and a backward without memory.

Some layers of a model never train: cross attention without an encoder, an indexer whose choice has no gradient, a
tower for pictures where there are none. Others are read as a weight and never called (Mamba's `dt_proj`), so what LoRA
adds in a forward would be passed over.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import transformers
from torch import nn

TOKENS = 8


def reached_layers(model: nn.Module) -> set[str] | None:
    """Return the names of the Linear and Conv1D layers that are called and get a gradient from a text.

    None where it can't be tried: the model is none of transformers', or does something that needs values.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        return None
    try:
        with torch.device("meta"):
            twin = type(model)(copy.deepcopy(model.config))
        return _reached(twin)
    except Exception:  # whatever a family's code raises without values; the layers are then all taken
        return None


def _reached(twin: transformers.PreTrainedModel) -> set[str]:
    called: set[str] = set()
    layers = {name: module for name, module in twin.named_modules() if hasattr(module, "weight")}

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.add(name)

    for name, module in layers.items():
        module.register_forward_pre_hook(note(name))
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    with torch.enable_grad():
        twin.requires_grad_(True)
        twin.eval()(input_ids=ids, use_cache=False).logits.sum().backward()
    return {name for name in called if layers[name].weight.grad is not None}
