"""Read `--deepspeed_config`, in which "auto" and absent keys mean what the flags say, and refuse what contradicts them.

The files that users of transformers' Trainer have work as they are.
"""

from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

from utils.ds_file.parse import read_object
from utils.ds_file.schema import BATCH_SIZES, OTHER_WAYS, block_models, check_settings
from utils.errors import UserError

AUTO = "auto"
PRECISIONS = ("bf16", "fp16")
# What this program's AdamW has and no flag changes.
FIXED_OPTIMIZER = {"betas": [0.9, 0.95], "eps": 1e-8, "adam_w_mode": True, "torch_adam": False}
OPTIMIZERS = ("adam", "adamw")  # DeepSpeed's "Adam" decays weights as AdamW does
SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}


class Zero(NamedTuple):
    """What flags and file together decide of ZeRO."""

    stage: int
    copies: int  # ranks over which a second copy of the weights is split (hpZ); 1: no copy
    eight_bits: bool  # frozen weights are held in 8 bits
    reduce_scatter: bool
    devices: frozenset[str]  # of what is offloaded
    by_file: bool  # the file names the stage


class DeepSpeedFile(NamedTuple):
    """What a file of `--deepspeed_config` changes."""

    settings: dict[str, Any]  # laid over the generated configuration; without "auto"
    notes: list[str]  # on what is in the file and not laid over, a few words each


def read_deepspeed_file(args: Namespace, ranks: int) -> DeepSpeedFile:
    """Read and check the file of `--deepspeed_config`; an empty one without that flag.

    Args:
        args: of main.py.
        ranks: over all nodes.

    Raises:
        UserError: the file is no JSON object, sets what DeepSpeed does not know, or contradicts a flag.
    """
    if not args.deepspeed_config:
        return DeepSpeedFile({}, [])
    path = args.deepspeed_config
    written = read_object(path)
    config = _usual_names(without_auto(written))
    problems = check_settings(config)
    if not problems:
        problems = _contradictions(config, args, ranks) + _other_ways(config) + _both_precisions(config)
    if problems:
        raise UserError(f"--deepspeed_config {path}: {'; '.join(problems)}.")
    notes = _notes(config, written, args)
    unused = (*BATCH_SIZES, "optimizer", "scheduler", "activation_checkpointing", *OTHER_WAYS, *UNREAD)
    return DeepSpeedFile({name: value for name, value in config.items() if name not in unused and value != {}}, notes)


