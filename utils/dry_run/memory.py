"""Estimate the memory a run needs per device, and compare it with what the device has.

Only the model's configuration is loaded: the model is built on the meta device and one micro batch runs through it
without data (`activation_memory.py`); `zero_memory.py` does the arithmetic of ZeRO. A gigabyte is 1e9 bytes.
"""

from typing import Any, NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from transformers import PretrainedConfig

from utils.dry_run.activation_memory import Counts, Layout, count, simulated_model
from utils.dry_run.zero_memory import Estimate, Setting, Sizes, estimate, setting_from_config
from utils.machine.device import free_memory, ranks_here
from utils.model.build import ModelForm, create_meta_model
from utils.model.model_utils import load_model_config
from utils.module.quantized import quantized_names
from utils.notation import Gpus
from utils.run_config import enabled_precision

GB = 1e9
PARTS = ("weights", "gradients", "optimizer", "activations", "logits and loss", "buffers")
USABLE = 0.92  # share of a GPU that tensors can have: its context, NCCL and fragmentation take the rest
CHOICES = [(stage, offload) for stage in range(4) for offload in ((False, True) if stage else (False,))]


class MemoryBudget(NamedTuple):
    """The memory that one rank's tensors can have."""

    bytes_each: float
    device: str  # in words


class MemoryEstimate(NamedTuple):
    """The estimate of a run and what it was made from."""

    total: Estimate
    counts: Counts
    setting: Setting
    layout: Layout


def estimate_memory(
    model_name_or_path: str,
    form: ModelForm,
    ds_config: dict[str, Any],
    layout: Layout,
    entries: int,
    ranks: int = 1,
    fused: bool = True,
) -> MemoryEstimate:
    """Estimate the memory of a run of main.py per device.

    Args:
        layout: the run's largest micro batch.
        entries: of the tokenizer, for which the embeddings may grow.
        fused: whether the loss may be the fused one, as everywhere but with `--padding max_length`.
    """
    dtype = enabled_precision(ds_config)
    config = load_model_config(model_name_or_path)
    packed = quantized_counts(config, form)
    counts = count(simulated_model(config, form, dtype, entries), layout, fused)._replace(**packed)
    setting = setting_from_config(ds_config, ranks, 4 if dtype == "fp32" else 2, layout.on_cpu)
    return MemoryEstimate(estimate(Sizes(*counts), setting), counts, setting, layout)


def quantized_counts(config: PretrainedConfig, form: ModelForm) -> dict[str, int]:
    """Return what `Counts` holds of the weights that `--quantize_base` turns into 4 bits."""
    if form.quantize_base is None:
        return {}
    model = create_meta_model(config, ModelForm(dropout=form.dropout), "fp32")
    sizes = [model.get_submodule(name).weight.numel() for name in quantized_names(model)]
    return {"quantized": sum(sizes), "largest_quantized": max(sizes)}


def memory_budget(gpus: Gpus | None, device: torch.device) -> MemoryBudget:
    """Return what one rank has: of the planned GPUs, of this GPU, or of this machine's free memory."""
    if gpus is not None:
        return MemoryBudget(USABLE * gpus.gigabytes * GB, f"{gpus.count} GPUs of {gpus.gigabytes:g} GB")
    if device.type != "cpu":
        total = get_accelerator().total_memory()
        return MemoryBudget(USABLE * total, f"{get_accelerator().device_name()} of {total / GB:.1f} GB")
    return MemoryBudget(free_memory(), f"this CPU's free memory, for {ranks_here()} rank(s)")


def describe(memory: MemoryEstimate, budget: MemoryBudget) -> str:
    """Return the memory part of a dry run, several lines."""
    total, counts, setting, layout = memory
    fits = "fits" if total.peak <= budget.bytes_each else "DOES NOT FIT"
    when = max(total.moments, key=total.moments.get)
    host = f", and {size_words(total.host)} of CPU memory per rank" if total.host and not setting.on_cpu else ""
    parts = zip(PARTS, (size_words(size) for size in total[: len(PARTS)]), strict=True)
    others = []
    for stage, offload in stage_choices(counts.quantized > 0):
        peak = estimate(Sizes(*counts), setting._replace(stage=stage, offload=offload, nvme=False)).peak
        others.append(
            f"{stage_name(stage, offload)}: {size_words(peak)}{'' if peak <= budget.bytes_each else ' (too much)'}"
        )
    return (
        f"Memory per device: {counts.parameters:,} parameters, {counts.trainable:,} of them train; the largest micro "
        f"batch is {layout.rows} x {layout.length} tokens with {layout.labels} labels\n"
        f"  {', '.join(f'{name} {size}' for name, size in parts)} (not all at once)\n"
        f"  most at once {size_words(total.peak)}, in {when}{host}; {fits}: {size_words(budget.bytes_each)} each of "
        f"{budget.device}\n"
        f"  by ZeRO stage {', '.join(others)}"
    )


def stage_choices(quantized: bool) -> list[tuple[int, bool]]:
    """Return the pairs of ZeRO stage and offload there are; weights in 4 bits can't be divided, as stage 3 does."""
    return [choice for choice in CHOICES if choice[0] < 3 or not quantized]


def size_words(size: float) -> str:
    """Return a number of bytes with its unit."""
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / 1e6:.1f} MB"


def stage_name(stage: int, offload: bool) -> str:
    """Return a ZeRO stage, with its offload, for a table."""
    return f"{stage}{' + offload' if offload else ''}"
