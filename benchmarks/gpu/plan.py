"""The list of checks that the GPU check (`check.py`) runs, in order: the most important come first."""

from collections.abc import Callable
from functools import partial

from benchmarks.gpu.cases import (
    LORA,
    REFERENCE,
    Context,
    curve,
    kernels,
    lora,
    memory,
    overflow,
    reference,
    resume,
    speed,
)
from benchmarks.gpu.processes import Outcome

Check = Callable[[Context], Outcome]


def all_checks(device: str) -> dict[str, Check]:
    """Return every check by its name, in the order they run."""
    zero = {f"bf16, ZeRO {stage}": partial(curve, dtype="bf16", flags=["--zero_stage", stage]) for stage in (1, 2, 3)}
    offload = {
        f"bf16, ZeRO {stage}, offload": partial(
            curve, dtype="bf16", flags=["--zero_stage", stage, "--offload"], optimizer="DeepSpeedCPUAdam"
        )
        for stage in (1, 2, 3)
    }
    checks: dict[str, Check] = {
        REFERENCE: reference,
        "bf16, ZeRO 0": partial(curve, dtype="bf16"),
        "fp16, ZeRO 0": partial(curve, dtype="fp16"),
        "attention kernels, bf16": partial(kernels, what="attention", dtype="bf16"),
        "attention kernels, fp16": partial(kernels, what="attention", dtype="fp16"),
        "attention, fp32": partial(kernels, what="attention", dtype="fp32"),
        "fused loss, bf16": partial(kernels, what="loss", dtype="bf16"),
        "fused loss, fp16": partial(kernels, what="loss", dtype="fp16"),
        "fused loss, fp32": partial(kernels, what="loss", dtype="fp32"),
        "fp16, injected overflow": overflow,
        **zero,
        "fp32, ZeRO 0": partial(curve, dtype="fp32"),
        "fp16, ZeRO 2": partial(curve, dtype="fp16", flags=["--zero_stage", 2]),
        "bf16, gradient checkpointing": partial(curve, dtype="bf16", flags=["--gradient_checkpointing"]),
        "LoRA: merged, saved, verified": lora,
        "LoRA, ZeRO 3": partial(lora, flags=["--zero_stage", 3]),
        "checkpoint and resume, ZeRO 0": resume,
        "checkpoint and resume, ZeRO 3": partial(resume, flags=["--zero_stage", 3]),
        **offload,
    }
    return {**checks, **(tiny_speeds() if device == "cpu" else speeds())}


def speeds() -> dict[str, Check]:
    """Return the checks of speed and memory: speed of 1.3b, memory against its estimate, then speed by size."""
    found: dict[str, Check] = {
        "speed 1.3b, full": partial(speed, shape="1.3b", micro=16),
        "speed 1.3b, LoRA": partial(speed, shape="1.3b", micro=16, flags=LORA),
        "speed 1.3b, full, longest": partial(speed, shape="1.3b", micro=16, flags=["--padding", "longest"]),
        "speed 1.3b, full, max_length": partial(speed, shape="1.3b", micro=16, flags=["--padding", "max_length"]),
        "speed 1.3b, full, checkpointing": partial(speed, shape="1.3b", micro=16, flags=["--gradient_checkpointing"]),
    }
    settings = {
        "350m, ZeRO 0": ("350m", 8, []), "350m, ZeRO 1": ("350m", 8, ["--zero_stage", 1]),
        "350m, ZeRO 2": ("350m", 8, ["--zero_stage", 2]), "350m, ZeRO 3": ("350m", 8, ["--zero_stage", 3]),
        "1.3b, ZeRO 3": ("1.3b", 8, ["--zero_stage", 3]), "1.3b, LoRA": ("1.3b", 32, LORA),
        "1.3b, ZeRO 2, offload": ("1.3b", 8, ["--zero_stage", 2, "--offload"]),
        "1.3b, ZeRO 3, offload": ("1.3b", 8, ["--zero_stage", 3, "--offload"]),
        "125m, 64 samples": ("125m", 64, []), "125m, 64 samples, max_length": ("125m", 64, ["--padding", "max_length"]),
    }  # fmt: skip
    found |= {
        f"memory {name}": partial(memory, shape=shape, micro=micro, flags=flags)
        for name, (shape, micro, flags) in settings.items()
    }
    for shape, micro in (("125m", 16), ("350m", 16), ("2.7b", 16), ("6.7b", 8), ("13b", 8)):
        found[f"speed {shape}, LoRA"] = partial(speed, shape=shape, micro=micro, flags=LORA)
        # On one GPU too ZeRO 2 takes less memory than ZeRO 0, which holds the float32 gradients twice.
        is_large = shape in ("2.7b", "6.7b", "13b")
        name = f"speed {shape}, full{', ZeRO 2, checkpointing' if is_large else ''}"
        flags = ["--zero_stage", 2, "--gradient_checkpointing"] if is_large else []
        found[name] = partial(speed, shape=shape, micro=micro, flags=flags)
    return found


def tiny_speeds() -> dict[str, Check]:
    """Return checks of speed and memory on shapes a CPU can train."""
    found = {f"speed tiny, {padding}": ["--padding", padding] for padding in ("free", "longest", "max_length")}
    found |= {"speed tiny, LoRA": LORA, "speed tiny, ZeRO 3": ["--zero_stage", 3]}
    checks: dict[str, Check] = {
        name: partial(speed, shape="tiny", micro=4, flags=flags) for name, flags in found.items()
    }
    return {**checks, "memory tiny": partial(memory, shape="tiny", micro=4)}
