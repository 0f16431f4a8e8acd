"""DeepSpeed's configuration of a training run."""

import os
from argparse import Namespace
from typing import Any, NamedTuple

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

from utils.distributed.ranks import print_rank_0, world_size
from utils.ds_file.read import merge_config, overridden_zero
from utils.engine.device_settings import zero_settings_of_device
from utils.engine.nvme_swap import open_swap_folder
from utils.errors import UserError
from utils.logging.console import chatter_to_log
from utils.logging.trackers import monitor_blocks
from utils.run_config import RunConfig

GLOBAL_BATCH_SIZE = 32  # these two stand in for a run's own batch sizes, which replace them
MICRO_BATCH_SIZE = 4
STEPS_PER_PRINT = 10
SWAP_BUFFERS = 8  # a module's own weights (LoRA has three of a size) and those read ahead
# Elements of a part of the optimizer that is read and written at a time; four buffers of it are held.
SUB_GROUP = 50_000_000


class TrainSettings(NamedTuple):
    """What `get_train_ds_config` is given after `offload`, in the order it has had since 2024."""

    dtype: str = "fp16"  # "bf16", "fp16" or "fp32"
    stage: int = 2  # of ZeRO, 0 to 3
    enable_hybrid_engine: bool = False
    inference_tp_size: int = 1
    release_inference_cache: bool = False
    pin_parameters: bool = True
    tp_gather_partition_size: int = 8
    max_out_tokens: int = 512
    enable_tensorboard: bool = False  # DeepSpeed's own monitor writes below `{tb_path}/ds_tensorboard_logs/`
    enable_mixed_precision_lora: bool = False  # keep the weights that LoRA froze in 8 bits (ZeRO 3)
    tb_path: str = ""
    tb_name: str = ""
    offload_optimizer_config: dict[str, Any] | None = None  # these three are laid over what is made here
    offload_param_config: dict[str, Any] | None = None
    aio_config: dict[str, Any] | None = None


def get_train_ds_config(offload: bool | str | None, *positional: Any, **named: Any) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a training run; the caller replaces the batch sizes.

    Args:
        offload: keep parameters (ZeRO 3) and optimizer states (ZeRO 1 and up) in CPU memory; "nvme" means files.
        positional, named: the fields of `TrainSettings`. By position they are told apart by their types: a dtype
            first is the order since 2024, (dtype, stage, enable_hybrid_engine, ...); a stage first is that of 2023,
            (stage, enable_hybrid_engine, ...), or (stage, dtype, enable_hybrid_engine, ...).

    Reference: https://www.deepspeed.ai/docs/config-json/
    """
    settings = TrainSettings(*_dtype_first(positional, named), **named)
    config: dict[str, Any] = {
        "train_batch_size": GLOBAL_BATCH_SIZE,
        "train_micro_batch_size_per_gpu": MICRO_BATCH_SIZE,
        "steps_per_print": STEPS_PER_PRINT,
        "zero_optimization": _zero_block(offload, settings),
        "gradient_clipping": 1.0,
        "prescale_gradients": False,
        "wall_clock_breakdown": False,
        # torch's AdamW is the fall-back where the fused kernels can't be built.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "hybrid_engine": {
            "enabled": settings.enable_hybrid_engine,
            "max_out_tokens": settings.max_out_tokens,
            "inference_tp_size": settings.inference_tp_size,
            "release_inference_cache": settings.release_inference_cache,
            "pin_parameters": settings.pin_parameters,
            "tp_gather_partition_size": settings.tp_gather_partition_size,
        },
        "tensorboard": {
            "enabled": settings.enable_tensorboard,
            "output_path": os.path.join(settings.tb_path, "ds_tensorboard_logs/"),
            "job_name": f"{settings.tb_name}_tensorboard",
        },
        **_precision_block(settings.dtype, loss_scale_window=100),
    }
    if settings.aio_config:
        config["aio"] = settings.aio_config
    return config


def get_eval_ds_config(offload: bool, *positional: Any, **named: Any) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a model that only answers: step 3's reference and reward models.

    SFT has no such model. After `offload` (of the parameters) come `dtype` and `stage`, 0 by default; in 2023 `stage`
    alone, with fp16.
    """
    positional = _dtype_first(positional, named)
    if len(positional) < 2:
        named.setdefault("stage", 0)
    settings = TrainSettings(*positional, **named)
    return {
        "train_batch_size": GLOBAL_BATCH_SIZE,
        "train_micro_batch_size_per_gpu": MICRO_BATCH_SIZE,
        "steps_per_print": STEPS_PER_PRINT,
        "zero_optimization": {
            "stage": settings.stage,
            "stage3_param_persistence_threshold": 1e4,
            "offload_param": {"device": "cpu" if offload else "none"},
            "memory_efficient_linear": False,
        },
        "gradient_clipping": 1.0,
        "prescale_gradients": False,
        "wall_clock_breakdown": False,
        **_precision_block(settings.dtype),
    }


