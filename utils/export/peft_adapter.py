"""Write the trained LoRA weights alone, as an adapter folder that `peft.PeftModel.from_pretrained(base, folder)` loads.

The format is PEFT's (https://huggingface.co/docs/peft/developer_guides/checkpoint): `adapter_config.json` and
`adapter_model.safetensors` with `lora_A` [r, in] and `lora_B` [out, r] for each layer. Writing it needs no peft.
"""

import json
import os

import torch
from torch import nn

from utils.distributed.ranks import is_rank_0
from utils.distributed.zero3 import gather
from utils.export.hf_model import write_folder
from utils.export.owned_files import place_over
from utils.export.weights import write_tensors
from utils.module.lora import LinearLayer_LoRA

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What PEFT puts before a layer's name: its two wrappers around the base model.
PEFT_PREFIX = "base_model.model."


def lora_layers(model: nn.Module) -> dict[str, LinearLayer_LoRA]:
    """Return the LoRA layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LinearLayer_LoRA)}


def target_modules(model: nn.Module) -> list[str]:
    """Return PEFT's `target_modules`: the last parts of the layers' names where only they have them, else whole names.

    PEFT takes every module whose name ends with one of them, so short names will do only if nothing else has them.
    """
    layers = lora_layers(model)
    short = {name.rpartition(".")[2] for name in layers}
    named = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short) if named == set(layers) else list(layers)


def adapter_config(model: nn.Module, base: str) -> dict:
    """Return the content of `adapter_config.json` for the wrapped layers of `model`, trained on the model `base`."""
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    rank, alpha = first.lora_dim, first.lora_scaling * first.lora_dim
    # Back from scaling = alpha / rank: a whole number is one again, as PEFT's own files have it.
    alpha = round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": getattr(first.lora_dropout, "p", 0.0),
        "target_modules": target_modules(model),
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in layers.values()),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the content of `adapter_model.safetensors` on rank 0, nothing elsewhere. A collective under ZeRO 3."""
    tensors = {}
    for name, layer in lora_layers(model).items():
        halves = {"lora_A": layer.lora_right_weight, "lora_B": layer.lora_left_weight}
        with gather(halves.values()):
            if is_rank_0():
                for half, weight in halves.items():
                    whole = weight.detach().t().to("cpu", copy=True).contiguous()
                    tensors[f"{PEFT_PREFIX}{name}.{half}.weight"] = whole
    return tensors


def save_lora_adapter(model: nn.Module, base: str, folder: str) -> None:
    """Write the adapter folder; complete or absent. Every rank must call it.

    Args:
        model: the bare model, with LoRA.
        base: name or path of the model it was trained on; written down for PEFT's `AutoPeftModel`.

    Raises:
        UserError: the files can't be written.
    """

    def write(work: str, is_writer: bool) -> None:
        write_adapter(model, base, work, is_writer)

    write_folder(folder, "the LoRA adapter", ADAPTER_CONFIG, write, place_over)


def write_adapter(model: nn.Module, base: str, folder: str, is_writer: bool) -> None:
    """Write the adapter's two files into `folder`, made if missing. Every rank must call it."""
    tensors = _adapter_tensors(model)
    if is_writer:
        os.makedirs(folder, exist_ok=True)
        write_tensors(tensors, os.path.join(folder, ADAPTER_WEIGHTS))
        with open(os.path.join(folder, ADAPTER_CONFIG), "w", encoding="utf-8") as file:
            json.dump(adapter_config(model, base), file, indent=2)
