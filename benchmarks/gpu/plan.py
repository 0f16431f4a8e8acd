"""The list of checks that the GPU check (`check.py`) runs, in order: the most important come first."""

from collections.abc import Callable
from functools import partial

from benchmarks.gpu.cases import (
    LORA,
    LORA_ALONE,
    REFERENCE,
    Context,
    curve,
    kernels,
    lora,
    memory,
    overflow,
    reference,
    resume,
    smoke,
    speed,
)
from benchmarks.gpu.features import (
    answers,
    interrupted,
    masters,
    optimizer_speed,
    quantized,
    stepped_down,
    streaming,
    tiled,
)
from benchmarks.gpu.processes import Outcome

SMOKE = "smoke: imports, compiler, a step in bf16, a collective"
Check = Callable[[Context], Outcome]


def all_checks(device: str) -> dict[str, Check]:
    """Return every check by its name, in the order they run: by what is known after so many minutes."""
    first: dict[str, Check] = {
        SMOKE: smoke,
        REFERENCE: reference,
        "bf16, ZeRO 0": partial(curve, dtype="bf16"),
        "attention kernels, bf16": partial(kernels, what="attention", dtype="bf16"),
        "fused loss, bf16": partial(kernels, what="loss", dtype="bf16"),
        "optimizer step, bf16": partial(kernels, what="step", dtype="bf16"),
        "fp16, ZeRO 0": partial(curve, dtype="fp16"),
    }
    if device == "cpu":
        return {**first, **tiny_speeds(), **more_equality(), **features()}
    return {**first, **speeds(), **large_speeds(), **more_equality(), **features(), **memories(), **small_speeds()}


def more_equality() -> dict[str, Check]:
    """Return the checks of equality that can wait: other precisions, ZeRO, offload, LoRA, checkpoints."""
    zero = {f"bf16, ZeRO {stage}": partial(curve, dtype="bf16", flags=["--zero_stage", stage]) for stage in (1, 2, 3)}
    offload = {
        f"bf16, ZeRO {stage}, offload": partial(
            curve, dtype="bf16", flags=["--zero_stage", stage, "--offload"], optimizer="DeepSpeedCPUAdam"
        )
        for stage in (1, 2, 3)
    }
    return {
        "attention kernels, fp16": partial(kernels, what="attention", dtype="fp16"),
        "attention, fp32": partial(kernels, what="attention", dtype="fp32"),
        "fused loss, fp16": partial(kernels, what="loss", dtype="fp16"),
        "fused loss, fp32": partial(kernels, what="loss", dtype="fp32"),
        "optimizer step, fp16": partial(kernels, what="step", dtype="fp16"),
        "fp16, injected overflow": overflow,
        **zero,
        "fp32, ZeRO 0": partial(curve, dtype="fp32"),
        "fp16, ZeRO 2": partial(curve, dtype="fp16", flags=["--zero_stage", 2]),
        "bf16, gradient checkpointing": partial(curve, dtype="bf16", flags=["--gradient_checkpointing"]),
        "bf16, torch_compile": partial(
            curve, dtype="bf16", flags=["--torch_compile", "--padding", "max_length"], said=r"Compiled: \d"
        ),
        "ZeRO 3, master weights": masters,
        "LoRA: merged, saved, verified": lora,
        "LoRA, 4 bits": quantized,
        "LoRA, ZeRO 3": partial(lora, flags=["--zero_stage", 3]),
        "checkpoint and resume, ZeRO 0": resume,
        "checkpoint and resume, ZeRO 3": partial(resume, flags=["--zero_stage", 3]),
        **offload,
    }


def features() -> dict[str, Check]:
    """Return the checks of what a run may do besides."""
    return {
        "streaming": streaming,
        "SIGTERM": interrupted,
        "prompt_eval": answers,
        "activation offloading": partial(
            curve, dtype="bf16", flags=["--gradient_checkpointing", "--activation_offloading"]
        ),
        "tiled MLP": tiled,
        "--fit, out of memory": stepped_down,
        "AdamW without its kernel": partial(curve, dtype="bf16", optimizer="torch AdamW", watch=["--no_kernel"]),
    }