def _dtype_first(positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """Return positional settings in the order of `TrainSettings`; takes a `dtype` it moves out of `named`."""
    if not positional or isinstance(positional[0], str):
        return positional
    stage, *rest = positional
    dtype = rest.pop(0) if rest and isinstance(rest[0], str) else named.pop("dtype", TrainSettings().dtype)
    return (dtype, stage, *rest)


def _zero_block(offload: bool | str | None, settings: TrainSettings) -> dict[str, Any]:
    """Return DeepSpeed's block `zero_optimization`."""
    device = "cpu" if offload is True else offload or "none"
    block: dict[str, Any] = {
        "stage": settings.stage,
        "overlap_comm": True,
        "offload_param": {"device": device, **(settings.offload_param_config or {})},
        "offload_optimizer": {"device": device, **(settings.offload_optimizer_config or {})},
        "stage3_param_persistence_threshold": 1e4,
        "stage3_max_live_parameters": 3e7,
        "stage3_prefetch_bucket_size": 3e7,
        # torch's own linear keeps a view of the weight for the backward, and with it every weight that ZeRO 3
        # gathers; DeepSpeed's keeps the weight itself, which is fetched anew.
        "memory_efficient_linear": True,
    }
    if settings.enable_mixed_precision_lora:
        block["zero_quantized_nontrainable_weights"] = True
        devices = get_accelerator().device_count()
        if world_size() > devices:  # over several nodes each keeps a copy, and gathers from itself
            block["zero_hpz_partition_size"] = devices
    return block


def _precision_block(dtype: str, **fp16: Any) -> dict[str, Any]:
    """Return DeepSpeed's block of a precision, with the settings `fp16` where it is that."""
    blocks = {"fp16": {"fp16": {"enabled": True, **fp16}}, "bf16": {"bf16": {"enabled": True}}, "fp32": {}}
    if dtype not in blocks:
        raise ValueError(f"dtype must be bf16, fp16 or fp32, not {dtype!r}")
    return blocks[dtype]


def build_ds_config(config: RunConfig) -> dict[str, Any]:
    """Build the run's DeepSpeed configuration, with `--deepspeed_config` laid over it.

    With `--offload nvme` this opens the process's folder for swap files.
    """
    args, overrides = config.args, config.overrides
    ds_config = get_train_ds_config(
        config.flag_offload, config.zero_stage, config.dtype, enable_tensorboard=args.enable_tensorboard,
        tb_path=args.tensorboard_path, tb_name="step1_model",
    )  # fmt: skip
    ds_config = merge_config(ds_config, monitor_blocks(args.report_to, args.enable_tensorboard))
    ds_config = merge_config(ds_config, {"zero_optimization": zero_settings_of_device(config)})
    ds_config["zero_optimization"] |= scale_settings(config)
    ds_config["train_micro_batch_size_per_gpu"] = config.batches.micro_batch
    ds_config["gradient_accumulation_steps"] = config.batches.accumulation
    # DeepSpeed's own timer of throughput waits for the device twice in every micro batch; Progress measures it instead.
    ds_config["timers"] = {"throughput": {"enabled": False}}
    ds_config = merge_config(ds_config, overrides)
    ds_config["zero_optimization"]["stage"] = config.zero_stage  # what is offloaded is sharded
    ds_config["train_batch_size"] = config.batches.global_batch
    if args.sequence_parallel_size > 1:  # read where weights are partitioned while they load
        ds_config["sequence_parallel_size"] = args.sequence_parallel_size
    if config.offload == "nvme":
        folder = ds_config["zero_optimization"]["offload_optimizer"]["nvme_path"]
        print_rank_0(
            f"Swap files: below {folder}, removed when the run ends; checkpoints hold models alone (--save_only_model)"
        )
    return ds_config


def check_ds_file(args: Namespace, settings: dict[str, Any]) -> None:
    """Have DeepSpeed read the generated configuration with the settings of `--deepspeed_config` laid over it.

    Raises:
        UserError: DeepSpeed refuses it.
    """
    stage, offload = overridden_zero(args.zero_stage, args.offload, settings)
    trial = merge_config(get_train_ds_config(offload, max(stage, 1 if offload else 0), "fp32"), settings)
    del trial["train_batch_size"]  # it follows from the number of ranks
    try:
        with chatter_to_log():
            DeepSpeedConfig(trial)
    except (DeepSpeedConfigError, AssertionError, ValueError, TypeError, KeyError, AttributeError) as err:
        reason = " ".join(str(err).split())[:300]
        raise UserError(f"--deepspeed_config {args.deepspeed_config}: DeepSpeed can't use it: {reason}") from err


def scale_settings(config: RunConfig, is_trial: bool = False) -> dict[str, Any]:
    """Return what the arguments of big models add to DeepSpeed's block `zero_optimization`.

    With `--offload nvme` this opens the process's folder for swap files; not with `is_trial`.
    """
    args = config.args
    settings: dict[str, Any] = {}
    if args.zero_hpz_partition_size > 1:
        settings["zero_hpz_partition_size"] = args.zero_hpz_partition_size
    if args.enable_mixed_precision_lora:
        settings["zero_quantized_nontrainable_weights"] = True
    if args.offload == "nvme":
        # A plan for other GPUs needs no files on this machine.
        path = args.nvme_path if is_trial or config.gpus is not None else open_swap_folder(args.nvme_path)
        folder = {"device": "nvme", "nvme_path": path}
        # No weights are to stay in CPU memory; buffers are sized when the model is known.
        settings["offload_param"] = {**folder, "buffer_count": SWAP_BUFFERS, "max_in_cpu": 0}
        settings["offload_optimizer"] = {**folder, "buffer_count": 4}
        settings["sub_group_size"] = SUB_GROUP
    return settings
