"""Compare the merged weights of a saved model with what the trained layers compute, one group of weights at a time.

A forward of the whole saved model shows the arithmetic of merging too, and needs the model in memory once more. This
needs one layer: its own forward, given one unit vector after the other, is the matrix that it stands for.
"""

import math
import os
from types import SimpleNamespace

import torch
from safetensors import safe_open

from utils.distributed.ranks import is_rank_0
from utils.distributed.zero3 import gather
from utils.errors import UserError
from utils.export.published import Group, SavedTensor, convert, published_groups
from utils.export.weights import WrittenTensor
from utils.module.lora import LinearLayer_LoRA
from utils.module.quantized import plain_weight

UNITS = 64  # unit vectors at once


def compare_merged(model: torch.nn.Module, folder: str, written: dict[str, WrittenTensor]) -> int:
    """Compare every merged weight in the files with its layer's own forward; return the number of layers.

    Every rank must call it: under ZeRO 3 it gathers. The forwards run on the device that trained.

    Args:
        model: the bare model, with LoRA.
        written: what was written, by name; empty on ranks that wrote nothing, which compare nothing.

    Raises:
        UserError: a weight is another than rounding explains.
    """
    layers, wrong = 0, []
    for group in published_groups(model):
        if not any(entry.lora for entry in group.sources):
            continue
        live = [_computed(entry) for entry in group.sources]
        layers += sum(entry.lora is not None for entry in group.sources)
        if is_rank_0():
            wrong += _differences(model, group, live, folder, written)
    if wrong:  # not sooner: the other ranks would wait for this one
        raise UserError(
            f"the model saved in {folder} is not the trained one: {len(wrong)} merged weights are not what the layers "
            f"with LoRA compute ({', '.join(wrong[:3])}). The folder was left for inspection; don't use it."
        )
    return layers


def _differences(
    model: torch.nn.Module, group: Group, live: list[torch.Tensor], folder: str, written: dict[str, WrittenTensor]
) -> list[str]:
    """Return the names of the published tensors of a group that are others in the files, and by how much."""
    wrong = []
    for name, expected in convert(model, group, live).items():
        with safe_open(os.path.join(folder, written[name].file), framework="pt") as stored:
            saved = stored.get_tensor(name).to(expected.device)
        size = expected.abs()
        rounding = torch.finfo(saved.dtype).eps
        if torch.backends.cuda.matmul.allow_tf32:  # --tf32: LoRA's product was computed with 10 bits
            rounding = max(rounding, 2**-9)
        excess = (saved.float() - expected).abs() - rounding * size - 1e-6 * size.max()
        if not excess.max() <= 0:
            share = ((saved.float() - expected).abs().max() / size.max()).item()
            wrong.append(f"{name} by {share:.1e} of its largest" if math.isfinite(share) else f"{name} is no number")
    return wrong


def _computed(entry: SavedTensor) -> torch.Tensor | None:
    """Return the float32 matrix that a layer stands for, or a plain tensor; None but on rank 0.

    A collective under ZeRO 3.
    """
    layer = entry.lora
    halves = [] if layer is None else [layer.lora_right_weight, layer.lora_left_weight]
    with gather([entry.source, *halves]):
        if not is_rank_0():
            return None
        weight = plain_weight(entry.source).detach()
        if layer is None:
            return weight.float()
        inputs = range(len(layer.lora_right_weight))
        rows = [_forward_of_units(layer, weight, inputs[first : first + UNITS]) for first in inputs[::UNITS]]
        matrix = torch.cat(rows)
        return matrix if layer.fan_in_fan_out else matrix.t().contiguous()


@torch.no_grad()
def _forward_of_units(layer: LinearLayer_LoRA, weight: torch.Tensor, units: range) -> torch.Tensor:
    """Return the layer's output [units, out] for unit vectors of these inputs, without its bias and dropout.

    Of the weights only the parts that such vectors reach are there.
    """
    part = slice(units.start, units.stop)
    exact = torch.float32 if weight.device.type == "cpu" else torch.float64  # on a GPU float32 may be TF32
    holder = SimpleNamespace(
        weight=(weight[part] if layer.fan_in_fan_out else weight[:, part]).to(exact),
        bias=None,
        lora_right_weight=layer.lora_right_weight.detach()[part].to(exact),
        lora_left_weight=layer.lora_left_weight.detach().to(exact),
        lora_scaling=layer.lora_scaling,
        lora_dropout=torch.nn.Identity(),
        fan_in_fan_out=layer.fan_in_fan_out,
        fuse_lora=layer.fuse_lora,
    )
    holder._base = lambda flat: LinearLayer_LoRA._base(holder, flat)
    identity = torch.eye(len(units), dtype=exact, device=weight.device)
    return LinearLayer_LoRA.forward(holder, identity).float()
