"""Which layers `--lora_module_name` names, and which of them a text reaches."""

import re
from collections.abc import Collection, Iterable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from utils.distributed.zero3 import whole_numel, whole_shape
from utils.errors import UserError
from utils.module.quantized import QuantizedLinear
from utils.module.reached import unreached_modules

AUTO = "auto"  # the `--lora_module_name` that stands for the linear layers of the transformer blocks


def _wrappable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the Linear and Conv1D layers by name, without a tied head: merging into it would change the embedding.

    A subclass that computes something else, such as Llama 4's router, is left as it is.
    """
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and id(module.weight) not in tied and _is_linear(module)
    }


def _is_linear(module: nn.Module) -> bool:
    """Whether a Linear, or a subclass with a forward of its own, gives one tensor [..., out] for an input [..., in].

    Tried with tensors that have no memory, so the weight may be anywhere.
    """
    if type(module).forward in (nn.Linear.forward, Conv1D.forward, QuantizedLinear.forward):
        return True
    out_features, in_features = whole_shape(module.weight)
    own = dict(module.named_parameters(recurse=False))
    stand_ins = {name: torch.empty(whole_shape(p), dtype=p.dtype, device="meta") for name, p in own.items()}
    inputs = torch.empty(1, 2, in_features, dtype=module.weight.dtype, device="meta")
    try:
        output = torch.func.functional_call(module, stand_ins, (inputs,))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    return torch.is_tensor(output) and output.shape == (1, 2, out_features)


def lora_candidates(model: nn.Module) -> list[str]:
    """Return names that `--lora_module_name` can take: the prefixes of the layers' names up to a block's number."""
    prefixes = set()
    for name in _wrappable_layers(model):
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        prefixes.add(name if number is None else ".".join(parts[:number]) + ".")
    return sorted(prefixes)


def find_blocks(model: nn.Module, left_out: Collection[str] = ()) -> str | None:
    """Return the prefix of the transformer blocks' names: of the ModuleList with the most weights, in any family.

    Only weights that LoRA can wrap count. Returns None where no list holds any.

    Args:
        left_out: layers that do not count.
    """
    layers = {name: layer for name, layer in _wrappable_layers(model).items() if name not in left_out}
    best, most = None, 0
    # A list is visited before those inside it (a block's experts), which can't hold more.
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            inside = [layer.weight for key, layer in layers.items() if key.startswith(name + ".")]
            size = sum(whole_numel(weight) for weight in inside)
            if size > most:
                best, most = name + ".", size
    return best


def check_lora_module_name(model: nn.Module, part_module_name: str) -> list[str]:
    """Return the names of the layers to wrap, in the model's order.

    Args:
        part_module_name: parts of names, separated by commas; a layer whose name contains one is wrapped. `auto`
            stands for the linear layers of the transformer blocks, but those that no text reaches.

    Raises:
        UserError: a part matches no layer (the message lists names that match), or one of several parts is empty.
    """
    layers = _wrappable_layers(model)
    parts = [part.strip() for part in part_module_name.split(",")]
    if len(parts) > 1 and "" in parts:  # an empty part would match every layer
        raise UserError(f"--lora_module_name {part_module_name!r} has an empty part: take the comma away.")
    unreached = set(unreached_layers(model)) if AUTO in parts else set()
    blocks = find_blocks(model, unreached) if AUTO in parts else None
    found: set[str] = set()
    for part in parts:
        if part == AUTO:
            matches = {name for name in layers if blocks and name.startswith(blocks) and name not in unreached}
        else:
            matches = {name for name in layers if part in name}
        if not matches:
            candidates = ", ".join(lora_candidates(model))
            advice = f"it could be one of: {candidates}" if candidates else "it has no layer that LoRA could wrap"
            raise UserError(
                f"--lora_module_name {part!r} matches no Linear or Conv1D layer of {type(model).__name__}; {advice}."
            )
        found |= matches
    return [name for name in layers if name in found]


def unreached_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers that get no gradient from a text; none where that can't be tried."""
    unreached = unreached_modules(model)
    return [name for name in _wrappable_layers(model) if name in unreached]


def short_names(names: Iterable[str]) -> str:
    """Return the names as one text, those of all blocks together."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))


def describe_unreached(model: nn.Module, part_module_name: str) -> str | None:
    """Return a line on layers of the blocks that `auto` leaves out, or that names take in; None where there are none.

    Args:
        model: before its layers are wrapped.
    """
    unreached = unreached_layers(model)
    chosen = set(check_lora_module_name(model, part_module_name))
    if idle := [name for name in unreached if name in chosen]:
        return f"{len(idle)} of the named layers get no gradient from a text and stay as they are ({short_names(idle)})"
    blocks = find_blocks(model, unreached)
    idle = [name for name in unreached if blocks and name.startswith(blocks)]
    if not idle or AUTO not in part_module_name.split(","):
        return None
    return (
        f"{len(idle)} linear layers of the blocks are left out, which get no gradient from a text ({short_names(idle)})"
    )
