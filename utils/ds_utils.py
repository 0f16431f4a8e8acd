"""DeepSpeed: its configuration, and starting and checking the process group and device."""

import json
import os
from argparse import Namespace
from typing import Any

import torch.distributed as dist

from utils.engine.nvme_swap import _swap_folder
from utils.errors import UserError
from utils.logging.console import say
from utils.logging.trackers import monitor_blocks
from utils.machine.precision import planned_dtype, resolve_dtype
from utils.run_config import parse_gpus

STEPS_PER_PRINT = 10
SWAP_BUFFERS = 8  # a module's own weights (LoRA has three of a size) and those read ahead
# Elements of a part of the optimizer that is read and written at a time; four buffers of it are held.
SUB_GROUP = 50_000_000


def get_train_ds_config(
    offload: bool | str | None,
    stage: int = 2,
    dtype: str = "fp16",
    enable_hybrid_engine: bool = False,
    inference_tp_size: int = 1,
    release_inference_cache: bool = False,
    pin_parameters: bool = True,
    tp_gather_partition_size: int = 8,
    max_out_tokens: int = 512,
    enable_tensorboard: bool = False,
    tb_path: str = "",
    tb_name: str = "",
) -> dict[str, Any]:
    """The DeepSpeed configuration of a training run (batch sizes are added by the caller).

    Args:
        offload: keep parameters (ZeRO 3) and optimizer states (ZeRO 1 and up) in CPU memory; "nvme" means files.
        stage: ZeRO stage, 0 to 3.
        dtype: "bf16", "fp16" or "fp32".
        enable_tensorboard: DeepSpeed's own monitor writes below `{tb_path}/ds_tensorboard_logs/`.

    Reference: https://www.deepspeed.ai/docs/config-json/
    """
    device = "cpu" if offload is True else offload or "none"
    config: dict[str, Any] = {
        "steps_per_print": STEPS_PER_PRINT,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": True,
            "offload_param": {"device": device},
            "offload_optimizer": {"device": device},
            "stage3_param_persistence_threshold": 1e4,
            "stage3_max_live_parameters": 3e7,
            "stage3_prefetch_bucket_size": 3e7,
            # torch's own linear keeps a view of the weight for the backward, and with it every weight that ZeRO 3
            # gathers; DeepSpeed's keeps the weight itself, which is fetched anew.
            "memory_efficient_linear": True,
        },
        "gradient_clipping": 1.0,
        "prescale_gradients": False,
        "wall_clock_breakdown": False,
        # torch's AdamW is the fall-back where the fused kernels can't be built.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "hybrid_engine": {
            "enabled": enable_hybrid_engine,
            "max_out_tokens": max_out_tokens,
            "inference_tp_size": inference_tp_size,
            "release_inference_cache": release_inference_cache,
            "pin_parameters": pin_parameters,
            "tp_gather_partition_size": tp_gather_partition_size,
        },
        "tensorboard": {
            "enabled": enable_tensorboard,
            "output_path": os.path.join(tb_path, "ds_tensorboard_logs/"),
            "job_name": f"{tb_name}_tensorboard",
        },
    }
    if dtype == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale_window": 100}
    elif dtype == "bf16":
        config["bf16"] = {"enabled": True}
    elif dtype != "fp32":
        raise ValueError(f"dtype must be bf16, fp16 or fp32, not {dtype!r}")
    return config


def read_deepspeed_config(path: str) -> dict[str, Any]:
    """The user's `--deepspeed_config` file; UserError when it is no JSON object or holds what flags decide."""
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError) as err:
        raise UserError(f"--deepspeed_config {path} can't be read as JSON: {err}") from err
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed_config {path} must hold one JSON object, not a {type(config).__name__}.")
    owned = {
        "optimizer": "--learning_rate, --weight_decay",
        "scheduler": "--lr_scheduler_type, --num_warmup_steps",
        "train_micro_batch_size_per_gpu": "--per_device_train_batch_size",
        "gradient_accumulation_steps": "--gradient_accumulation_steps",
        "sequence_parallel_size": "--sequence_parallel_size",
        "train_batch_size": "--per_device_train_batch_size and --gradient_accumulation_steps",
    }
    clash = [f"{key} (use {flag})" for key, flag in owned.items() if config.get(key, "auto") != "auto"]
    if clash:
        raise UserError(f"--deepspeed_config {path} sets what this program's flags decide: {'; '.join(clash)}.")
    return config


