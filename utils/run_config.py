"""The decisions of a run, made once from its arguments and frozen: devices, ranks, precision, ZeRO, batches, layout.

Arguments stay what the user typed. A decision made later is a new value: `config = replace(config, layout=...)`.
"""

import json
from argparse import Namespace
from dataclasses import dataclass, replace
from typing import Any

import torch

from utils.distributed.process_group import local_rank_of
from utils.distributed.ranks import global_rank, print_rank_0, world_size
from utils.errors import UserError
from utils.machine.precision import planned_dtype, resolve_dtype
from utils.notation import Gpus, asked_eot_token, parse_gpus


@dataclass(frozen=True)
class BatchCut:
    """How the samples of an optimizer step are cut into micro batches, and which of them this rank runs."""

    micro_batch: int  # samples, or packed rows, per forward on each rank
    accumulation: int = 1  # micro batches per optimizer step
    ranks: int = 1  # data parallel ranks; the ranks of one sequence parallel group count as one
    rank: int = 0  # this rank's number among them
    on_cpu: bool = True
    averaged_over: int | None = None  # what DeepSpeed divides summed gradients by; None: `ranks`

    @property
    def global_batch(self) -> int:
        """Return the samples, or packed rows, per optimizer step."""
        return self.micro_batch * self.accumulation * self.ranks