def speeds() -> dict[str, Check]:
    """Return the checks of the speed of 1.3b: about 8,000 tokens a step in packed rows, and 16 samples otherwise."""
    kinds = {"full": [], "LoRA": LORA_ALONE, "LoRA, checkpointing": LORA}
    found: dict[str, Check] = {}
    for kind, flags in kinds.items():
        for length, rows in ((512, 16), (2048, 4)):
            packed = [*flags, "--packing", "--max_seq_len", length]
            found[f"speed 1.3b, {kind}, packed {length}"] = partial(
                speed, shape="1.3b", micro=rows, flags=packed, profiled=kind == "full" and length == 512
            )
            if kind == "full":
                found[f"speed 1.3b, full, packed {length}, compiled"] = partial(
                    speed, shape="1.3b", micro=rows, flags=[*packed, "--torch_compile"]
                )
        for padding in ("free", "longest", "max_length"):
            found[f"speed 1.3b, {kind}, {padding}"] = partial(
                speed, shape="1.3b", micro=16, flags=[*flags, "--padding", padding]
            )
    return {**found, "speed 1.3b, the optimizer step alone": optimizer_speed}


def large_speeds() -> dict[str, Check]:
    """Return the checks of the speed of 2.7b to 13b."""
    found: dict[str, Check] = {}
    for shape, micro in (("2.7b", 16), ("6.7b", 8), ("13b", 8)):
        found[f"speed {shape}, LoRA"] = partial(speed, shape=shape, micro=micro, flags=LORA)
        # On one GPU too ZeRO 2 takes less memory than ZeRO 0, which holds the float32 gradients twice.
        flags = ["--zero_stage", 2, "--gradient_checkpointing"]
        found[f"speed {shape}, full, ZeRO 2, checkpointing"] = partial(speed, shape=shape, micro=micro, flags=flags)
    return found


def small_speeds() -> dict[str, Check]:
    """Return the checks of the speed of small models."""
    found: dict[str, Check] = {}
    for shape in ("125m", "350m"):
        found[f"speed {shape}, LoRA"] = partial(speed, shape=shape, micro=16, flags=LORA)
        found[f"speed {shape}, full"] = partial(speed, shape=shape, micro=16)
    return found


def memories() -> dict[str, Check]:
    """Return the checks of memory against its estimate."""
    settings = {
        "350m, ZeRO 0": ("350m", 8, []), "350m, ZeRO 1": ("350m", 8, ["--zero_stage", 1]),
        "350m, ZeRO 2": ("350m", 8, ["--zero_stage", 2]), "350m, ZeRO 3": ("350m", 8, ["--zero_stage", 3]),
        "1.3b, ZeRO 3": ("1.3b", 8, ["--zero_stage", 3]), "1.3b, LoRA": ("1.3b", 32, LORA),
        "1.3b, ZeRO 2, offload": ("1.3b", 8, ["--zero_stage", 2, "--offload"]),
        "1.3b, ZeRO 3, offload": ("1.3b", 8, ["--zero_stage", 3, "--offload"]),
        "125m, 64 samples": ("125m", 64, []), "125m, 64 samples, max_length": ("125m", 64, ["--padding", "max_length"]),
    }  # fmt: skip
    return {
        f"memory {name}": partial(memory, shape=shape, micro=micro, flags=flags)
        for name, (shape, micro, flags) in settings.items()
    }


def tiny_speeds() -> dict[str, Check]:
    """Return checks of speed and memory on shapes a CPU can train."""
    found = {f"speed tiny, {padding}": ["--padding", padding] for padding in ("free", "longest", "max_length")}
    found |= {"speed tiny, packed, compiled": ["--packing", "--torch_compile"]}
    found |= {"speed tiny, packed": ["--packing"], "speed tiny, LoRA": LORA, "speed tiny, ZeRO 3": ["--zero_stage", 3]}
    checks: dict[str, Check] = {
        name: partial(speed, shape="tiny", micro=4, flags=flags, profiled="free" in name)
        for name, flags in found.items()
    }
    return {
        **checks,
        "speed of the optimizer step": optimizer_speed,
        "memory tiny": partial(memory, shape="tiny", micro=4),
    }
