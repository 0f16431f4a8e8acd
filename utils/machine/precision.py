"""The precision a run computes in, chosen from `--dtype` and from what the device has in hardware."""

import torch
from deepspeed.accelerator import get_accelerator

from utils.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_dtype(requested: str) -> tuple[str, str]:
    """Return (dtype, reason) for `--dtype`; `auto` takes bf16 where the device has it, then fp16 on a GPU, then fp32.

    Raises:
        UserError: the device can't train in the requested dtype.
    """
    accelerator = get_accelerator()
    name = accelerator.device_name()
    bf16 = _has_bf16()
    if requested == "bf16" and name == "cpu" and not bf16:
        return "bf16", "as asked, but this CPU has no bf16 instructions: fp32 is many times faster here"
    if requested == "auto":
        if bf16:
            return "bf16", f"{name} has it"
        if name != "cpu" and accelerator.is_fp16_supported():
            return "fp16", f"{name} has no bf16"
        return "fp32", f"{name} has neither bf16 nor fp16"
    if requested == "fp16" and (name == "cpu" or not accelerator.is_fp16_supported()):
        raise UserError(f"--dtype fp16 can't be trained on {name}: use --dtype bf16 (or fp32).")
    if requested == "bf16" and not bf16:
        raise UserError(f"--dtype bf16 can't be trained on this {name}: use --dtype fp16 (or fp32).")
    return requested, "as asked"


def planned_dtype(requested: str) -> tuple[str, str]:
    """Return (dtype, reason) for a plan of GPUs that are not in this machine, which can't be asked."""
    return ("bf16", "taken to be what the planned GPUs have") if requested == "auto" else (requested, "as asked")


def cpu_has_bf16() -> bool:
    """Return whether this machine's processor multiplies bf16 by instructions of its own.

    oneDNN, asked by torch, also accepts x86 processors that have AVX-512 without them, where a bf16 product takes
    several times as long as one in float32.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    if not torch.cpu._is_avx512_supported():  # ARM, or an x86 processor that oneDNN knows to have AVX2's form of bf16
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _has_bf16() -> bool:
    """Return whether the device has bf16 in hardware; torch's own test also accepts devices that emulate it slowly."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return cpu_has_bf16()
    module = torch.get_device_module(accelerator.device_name())
    probe = getattr(module, "is_bf16_supported", None)
    if probe is not None:
        try:
            return probe(including_emulation=False)
        except TypeError:
            return probe()
    return accelerator.is_bf16_supported()