def without_auto(value: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of an object, and of those within it, without the keys whose value is "auto"."""
    return {
        key: without_auto(below) if isinstance(below, dict) else below for key, below in value.items() if below != AUTO
    }


def _usual_names(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration under the names that the generated one has; DeepSpeed would take the generated value."""
    usual = {"bf16" if name == "bfloat16" and "bf16" not in config else name: value for name, value in config.items()}
    if isinstance(block := usual.get("zero_optimization"), dict):
        aliases = {name: field.alias for name, field in block_models()["zero_optimization"].model_fields.items()}
        usual["zero_optimization"] = {aliases.get(key) or key: value for key, value in block.items()}
    return usual


# --------------------------------------------------------------------------------- what the flags decide


def _contradictions(config: dict[str, Any], args: Namespace, ranks: int) -> list[str]:
    """List the settings that say otherwise than the flags which decide them."""
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    groups = max(1, ranks // max(1, args.sequence_parallel_size))
    decided = {
        "train_micro_batch_size_per_gpu": (micro, "--per_device_train_batch_size"),
        "gradient_accumulation_steps": (accumulation, "--gradient_accumulation_steps"),
        "train_batch_size": (
            micro * accumulation * groups,
            f"--per_device_train_batch_size and --gradient_accumulation_steps with {ranks} rank(s)",
        ),
    }
    clash = [
        f"{key} {config[key]} (use {flag}, which makes it {value})"
        for key, (value, flag) in decided.items()
        if key in config and config[key] != value
    ]
    if "sequence_parallel_size" in config:
        clash.append("sequence_parallel_size (use --sequence_parallel_size)")
    clash += _optimizer_clash(config.get("optimizer", {}), args) + _scheduler_clash(config.get("scheduler", {}), args)
    block = config.get("zero_optimization", {})
    for name in ("offload_param", "offload_optimizer"):
        if block.get(name, {}).get("device") == "nvme" and args.offload != "nvme":
            clash.append(f"zero_optimization.{name}.device nvme (use --offload nvme and --nvme_path)")
    return [f"sets what this program's flags decide: {', '.join(clash)}"] if clash else []


def _optimizer_clash(block: dict[str, Any], args: Namespace) -> list[str]:
    flags = {"lr": "learning_rate", "weight_decay": "weight_decay"}
    values = {**FIXED_OPTIMIZER, **{key: getattr(args, flag) for key, flag in flags.items()}}
    words = {key: f"use --{flag}" for key, flag in flags.items()}
    return _block_clash("optimizer", block, values, lambda key: words.get(key, "AdamW's are fixed")) + [
        f"optimizer.type {block['type']} (use AdamW: --learning_rate, --weight_decay)"
        for kind in [str(block.get("type", "AdamW")).lower()]
        if kind not in OPTIMIZERS
    ]


def _scheduler_clash(block: dict[str, Any], args: Namespace) -> list[str]:
    values = {
        "warmup_min_lr": 0, "warmup_max_lr": args.learning_rate, "warmup_num_steps": args.num_warmup_steps,
        "total_num_steps": args.max_steps, "warmup_type": "linear",
    }  # fmt: skip
    flags = {
        "warmup_max_lr": "--learning_rate", "total_num_steps": "--max_steps", "warmup_num_steps": "--num_warmup_steps",
    }  # fmt: skip
    clash = _block_clash(
        "scheduler", block, values, lambda key: f"use {flags.get(key, '--lr_scheduler_type, --num_warmup_steps')}"
    )
    if str(block.get("type", "WarmupLR")) not in SCHEDULES:
        clash.append(f"scheduler.type {block['type']} (use --lr_scheduler_type, --num_warmup_steps)")
    return clash


def _block_clash(name: str, block: dict[str, Any], values: dict[str, Any], words: Callable[[str], str]) -> list[str]:
    """List the parameters of an optimizer or scheduler that are not what this program uses."""
    parameters = block.get("params", {})
    if not isinstance(parameters, dict):
        return [f"{name}.params, which must be an object of settings"]
    clash = [f"{name}.{key}" for key in block if key not in ("type", "params")]
    for key, value in parameters.items():
        if key not in values or values[key] != value:
            clash.append(f"{name}.params.{key} {value} ({words(key)})")
    return clash


# ------------------------------------------------------------------------- what this program does not have

# This program has its own reader of batches, and compiles with --torch_compile.
UNREAD = ("dataloader_drop_last", "vocabulary_size", "compile")


def _other_ways(config: dict[str, Any]) -> list[str]:
    """List what would train in another way than this program computes and tests."""
    problems = [
        f"{name} is a part of DeepSpeed that this program does not use: leave it out"
        for name in OTHER_WAYS
        if config.get(name) and config[name].get("enabled", name not in ("hybrid_engine", "autotuning")) is not False
    ]
    if str(config.get("gradient_allreduce_op") or "mean").lower() != "mean":
        problems.append("gradient_allreduce_op must be mean: the loss is one mean over all ranks")
    if config.get("managed_gradient_accumulation") is False:
        problems.append("managed_gradient_accumulation must be true: a step's micro batches are one mean")
    if config.get("zero_optimization", {}).get("zenflow"):
        problems.append("zero_optimization.zenflow applies updates late, which this program does not: leave it out")
    return problems


def _both_precisions(config: dict[str, Any]) -> list[str]:
    both = all(config.get(name, {}).get("enabled") for name in PRECISIONS)
    return ["bf16 and fp16 can't both be enabled: leave one, or write auto for --dtype"] if both else []


def _notes(config: dict[str, Any], written: dict[str, Any], args: Namespace) -> list[str]:
    """Return a few words on each thing in the file that is not laid over."""
    notes = []
    kept = [name for name in (*BATCH_SIZES, "optimizer", "scheduler") if name in written]
    kept += [name for name, value in written.items() if name not in kept and (value == AUTO or config.get(name) == {})]
    if kept:
        notes.append(f"as the flags say: {', '.join(kept)}")
    kind = config.get("scheduler", {}).get("type")
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    if kind and SCHEDULES[kind] != schedule:
        notes.append(f"--lr_scheduler_type {schedule} in place of {kind} (which is {SCHEDULES[kind]})")
    unused = [name for name in (*UNREAD, *OTHER_WAYS) if config.get(name)]
    if config.get("activation_checkpointing"):
        unused.append("activation_checkpointing (--gradient_checkpointing is this program's)")
    if unused:
        notes.append(f"not used: {', '.join(unused)}")
    block = config.get("zero_optimization", {})
    device = block.get("offload_param", {}).get("device")
    if device not in (None, "none") and block.get("stage", args.zero_stage) < 3:
        notes.append("offload_param has no effect below ZeRO 3, which alone divides weights")
    return notes


# ---------------------------------------------------------------------------------------- laying it over


def merge_config(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Lay `override` over `base` key by key, nested objects too; the value "auto" keeps the base's. Returns a copy."""
    merged = dict(base)
    for key, value in override.items():
        if isinstance(value, dict):
            below = merged.get(key)
            merged[key] = merge_config(below if isinstance(below, dict) else {}, value)
        elif value != AUTO:
            merged[key] = value
    return merged


def enabled_precision(ds_config: dict[str, Any]) -> str:
    """Return the precision that a DeepSpeed configuration enables: bf16, fp16 or fp32."""
    return next((name for name in PRECISIONS if ds_config.get(name, {}).get("enabled") is True), "fp32")


def disables(settings: dict[str, Any], dtype: str) -> bool:
    """Whether a file turns this precision off in so many words."""
    return settings.get(dtype, {}).get("enabled") is False


def merged_zero(args: Namespace, settings: dict[str, Any]) -> Zero:
    """Return what is decided of ZeRO once the file's settings are laid over the flags' own."""
    block = settings.get("zero_optimization", {})
    places = (block.get(name, {}).get("device", args.offload) for name in ("offload_param", "offload_optimizer"))
    return Zero(
        int(block.get("stage", args.zero_stage)),
        block.get("zero_hpz_partition_size", args.zero_hpz_partition_size),
        block.get("zero_quantized_nontrainable_weights", args.enable_mixed_precision_lora),
        block.get("reduce_scatter", True),
        frozenset(place for place in places if place not in (None, "none")),
        "stage" in block,
    )


def overridden_zero(stage: int, offload: str | None, settings: dict[str, Any]) -> tuple[int, str | None]:
    """Return (ZeRO stage, offload device) once the file's settings are laid over the flags' own."""
    base = {"stage": stage, "offload_optimizer": {"device": offload or "none"}}
    block = merge_config({"zero_optimization": base}, settings)["zero_optimization"]
    device = block["offload_optimizer"].get("device", "none")
    return int(block["stage"]), None if device == "none" else device


def check_data_types(args: Namespace, settings: dict[str, Any], dtype: str) -> None:
    """Check that the file's block data_types goes with the precision and stage that were decided.

    Raises:
        UserError: DeepSpeed would refuse it when the model is loaded.
    """
    block = settings.get("data_types", {})
    stage, offload = overridden_zero(args.zero_stage, args.offload, settings)
    problems = []
    if (gradients := block.get("grad_accum_dtype")) not in (None, dtype) and max(stage, 1 if offload else 0) == 0:
        problems.append(f"data_types.grad_accum_dtype {gradients} with {dtype} needs ZeRO 1 or higher (--zero_stage)")
    if (weights := block.get("param_dtype")) not in (None, dtype):
        problems.append(f"data_types.param_dtype {weights} contradicts the precision, {dtype} (--dtype)")
    if problems:
        raise UserError(f"--deepspeed_config {args.deepspeed_config}: {'; '.join(problems)}.")
