"""The decisions of a run, made once from its arguments and frozen: devices, ranks, precision, ZeRO, batches, layout.

Arguments stay what the user typed. A decision made later is a new value: `config = replace(config, layout=...)`.
"""

from argparse import Namespace
from dataclasses import dataclass, replace
from typing import Any

import torch

from utils.distributed.process_group import local_rank_of
from utils.distributed.ranks import global_rank, print_rank_0, world_size
from utils.ds_file.read import (
    DeepSpeedFile,
    check_data_types,
    disables,
    enabled_precision,
    overridden_zero,
    read_deepspeed_file,
)
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
    overrides: dict[str, Any]  # what --deepspeed_config sets
    batches: BatchCut
    layout: str  # of a batch: "free" (samples end to end in one row), "longest" or "max_length" (padded)
    packing: bool  # batches are counted in packed rows, not in samples
    gradient_checkpointing: bool
    fitted_offload: str | None = None  # what --fit chose beside flags and file
    template_date: str | None = None  # what a chat template that asks for the date sees; None: today

    @classmethod
    def resolve(cls, args: Namespace, device: torch.device) -> "RunConfig":
        """Decide what the arguments leave open, and print each decision; the process group must stand.

        Raises:
            UserError: the device can't train in the requested precision, or --deepspeed_config can't be used.
        """
        gpus = parse_gpus(args.dry_run)
        ranks = world_size() if gpus is None else gpus.count
        file = read_deepspeed_file(args, ranks)
        dtype, reason = decide_dtype(args, file.settings)
        zero_stage, offload = overridden_zero(args.zero_stage, args.offload, file.settings)
        if args.deepspeed_config:
            print_rank_0(f"DeepSpeed configuration: {describe_file(args.deepspeed_config, file, dtype)}")
        if offload and zero_stage == 0:
            zero_stage = 1
            print_rank_0(
                "--offload with ZeRO 0: DeepSpeed offloads only what ZeRO shards, so stage 1 is used (same mathematics)"
            )
        print_rank_0(f"Precision: {dtype} ({reason})")
        if args.fit is None:
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
            overrides=file.settings, batches=batches, layout=args.padding, packing=args.packing,
            gradient_checkpointing=args.gradient_checkpointing,
        )  # fmt: skip

    def with_layout(self, layout: str) -> "RunConfig":
        """Return the configuration for a layout that the model can do; packed rows exist in layout "free" alone."""
        return replace(self, layout=layout, packing=self.packing and layout == "free")

    def with_zero(self, stage: int, offload: str | None) -> "RunConfig":
        """Return the configuration for a ZeRO stage and offload that `--fit` chose."""
        size = self.args.sequence_parallel_size
        batches = replace(self.batches, averaged_over=averaged_over(self.batches.ranks, size, stage))
        fitted = None if offload == self.offload else offload
        return replace(self, zero_stage=stage, offload=offload, fitted_offload=fitted, batches=batches)

    def with_cut(self, micro_batch: int, accumulation: int, gradient_checkpointing: bool) -> "RunConfig":
        """Return the configuration for a cut of the same step, with checkpointing or without."""
        batches = replace(self.batches, micro_batch=micro_batch, accumulation=accumulation)
        return replace(self, batches=batches, gradient_checkpointing=gradient_checkpointing)

    @property
    def flag_offload(self) -> str | None:
        """Return the offload of the generated DeepSpeed configuration, which the user's file is laid over."""
        return self.args.offload or self.fitted_offload

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
    def compiled_shape(self) -> tuple[int, int] | None:
        """Return [rows, tokens] of a full training batch with `--torch_compile`; None where it has no fixed size."""
        size, length = self.batches.micro_batch, self.args.max_seq_len
        if not self.args.torch_compile or self.layout == "longest" or (self.layout == "free" and not self.packing):
            return None
        return (1, size * length) if self.packing else (size, length)

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
        """Return every argument as typed, also where `--fit` stepped down, as a JSON file holds it."""
        args = getattr(self.args, "as_typed", self.args)
        given = {name: value for name, value in vars(args).items() if name != "typed"}
        values = {key: getattr(value, "value", value) for key, value in given.items()}
        plain = (str, int, float, bool, list, type(None))
        return {key: value if isinstance(value, plain) else str(value) for key, value in values.items()}

    @property
    def decisions(self) -> dict[str, Any]:
        """Return the decisions by the name of the argument that each replaces, as a JSON file holds them."""
        return {
            "dtype": self.dtype, "zero_stage": self.zero_stage, "offload": self.offload,
            "per_device_train_batch_size": self.batches.micro_batch,
            "gradient_accumulation_steps": self.batches.accumulation,
            "gradient_checkpointing": self.gradient_checkpointing, "padding": self.layout, "packing": self.packing,
            "save_only_model": self.save_only_model, "local_rank": self.local_rank, "template_date": self.template_date,
            "fit": self.args.fit, "resume_from_checkpoint": self.args.resume_from_checkpoint,
        }  # fmt: skip


def decide_dtype(args: Namespace, settings: dict[str, Any]) -> tuple[str, str]:
    """Return (dtype, reason): what the file of `--deepspeed_config` turns on or off, else as `--dtype` says.

    Args:
        settings: of the file.

    Raises:
        UserError: the device can't train in it.
    """
    dtype, reason = _decide_dtype(args, settings)
    check_data_types(args, settings, dtype)
    return dtype, reason


def _decide_dtype(args: Namespace, settings: dict[str, Any]) -> tuple[str, str]:
    decide = resolve_dtype if parse_gpus(args.dry_run) is None else planned_dtype
    in_file = enabled_precision(settings)
    if in_file == "fp32":
        dtype, reason = decide(args.dtype)
        if disables(settings, dtype):
            return "fp32", f"the DeepSpeed configuration turns {dtype} off"
        return dtype, reason
    try:
        dtype, reason = decide(in_file)
    except UserError as err:
        raise UserError(f"--deepspeed_config {args.deepspeed_config} turns {in_file} on: {err}") from err
    reason = reason.replace("as asked", "as the DeepSpeed configuration says")
    return dtype, reason + f", in place of --dtype {args.dtype}" * (args.dtype not in ("auto", dtype))


def describe_file(path: str, file: DeepSpeedFile, dtype: str) -> str:
    """Return a line on what of the file of `--deepspeed_config` is used and what is not."""
    idle = [name for name in ("bf16", "fp16") if name != dtype and file.settings.get(name, {}).keys() - {"enabled"}]
    settings = [name for name in file.settings if name not in idle]
    notes = [*file.notes, *(f"{name}'s settings wait for that precision" for name in idle)]
    laid = f"{path} laid over the generated one: {', '.join(settings) or 'nothing'}"
    return f"{laid} ({'; '.join(notes)})" if notes else laid


def averaged_over(groups: int, group_size: int, zero_stage: int) -> int:
    """Return the number DeepSpeed (0.19.8) divides the gradients by that it sums over all ranks.

    The ranks of a sequence parallel group hold parts of one gradient, so it divides by the number of groups; but at
    ZeRO 3, where gradients go through `reduce_scatter_coalesced`, by the number of all ranks.
    """
    return groups * (group_size if zero_stage == 3 else 1)
