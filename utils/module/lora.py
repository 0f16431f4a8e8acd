"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) on Linear layers, by the users' names.

`y = x W^T + b + dropout(x) R L * lora_scaling / r` with `R` [in, r] Kaiming-uniform and `L` [r, out] zeros,
so a wrapped model starts out equal to the base model.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from utils.errors import UserError


class LinearLayer_LoRA(nn.Module):
    """A Linear layer with a frozen weight and a trainable low-rank addition.

    Args:
        weight: [out, in] parameter of the wrapped layer; frozen here.
        lora_dim: rank r, at least 1.
        lora_scaling: the addition is scaled by `lora_scaling / lora_dim`.
        lora_droppout: dropout on the addition's input (the users' spelling).
        bias: [out] parameter of the wrapped layer; stays as trainable as it was.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        lora_dim: int = 0,
        lora_scaling: float = 1,
        lora_droppout: float = 0,
        bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        if lora_dim <= 0:
            raise ValueError(f"lora_dim must be at least 1, not {lora_dim}")
        self.weight = weight
        self.bias = bias
        # Under ZeRO 3 the live tensor is empty and the real shape stands beside it.
        out_features, in_features = getattr(weight, "ds_shape", weight.shape)
        self.lora_right_weight = nn.Parameter(
            torch.empty(in_features, lora_dim, dtype=weight.dtype, device=weight.device)
        )
        self.lora_left_weight = nn.Parameter(
            torch.zeros(lora_dim, out_features, dtype=weight.dtype, device=weight.device)
        )
        self.lora_scaling = lora_scaling / lora_dim
        self.lora_dropout = nn.Dropout(lora_droppout) if lora_droppout > 0 else nn.Identity()
        self.fuse_lora = False
        self.weight.requires_grad = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-uniform right weight, zero left weight."""
        # kaiming_uniform_ reads fan_in from the last dimension; the right weight is stored [in, r].
        nn.init.kaiming_uniform_(self.lora_right_weight.t(), a=math.sqrt(5))
        nn.init.zeros_(self.lora_left_weight)

    def delta_weight(self) -> torch.Tensor:
        """What LoRA adds to the weight: [out, in], float32."""
        product = self.lora_right_weight.detach().float() @ self.lora_left_weight.detach().float()
        return product.t() * self.lora_scaling

    @torch.no_grad()
    def fuse_lora_weight(self) -> None:
        """Add LoRA to the weight in place, once; the forward then skips it. Rounds in the weight's dtype."""
        if not self.fuse_lora:
            self.weight.data.copy_(self.weight.float() + self.delta_weight())
            self.fuse_lora = True

    @torch.no_grad()
    def unfuse_lora_weight(self) -> None:
        """Take LoRA out of the weight again: exact up to the rounding of the weight's dtype."""
        if self.fuse_lora:
            self.weight.data.copy_(self.weight.float() - self.delta_weight())
            self.fuse_lora = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        output = F.linear(input, self.weight, self.bias)
        if self.fuse_lora:
            return output
        return output + (self.lora_dropout(input) @ self.lora_right_weight @ self.lora_left_weight) * self.lora_scaling


def _wrappable_linears(model: nn.Module) -> list[str]:
    """Names of the Linear layers with a weight of their own: merging into a tied head would change the embedding."""
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in tied
    ]


def lora_candidates(model: nn.Module) -> list[str]:
    """Names a `--lora_module_name` can take: the prefixes under which Linear layers stand in numbered blocks."""
    prefixes = set()
    for name in _wrappable_linears(model):
        parts = name.split(".")
        cut = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        prefixes.add(name if cut is None else ".".join(parts[:cut]) + ".")
    return sorted(prefixes)


def check_lora_module_name(model: nn.Module, part_module_name: str) -> list[str]:
    """The Linear layers whose name contains `part_module_name`; UserError with the candidates if none does."""
    names = [name for name in _wrappable_linears(model) if part_module_name in name]
    if names:
        return names
    candidates = lora_candidates(model)
    if candidates:
        advice = f"it could be one of: {', '.join(candidates)}"
    elif any(type(module).__name__ == "Conv1D" for module in model.modules()):
        advice = (
            "its blocks are made of Conv1D, as GPT-2's are, which LoRA does not wrap here: train without --lora_dim"
        )
    else:
        advice = "it has no torch.nn.Linear layer that LoRA could wrap"
    raise UserError(
        f"--lora_module_name {part_module_name!r} matches no Linear layer of {type(model).__name__}; {advice}."
    )


def convert_linear_layer_to_lora(
    model: nn.Module,
    part_module_name: str,
    lora_dim: int = 0,
    lora_scaling: float = 1,
    lora_droppout: float = 0,
) -> nn.Module:
    """Wrap every Linear whose name contains `part_module_name`; returns the model.

    Raises:
        UserError: no layer matches (the message lists what could).
    """
    if lora_dim <= 0:
        return model
    for name in check_lora_module_name(model, part_module_name):
        linear = model.get_submodule(name)
        wrapped = LinearLayer_LoRA(linear.weight, lora_dim, lora_scaling, lora_droppout, linear.bias)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, wrapped.train(linear.training))
    return model


def convert_lora_to_linear_layer(model: nn.Module) -> nn.Module:
    """Fuse every LoRA layer into a plain Linear again; returns the model.

    Under ZeRO 3 every rank must call it: weights are gathered, changed on rank 0 and partitioned again.
    Saving does not need it (`utils.saving` merges on the way out and leaves the live weights alone).
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, LinearLayer_LoRA):
            continue
        parameters = [module.weight, module.lora_right_weight, module.lora_left_weight]
        if any(hasattr(parameter, "ds_id") for parameter in parameters):
            import deepspeed  # only where ZeRO 3 already runs

            with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
                module.fuse_lora_weight()
        else:
            module.fuse_lora_weight()
        linear = nn.Linear(1, 1, bias=module.bias is not None, device="meta")
        linear.out_features, linear.in_features = getattr(module.weight, "ds_shape", module.weight.shape)
        linear.weight, linear.bias = module.weight, module.bias
        linear.weight.requires_grad = True
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear.train(module.training))
    return model


def only_optimize_lora_parameters(model: nn.Module, force_optimize_params: tuple[str, ...] = ()) -> nn.Module:
    """Freeze everything but the LoRA weights (and parameters named in `force_optimize_params`)."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = (
            "lora_right_weight" in name or "lora_left_weight" in name or name in force_optimize_params
        )
    return model


def make_model_gradient_checkpointing_compatible(model: nn.Module) -> nn.Module:
    """Let gradients reach checkpointed blocks although the embeddings before them are frozen."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    elif hasattr(model, "get_input_embeddings"):
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    return model
