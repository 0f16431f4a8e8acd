"""Estimate the memory a run needs per device, and compare it with what the device has.

Only the model's configuration is loaded: the model is built on the meta device and one micro batch runs through it
without data (`activation_memory.py`); `zero_memory.py` does the arithmetic of ZeRO. A gigabyte is 1e9 bytes.
"""

from argparse import Namespace
from typing import Any, NamedTuple

import torch
from deepspeed.accelerator import get_accelerator

from utils.dry_run.activation_memory import Counts, Layout, count, meta_model
from utils.dry_run.zero_memory import Estimate, Setting, Sizes, estimate, setting_from_config
from utils.machine.device import free_memory, ranks_here
from utils.model.model_utils import load_model_config
from utils.run_config import Gpus

GB = 1e9
PARTS = ("weights", "gradients", "optimizer", "activations", "logits and loss", "buffers")
ROOM = 0.92  # share of a GPU that tensors can have: its context, NCCL and fragmentation take the rest
CHOICES = [(stage, offload) for stage in range(4) for offload in ((False, True) if stage else (False,))]


class Room(NamedTuple):
    """Memory there is."""

    bytes_each: float  # that one rank's tensors can have
    words: str


class Foreseen(NamedTuple):
    """The estimate of a run with what it was made from."""

    estimate: Estimate
    counts: Counts
    setting: Setting
    layout: Layout


def dtype_of(config: dict[str, Any]) -> str:
    """The precision a DeepSpeed configuration says."""
    return next((name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled")), "fp32")


def foresee(args: Namespace, ds_config: dict[str, Any], layout: Layout, ranks: int, entries: int) -> Foreseen:
    """Estimate a run of main.py; `layout` is its largest micro batch, `entries` the tokenizer's size."""
    dtype = dtype_of(ds_config)
    model = meta_model(load_model_config(args.model_name_or_path), args, dtype, entries)
    counts = count(model, layout, args.padding != "max_length")
    setting = setting_from_config(ds_config, ranks, 4 if dtype == "fp32" else 2, layout.on_cpu)
    return Foreseen(estimate(Sizes(*counts), setting), counts, setting, layout)


def device_memory(gpus: Gpus | None, device: torch.device) -> Room:
    """What there is for one rank: on the planned GPUs, on this GPU, or of this machine's free memory."""
    if gpus is not None:
        return Room(ROOM * gpus.gigabytes * GB, f"{gpus.count} GPUs of {gpus.gigabytes:g} GB")
    if device.type != "cpu":
        total = get_accelerator().total_memory()
        return Room(ROOM * total, f"{get_accelerator().device_name()} of {total / GB:.1f} GB")
    return Room(free_memory(), f"this CPU's free memory, for {ranks_here()} rank(s)")


def describe(foreseen: Foreseen, room: Room) -> str:
    """The memory part of a dry run, several lines."""
    guess, counts, setting, layout = foreseen
    fits = "fits" if guess.peak <= room.bytes_each else "DOES NOT FIT"
    when = max(guess.moments, key=guess.moments.get)
    host = f", and {size_words(guess.host)} of CPU memory per rank" if guess.host and not setting.on_cpu else ""
    parts = zip(PARTS, (size_words(size) for size in guess[: len(PARTS)]), strict=True)
    others = []
    for stage, offload in CHOICES:
        peak = estimate(Sizes(*counts), setting._replace(stage=stage, offload=offload, nvme=False)).peak
        others.append(f"{_name(stage, offload)}: {size_words(peak)}{'' if peak <= room.bytes_each else ' (too much)'}")
    return (
        f"Memory per device: {counts.parameters:,} parameters, {counts.trainable:,} of them train; the largest micro "
        f"batch is {layout.rows} x {layout.length} tokens with {layout.labels} labels\n"
        f"  {', '.join(f'{name} {size}' for name, size in parts)} (not all at once)\n"
        f"  most at once {size_words(guess.peak)}, in {when}{host}; {fits}: {size_words(room.bytes_each)} each of "
        f"{room.words}\n"
        f"  by ZeRO stage {', '.join(others)}"
    )


def size_words(size: float) -> str:
    """Bytes in words."""
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / 1e6:.1f} MB"


def _name(stage: int, offload: bool) -> str:
    return f"{stage}{' + offload' if offload else ''}"
