"""Write the trained LoRA weights alone, as an adapter folder that `peft.PeftModel.from_pretrained(base, folder)` loads.

The format is PEFT's (https://huggingface.co/docs/peft/developer_guides/checkpoint): `adapter_config.json` and
`adapter_model.safetensors` with `lora_A` [r, in] and `lora_B` [out, r] for each layer. Writing it needs no peft.
"""

import json
import math
import os

import torch
from torch import nn

from utils.distributed.ranks import is_rank_0
from utils.distributed.zero3 import gather, whole_shape
from utils.errors import UserError
from utils.export.hf_model import write_folder
from utils.export.owned_files import place_over
from utils.export.weights import write_tensors
from utils.module.lora import LinearLayer_LoRA

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What PEFT puts before a layer's name: its two wrappers around the base model.
PEFT_PREFIX = "base_model.model."
# Names that PEFT gives a meaning of its own (peft/utils/transformers_weight_conversion.py, tuners/tuners_utils.py).
EXPERT_NAMES = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
CONVERTED_TYPES = ("beam",)  # may have dense layers alone, and their names are taken for experts' all the same
MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
MAMBA_NAMES = ("out_proj", "conv1d")


def lora_layers(model: nn.Module) -> dict[str, LinearLayer_LoRA]:
    """Return the LoRA layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LinearLayer_LoRA)}


def target_modules(model: nn.Module) -> list[str]:
    """Return PEFT's `target_modules`: the last parts of the layers' names where only they have them, else whole names.

    PEFT takes every module whose name ends with one of them, so short names will do only if nothing else has them.
    Layers of `target_parameters` are left out.
    """
    by_weight = set(target_parameters(model))
    layers = [name for name in lora_layers(model) if f"{name}.weight" not in by_weight]
    short = {name.rpartition(".")[2] for name in layers}
    named = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short) if named == set(layers) else layers


def target_parameters(model: nn.Module) -> list[str]:
    """Return PEFT's `target_parameters`: weights of layers whose names, as modules, PEFT would read as something else.

    In a mixture of experts whose weights lie in one tensor, PEFT (0.21) takes `gate_proj` and its like for these, also
    where a dense layer or the shared expert has the name. A weight's whole name has one meaning.
    """
    fused = any(len(whole_shape(p)) == 3 and "expert" in name for name, p in model.named_parameters())
    if not fused and getattr(model.config, "model_type", None) not in CONVERTED_TYPES:
        return []
    return [f"{name}.weight" for name in lora_layers(model) if name.rpartition(".")[2] in EXPERT_NAMES]


def check_adapter(model: nn.Module) -> None:
    """Check that PEFT can wrap the layers of `model` that LoRA wraps.

    Raises:
        UserError: it refuses some of them.
    """
    refused = [name for name in lora_layers(model) if name.rpartition(".")[2] in MAMBA_NAMES]
    if refused and getattr(model.config, "model_type", None) in MAMBA_TYPES:
        others = sorted({name.rpartition(".")[2] for name in lora_layers(model)} - set(MAMBA_NAMES))
        raise UserError(
            f"--save_lora_adapter: PEFT wraps no {' or '.join(MAMBA_NAMES)} of a {model.config.model_type} model, and "
            f"--lora_module_name takes in {len(refused)} of them: name others, such as {','.join(others) or 'in_proj'}."
        )
    moved = renamed_layers(model)
    if moved:
        others = sorted({name.rpartition(".")[2] for name in lora_layers(model) if name not in moved})
        raise UserError(
            f"--save_lora_adapter: PEFT would read {len(moved)} layers of a {model.config.model_type} model by another "
            f"name ({moved[0]}), and --lora_module_name takes them in: name others, such as {','.join(others[:4])}."
        )


def renamed_layers(model: nn.Module) -> list[str]:
    """Return the layers whose names PEFT changes while it reads an adapter, as transformers those of old checkpoints.

    Such rules are for older names, but some fit a new one as well: Laguna's reads `shared_experts` as `shared_expert`
    and one more letter. What is renamed finds no layer.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    except (ImportError, AttributeError, TypeError):  # a version without such rules
        return []
    weights = {name: f"{name}.weight" for name in lora_layers(model)}
    return [name for name, weight in weights.items() if rename_source_key(weight, rules, [])[0] != weight]


def adapter_config(model: nn.Module, base: str) -> dict:
    """Return the content of `adapter_config.json` for the wrapped layers of `model`, trained on the model `base`."""
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    rank = first.lora_dim
    alpha = first.lora_scaling * (math.sqrt(rank) if first.rank_stabilized else rank)
    # Back from scaling = alpha / rank, or its root: a whole number is one again, as PEFT's own files have it.
    alpha = round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha
    by_weight = target_parameters(model)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": first.rank_stabilized,
        # A matter of training alone; PEFT has none for weights named one by one.
        "lora_dropout": 0.0 if by_weight else getattr(first.lora_dropout, "p", 0.0),
        "target_modules": target_modules(model),
        **({"target_parameters": by_weight} if by_weight else {}),
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in layers.values()),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
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