@dataclass(frozen=True)
class RunConfig:
    """A run: its arguments as typed, and what was decided from them."""

    args: Namespace  # as typed: read, never written
    device: torch.device
    local_rank: int
    gpus: Gpus | None  # of a plan for other GPUs than this machine's
    ranks: int  # over all nodes, of the run or of the plan
    dtype: str  # bf16, fp16 or fp32
    zero_stage: int
    offload: str | None  # None, "cpu" or "nvme"
    save_only_model: bool
    overrides: dict[str, Any]  # content of --deepspeed_config
    batches: BatchCut
    layout: str  # of a batch: "free" (samples end to end in one row), "longest" or "max_length" (padded)
    packing: bool  # batches are counted in packed rows, not in samples

    @classmethod
    def resolve(cls, args: Namespace, device: torch.device) -> "RunConfig":
        """Decide what the arguments leave open, and print each decision; the process group must stand.

        Raises:
            UserError: the device can't train in the requested precision, or --deepspeed_config can't be used.
        """
        gpus = parse_gpus(args.dry_run)
        ranks = world_size() if gpus is None else gpus.count
        dtype, reason = resolve_dtype(args.dtype) if gpus is None else planned_dtype(args.dtype)
        zero_stage, offload, overrides = args.zero_stage, args.offload, {}
        if offload and zero_stage == 0:
            zero_stage = 1
            print_rank_0(
                "--offload with ZeRO 0: DeepSpeed offloads only what ZeRO shards, so stage 1 is used (same mathematics)"
            )
        if args.deepspeed_config:
            overrides = read_deepspeed_config(args.deepspeed_config)
            print_rank_0(
                f"DeepSpeed configuration: {args.deepspeed_config} laid over the generated one: {', '.join(overrides)}"
            )
            zero_stage, offload = _overridden_zero(zero_stage, offload, overrides)
            if overrides_precision(overrides) and enabled_precision(overrides) != dtype:
                dtype, reason = enabled_precision(overrides), "as the DeepSpeed configuration says"
        print_rank_0(f"Precision: {dtype} ({reason})")
        print_rank_0(f"DeepSpeed: ZeRO stage {zero_stage}, offload {offload or 'off'}, {ranks} rank(s)")
        groups = ranks // args.sequence_parallel_size
        batches = BatchCut(
            args.per_device_train_batch_size, args.gradient_accumulation_steps, groups,
            global_rank() // args.sequence_parallel_size, device.type == "cpu",
            averaged_over(groups, args.sequence_parallel_size, zero_stage),
        )  # fmt: skip
        return cls(
            args=args, device=device, local_rank=local_rank_of(args.local_rank), gpus=gpus, ranks=ranks, dtype=dtype,
            zero_stage=zero_stage, offload=offload, save_only_model=args.save_only_model or offload == "nvme",
            overrides=overrides, batches=batches, layout=args.padding, packing=args.packing,
        )  # fmt: skip

    def with_layout(self, layout: str) -> "RunConfig":
        """Return the configuration for a layout that the model can do; packed rows exist in layout "free" alone."""
        return replace(self, layout=layout, packing=self.packing and layout == "free")

    @property
    def eot_token(self) -> str | None:
        """Return the end token asked for with `--add_eot_token`; None for the tokenizer's own eos."""
        return asked_eot_token(self.args)

    @property
    def is_streaming(self) -> bool:
        """Whether data are read window by window (`--streaming`)."""
        return self.args.streaming is not None

    @property
    def sequence_part(self) -> tuple[int, int]:
        """Return (k, N): this rank has part k of N of every row; neighbouring ranks form a group, as in DeepSpeed."""
        return global_rank() % self.args.sequence_parallel_size, self.args.sequence_parallel_size

    @property
    def row_length(self) -> int | None:
        """Return the tokens of a packed row; None where batches are counted in samples."""
        return self.args.max_seq_len if self.packing else None

    @property
    def window_size(self) -> int:
        """Return the samples of a window of a stream: whole optimizer steps, where steps are counted in samples."""
        size, step = self.args.streaming, self.batches.global_batch
        return size if self.packing else -(-size // step) * step

    @property
    def eval_batches(self) -> BatchCut:
        """Return how the evaluation data are cut."""
        return replace(self.batches, micro_batch=self.args.per_device_eval_batch_size, accumulation=1)

    @property
    def plain_arguments(self) -> dict[str, Any]:
        """Return every argument as typed, as a JSON file holds it."""
        values = {key: getattr(value, "value", value) for key, value in vars(self.args).items()}
        plain = (str, int, float, bool, list, type(None))
        return {key: value if isinstance(value, plain) else str(value) for key, value in values.items()}

    @property
    def decisions(self) -> dict[str, Any]:
        """Return the decisions by the name of the argument that each replaces, as a JSON file holds them."""
        return {
            "dtype": self.dtype, "zero_stage": self.zero_stage, "offload": self.offload,
            "per_device_train_batch_size": self.batches.micro_batch,
            "gradient_accumulation_steps": self.batches.accumulation, "padding": self.layout, "packing": self.packing,
            "save_only_model": self.save_only_model, "local_rank": self.local_rank,
        }  # fmt: skip


def averaged_over(groups: int, group_size: int, zero_stage: int) -> int:
    """Return the number DeepSpeed (0.19.8) divides the gradients by that it sums over all ranks.

    The ranks of a sequence parallel group hold parts of one gradient, so it divides by the number of groups; but at
    ZeRO 3, where gradients go through `reduce_scatter_coalesced`, by the number of all ranks.
    """
    return groups * (group_size if zero_stage == 3 else 1)


# ------------------------------------------------------------------------------------- --deepspeed_config


def read_deepspeed_config(path: str) -> dict[str, Any]:
    """Read the user's `--deepspeed_config` file.

    Raises:
        UserError: the file is no JSON object, or sets what this program's flags decide.
    """
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
    """Lay `override` over `base` key by key, nested objects too; the value "auto" keeps the base's. Returns a copy."""
    merged = dict(base)
    for key, value in override.items():
        if isinstance(value, dict):
            below = merged.get(key)
            merged[key] = merge_config(below if isinstance(below, dict) else {}, value)
        elif value != "auto":
            merged[key] = value
    return merged


def enabled_precision(ds_config: dict[str, Any]) -> str:
    """Return the precision that a DeepSpeed configuration enables: bf16, fp16 or fp32."""
    blocks = merge_config({}, ds_config)
    return next((name for name in ("bf16", "fp16") if blocks.get(name, {}).get("enabled")), "fp32")


def overrides_precision(overrides: dict[str, Any]) -> bool:
    """Whether `--deepspeed_config` sets the precision, which then replaces `--dtype`'s."""
    return "fp16" in overrides or "bf16" in overrides


def _overridden_zero(stage: int, offload: str | None, overrides: dict[str, Any]) -> tuple[int, str | None]:
    """Return (ZeRO stage, offload device) once `--deepspeed_config` is laid over the arguments' own."""
    base = {"stage": stage, "offload_optimizer": {"device": offload or "none"}}
    block = merge_config({"zero_optimization": base}, overrides)["zero_optimization"]
    device = block.get("offload_optimizer", {}).get("device", "none")
    return block["stage"], None if device == "none" else device
