"""The frozen base of QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314): weights in 4 bits by bitsandbytes.

A weight is cut into blocks of 64 numbers, of each of which the nearest of 16 values (NF4) and the block's largest are
kept; these largest ones are themselves kept in 8 bits, in blocks of 256 (double quantization). For a product the weight
is turned back into the dtype of the computation, and so it is for saving.
"""

from importlib.util import find_spec
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from utils.distributed.zero3 import is_quantized, whole_numel
from utils.errors import UserError
from utils.logging.console import chatter_to_log
from utils.module.empty_model import empty_model
from utils.module.nf4 import BITS, BLOCK
from utils.notation import HERE

NF4 = "nf4"


def check_quantization(kind: str | None, stage: int) -> None:
    """Check that bitsandbytes, an optional package, is there, and that the ZeRO stage leaves weights whole.

    Args:
        kind: of `--quantize_base`; None: nothing is needed.

    Raises:
        UserError: one of them is not so.
    """
    if kind is None:
        return
    if find_spec("bitsandbytes") is None:
        raise UserError("--quantize_base: not installed: pip install bitsandbytes")
    if stage == 3:
        raise UserError(
            "--quantize_base can't be used with ZeRO 3 (--zero_stage, or the file of --deepspeed_config): it divides "
            "every weight among the ranks, and one in 4 bits is of no use without its scales, which stay behind. Give "
            "--zero_stage 2: LoRA's weights are few, and the base takes about a quarter of its 16 bits on each device."
        )


class QuantizedLinear(nn.Linear):
    """A frozen Linear layer with a weight in 4 bits."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)  # Linear's own would make a weight
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.quant_state.shape

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return [..., out] for an input [..., in]."""
        return quantized_linear(input, self.weight, self.bias)


def quantized_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `input W^T + bias` for a weight in 4 bits; the input gets a gradient, the weight none."""
    from bitsandbytes import matmul_4bit  # optional, and slow to import

    return matmul_4bit(input, weight, bias=bias, quant_state=weight.quant_state)


def plain_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return the dtype of `plain_weight`."""
    return weight.quant_state.dtype if is_quantized(weight) else weight.dtype


def plain_weight(weight: torch.Tensor) -> torch.Tensor:
    """Return what a weight in 4 bits stands for; any other tensor as it is. No gradient flows through it."""
    if not is_quantized(weight):
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def quantized_names(model: nn.Module, on_cpu: bool = False) -> list[str]:
    """Return the names of the layers that `--quantize_base` turns into 4 bits: transformers' own choice.

    It leaves out the output layer, whatever shares its weight with an embedding, and subclasses of Linear; embeddings
    and norms are no Linear layers. The model is still as it was built.

    Args:
        on_cpu: the weights will be used on a CPU.

    Raises:
        UserError: it has none, as GPT-2, whose Conv1D layers a saved model would hold the wrong way round; or on a CPU,
            some that bitsandbytes (0.50) turns back wrongly there.
    """
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    kinds = {name: type(module) for name, module in model.named_modules() if should_convert_module(name, kept)}
    names = [name for name, kind in kinds.items() if kind is nn.Linear]
    if not names or Conv1D in kinds.values():
        raise UserError(
            f"--quantize_base: the layers of model type {model.config.model_type!r} are not Linear ones, which alone "
            "can be turned into 4 bits here: leave it out."
        )
    uneven = [name for name in names if model.get_submodule(name).in_features % BLOCK]
    if on_cpu and uneven:
        raise UserError(
            f"--quantize_base: {uneven[0]} has {model.get_submodule(uneven[0]).in_features} inputs, no multiple of "
            f"{BLOCK}, and bitsandbytes' CPU code turns such weights back wrongly ({len(uneven)} layers): use a GPU, "
            "or leave it out."
        )
    return names


def check_quantized_model(config: PretrainedConfig, dry_run: str | None) -> None:
    """Check without its weights that the model can be in 4 bits; `dry_run` is that argument, of other GPUs or not.

    Raises:
        UserError: it can't.
    """
    quantized_names(empty_model(config), on_cpu=dry_run in (None, HERE) and get_accelerator().device_name() == "cpu")


def quantized_loading(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments with which `from_pretrained` quantizes to `kind` ("nf4") each weight on its device."""
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": how, "device_map": {"": get_accelerator().current_device_name()}}


def settle_quantized(model: nn.Module) -> nn.Module:
    """Replace bitsandbytes' layers in a loaded model by `QuantizedLinear`; returns the model, one like any other.

    bitsandbytes' own layer packs its weight anew for evaluations on some CPUs, and adds the scales to what a model
    saves. transformers refuses to cast or save a model that it knows to be quantized.
    """
    from bitsandbytes.nn import Linear4bit

    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            model.set_submodule(name, QuantizedLinear(module.weight, module.bias))
            module.weight.module = None  # it would keep the replaced layer alive
    del model.config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit"):
        if name in vars(model):
            delattr(model, name)
    return model


def describe_quantized(model: nn.Module) -> str:
    """Return a line on what is in 4 bits and what is not."""
    packed = [weight for weight in model.parameters() if is_quantized(weight)]
    inside = sum(whole_numel(weight) for weight in packed)
    rest = sum(whole_numel(weight) for weight in model.parameters()) - inside
    return (
        f"{len(packed)} weights ({inside:,} parameters) in NF4, {BITS:.3f} bits each (blocks of {BLOCK}, double "
        f"quantization), computed in {str(packed[0].quant_state.dtype).removeprefix('torch.')}; {rest:,} parameters "
        "(all but the weights of Linear layers; embeddings and output layer) as they are, frozen too"
    )


@chatter_to_log()
@torch.no_grad()
def quantize_layers(model: nn.Module, dtype: torch.dtype, device: str) -> nn.Module:
    """Turn the weights of a model that is in memory into 4 bits, layer by layer, from `dtype`; returns the model."""
    from bitsandbytes.nn import Params4bit

    for name in quantized_names(model, device == "cpu"):
        layer = model.get_submodule(name)
        packed = Params4bit(layer.weight.data.to(dtype), quant_type=NF4, blocksize=BLOCK).to(device)
        model.set_submodule(name, QuantizedLinear(packed, layer.bias).train(layer.training))
    return model