def merge_config(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """`base` with `override` laid over it key by key, nested objects too; the value "auto" keeps base's."""
    merged = dict(base)
    for key, value in override.items():
        if isinstance(value, dict):
            below = merged.get(key)
            merged[key] = merge_config(below if isinstance(below, dict) else {}, value)
        elif value != "auto":
            merged[key] = value
    return merged


def build_ds_config(args: Namespace, ranks: int) -> dict[str, Any]:
    """The run's DeepSpeed configuration from its arguments, `--deepspeed_config` laid over it.

    `args.zero_stage` and `args.offload` are set to what the merged configuration says.
    """
    dtype, reason = resolve_dtype(args.dtype) if parse_gpus(args.dry_run) is None else planned_dtype(args.dtype)
    if args.offload and args.zero_stage == 0:
        args.zero_stage = 1
        _say("--offload with ZeRO 0: DeepSpeed offloads only what ZeRO shards, so stage 1 is used (same mathematics)")
    config = get_train_ds_config(
        args.offload, args.zero_stage, dtype, enable_tensorboard=args.enable_tensorboard,
        tb_path=args.tensorboard_path, tb_name="step1_model",
    )  # fmt: skip
    config = merge_config(config, monitor_blocks(args))
    config["zero_optimization"] |= scale_settings(args)
    config["train_micro_batch_size_per_gpu"] = args.per_device_train_batch_size
    config["gradient_accumulation_steps"] = args.gradient_accumulation_steps
    if args.deepspeed_config:
        override = read_deepspeed_config(args.deepspeed_config)
        if "fp16" in override or "bf16" in override:  # its precision replaces --dtype's, not adds to it
            config.pop("fp16", None)
            config.pop("bf16", None)
        config = merge_config(config, override)
        args.zero_stage = config["zero_optimization"]["stage"]
        device = config["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
        args.offload = None if device == "none" else device
        _say(f"DeepSpeed configuration: {args.deepspeed_config} laid over the generated one: {', '.join(override)}")
    groups = ranks // args.sequence_parallel_size
    config["train_batch_size"] = args.per_device_train_batch_size * args.gradient_accumulation_steps * groups
    if args.sequence_parallel_size > 1:  # read where weights are partitioned while they load
        config["sequence_parallel_size"] = args.sequence_parallel_size
        if args.zero_stage == 3 and not config["zero_optimization"].get("reduce_scatter", True):
            raise UserError(
                f"--deepspeed_config {args.deepspeed_config}: reduce_scatter false at ZeRO 3 scales some gradients of "
                "ranks that share rows and not others. Leave it true with --sequence_parallel_size."
            )
    precision = next((name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled")), "fp32")
    _say(f"Precision: {precision} ({reason if precision == dtype else 'as the DeepSpeed configuration says'})")
    if args.offload == "nvme":
        # A stop on a signal saves too, and a checkpoint whose states are in swap files is no use to anyone.
        args.save_only_model = True
        folder = config["zero_optimization"]["offload_optimizer"]["nvme_path"]
        _say(f"Swap files: below {folder}, removed when the run ends; what is saved on the way are models alone")
    _say(f"DeepSpeed: ZeRO stage {args.zero_stage}, offload {args.offload or 'off'}, {ranks} rank(s)")
    return config


def _say(line: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        say(line)


def scale_settings(args: Namespace) -> dict[str, Any]:
    """What these arguments add to DeepSpeed's block `zero_optimization`."""
    settings: dict[str, Any] = {}
    if args.zero_hpz_partition_size > 1:
        settings["zero_hpz_partition_size"] = args.zero_hpz_partition_size
    if args.enable_mixed_precision_lora:
        settings["zero_quantized_nontrainable_weights"] = True
    if args.offload == "nvme":
        folder = {"device": "nvme", "nvme_path": _swap_folder(args)}
        # No weights are to stay in CPU memory; buffers are sized when the model is known.
        settings["offload_param"] = {**folder, "buffer_count": SWAP_BUFFERS, "max_in_cpu": 0}
        settings["offload_optimizer"] = {**folder, "buffer_count": 4}
        settings["sub_group_size"] = SUB_GROUP
    return settings
