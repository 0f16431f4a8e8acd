"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) on Linear and Conv1D layers.

`y = x W^T + b + dropout(x) R L * lora_scaling / r` with `R` [in, r] uniform within +-1/sqrt(r) and `L` [r, out]
zeros, so a wrapped model starts out equal to the base model. GPT-2's Conv1D is a Linear whose weight is transposed.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from utils.distributed.zero3 import gather, is_quantized, whole_shape
from utils.distributed.zero3 import params_to_fetch as _z3_params_to_fetch  # noqa: F401  (scripts import it from here)
from utils.module.lora_names import check_lora_module_name, short_names
from utils.module.quantized import plain_weight, quantized_linear


class LinearLayer_LoRA(nn.Module):
    """A Linear layer with a frozen weight and a trainable low-rank addition.

    Args:
        weight: [out, in] parameter of the wrapped layer ([in, out] with `fan_in_fan_out`); frozen here.
        lora_dim: rank r, at least 1.
        lora_scaling: the addition is scaled by `lora_scaling / lora_dim`.
        lora_droppout: dropout on the addition's input (the users' spelling).
        bias: [out] parameter of the wrapped layer; stays as trainable as it was.
        fan_in_fan_out: the weight is a Conv1D's, stored [in, out] (PEFT's name for it).
        rank_stabilized: the addition is scaled by `lora_scaling / sqrt(lora_dim)` (rsLoRA, Kalajdzievski 2023,
            https://arxiv.org/abs/2312.03732), so that a larger rank learns no slower.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        lora_dim: int = 0,
        lora_scaling: float = 1,
        lora_droppout: float = 0,
        bias: nn.Parameter | None = None,
        fan_in_fan_out: bool = False,
        rank_stabilized: bool = False,
    ) -> None:
        super().__init__()
        if lora_dim <= 0:
            raise ValueError(f"lora_dim must be at least 1, not {lora_dim}")
        self.lora_dim = lora_dim
        self.weight = weight
        self.bias = bias
        out_features, in_features = whole_shape(weight)
        if fan_in_fan_out:
            out_features, in_features = in_features, out_features
        self.fan_in_fan_out = fan_in_fan_out
        form = {"dtype": torch.float32 if is_quantized(weight) else weight.dtype, "device": weight.device}
        self.lora_right_weight = nn.Parameter(torch.empty(in_features, lora_dim, **form))
        self.lora_left_weight = nn.Parameter(torch.zeros(lora_dim, out_features, **form))
        self.rank_stabilized = rank_stabilized
        self.lora_scaling = lora_scaling / (math.sqrt(lora_dim) if rank_stabilized else lora_dim)
        self.lora_dropout = nn.Dropout(lora_droppout) if lora_droppout > 0 else nn.Identity()
        self.fuse_lora = False
        self.weight.requires_grad = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the right weight Kaiming-uniform as it is stored, and set the left weight to zero.

        kaiming_uniform_ reads fan_in from the last dimension, here r: DeepSpeed-Chat's range, U(-1/sqrt(r), 1/sqrt(r)).
        PEFT's, from the transpose, is U(-1/sqrt(in), 1/sqrt(in)).
        """
        nn.init.kaiming_uniform_(self.lora_right_weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_left_weight)

    def delta_weight(self) -> torch.Tensor:
        """Return what LoRA adds to the weight: float32, of the weight's shape."""
        product = self.lora_right_weight.detach().float() @ self.lora_left_weight.detach().float()
        return (product if self.fan_in_fan_out else product.t()) * self.lora_scaling

    @torch.no_grad()
    def fuse_lora_weight(self) -> None:
        """Add LoRA to the weight in place, rounded in the weight's dtype; the forward then skips it.

        A weight in 4 bits becomes a plain one first. A second call changes nothing.
        """
        if not self.fuse_lora:
            if is_quantized(self.weight):
                self.weight = nn.Parameter(plain_weight(self.weight), requires_grad=False)
            self.weight.data.copy_(self.weight.float() + self.delta_weight())
            self.fuse_lora = True

    @torch.no_grad()
    def unfuse_lora_weight(self) -> None:
        """Subtract LoRA from the weight again: exact up to the rounding of the weight's dtype."""
        if self.fuse_lora:
            self.weight.data.copy_(self.weight.float() - self.delta_weight())
            self.fuse_lora = False

    def _base(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the wrapped layer's output [rows, out] for an input [rows, in], without LoRA."""
        if is_quantized(self.weight):
            return quantized_linear(flat, self.weight, self.bias)
        if not self.fan_in_fan_out:
            return F.linear(flat, self.weight, self.bias)
        # The operations of Conv1D itself, so that a layer whose LoRA adds nothing gives the same bits.
        return flat @ self.weight if self.bias is None else torch.addmm(self.bias, flat, self.weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return [..., out] for an input [..., in].

        The addition is one matrix product into the base's output: no pass over [..., out] for the scaling and the
        sum, nor for their gradients, and one rounding where there were three.
        """
        flat = input.reshape(-1, input.shape[-1])  # the product must not go into a view, which autograd would copy
        output = self._base(flat)
        if not self.fuse_lora:
            low_rank = self.lora_dropout(flat) @ self.lora_right_weight
            # Under autocast the weight has another dtype than the products, and `addmm` alone converts it.
            add = torch.Tensor.addmm_ if output.dtype == self.lora_left_weight.dtype else torch.addmm
            output = add(output, low_rank, self.lora_left_weight, alpha=self.lora_scaling)
        return output.view(*input.shape[:-1], -1)


def convert_linear_layer_to_lora(
    model: nn.Module,
    part_module_name: str,
    lora_dim: int = 0,
    lora_scaling: float = 1,
    lora_droppout: float = 0,
    rank_stabilized: bool = False,
) -> nn.Module:
    """Wrap every Linear and Conv1D that `part_module_name` names (see `check_lora_module_name`); return the model.

    Raises:
        UserError: a part of the name matches no layer (the message lists names that match).
    """
    if lora_dim <= 0:
        return model
    for name in check_lora_module_name(model, part_module_name):
        linear = model.get_submodule(name)
        wrapped = LinearLayer_LoRA(
            linear.weight, lora_dim, lora_scaling, lora_droppout, linear.bias, isinstance(linear, Conv1D),
            rank_stabilized,
        )  # fmt: skip
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, wrapped.train(linear.training))
    return model


def convert_lora_to_linear_layer(model: nn.Module) -> nn.Module:
    """Replace every LoRA layer by a plain Linear or Conv1D with LoRA added to its weight; return the model.

    Under ZeRO 3 every rank must call this: weights are gathered, changed on rank 0 and partitioned again. Saving does
    not need it: `utils.export.hf_model` merges a copy and leaves the model's weights unchanged.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, LinearLayer_LoRA):
            continue
        with gather([module.weight, module.lora_right_weight, module.lora_left_weight], modifier_rank=0):
            module.fuse_lora_weight()
        linear = _plain_layer(module)
        linear.weight, linear.bias = module.weight, module.bias
        linear.weight.requires_grad = True
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear.train(module.training))
    return model


def _plain_layer(module: LinearLayer_LoRA) -> nn.Module:
    """Return a layer of the wrapped layer's kind and sizes, still without its weight and bias."""
    sizes = whole_shape(module.weight)
    if module.fan_in_fan_out:
        layer: nn.Module = Conv1D(1, 1)
        layer.nx, layer.nf = sizes
    else:
        layer = nn.Linear(1, 1, bias=module.bias is not None, device="meta")
        layer.out_features, layer.in_features = sizes
    return layer


def describe_lora(model: nn.Module) -> str:
    """Return a line that names the wrapped layers, their rank and their scaling."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LinearLayer_LoRA)}
    first = next(iter(layers.values()))
    return (
        f"{len(layers)} layers wrapped ({short_names(layers)}), rank {first.lora_dim}, scaling {first.lora_scaling:.4g}"
    )


def only_optimize_lora_parameters(model: nn.Module, force_optimize_params: tuple[str, ...] = ()) -> nn.Module:
    """Freeze all parameters but LoRA's and those named in `force_optimize_params`; return the model."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = (
            "lora_right_weight" in name or "lora_left_weight" in name or name in force_optimize_params
        )
    return model


def make_model_gradient_checkpointing_compatible(model: nn.Module) -> nn.Module:
    """Make the embeddings' output require gradients, which checkpointed blocks need although embeddings are frozen.

    Returns the model.
    """
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    elif hasattr(model, "get_input_embeddings"):
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    return model
