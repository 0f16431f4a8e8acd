"""What a run needs per device, and what fits.

    python -m utils.memory --model_name_or_path NAME --gpus 8 --gpu_memory 80

Nothing is loaded but the model's configuration: the model is built on the meta device and one micro batch runs through
it without data (`utils.model.simulate`); `utils.memory_estimate` does the arithmetic of ZeRO. A gigabyte is 1e9 bytes.
"""

import argparse
import os
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from transformers import OPTConfig, PretrainedConfig

from utils.ds_utils import get_train_ds_config
from utils.errors import UserError
from utils.failures import end_run
from utils.hardware import Gpus
from utils.memory_estimate import Estimate, Setting, Sizes, estimate, setting_from_config
from utils.model.model_utils import load_model_config
from utils.model.simulate import Counts, Layout, count, meta_model

GB = 1e9
PARTS = ("weights", "gradients", "optimizer", "activations", "logits and loss", "buffers")
ROOM = 0.92  # share of a GPU that tensors can have: its context, NCCL and fragmentation take the rest
CHOICES = [(stage, offload) for stage in range(4) for offload in ((False, True) if stage else (False,))]
# Layers, width, heads (Zhang et al. 2022, https://arxiv.org/abs/2205.01068, table 1; 350m has post-norms, left out).
OPT = {
    "125m": (12, 768, 12), "1.3b": (24, 2048, 32), "2.7b": (32, 2560, 32), "6.7b": (32, 4096, 32),
    "13b": (40, 5120, 40), "30b": (48, 7168, 56), "66b": (64, 9216, 72), "175b": (96, 12288, 96),
}  # fmt: skip


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


def free_memory() -> float:
    """Bytes of CPU memory that are free for each rank of this node."""
    free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    return free / ranks_here()


def ranks_here() -> int:
    """Ranks of this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))


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


# ------------------------------------------------------------------------------------------- the table


def build_parser() -> argparse.ArgumentParser:
    """The parser of `python -m utils.memory`; names and meanings are main.py's where it has them."""
    parser = argparse.ArgumentParser(
        description="What fits: memory per GPU by ZeRO stage and offload, and the largest OPT.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="a folder with config.json, or a hub name; no weights are read")
    add("--gpus", type=int, default=8, help="over all nodes; 8 is one usual node")
    add("--gpu_memory", type=float, default=80, help="gigabytes of each; 80 as in an A100 or H100")
    add("--per_device_train_batch_size", type=int, default=4, help="samples per forward; 4 as in the large scripts")
    add("--max_seq_len", type=int, default=512, help="every sample is taken to be that long; 512 as in training")
    add("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="bf16 is what --dtype auto takes on a GPU")
    add("--gradient_checkpointing", action="store_true", help="as in training; off as there")
    add("--lora_dim", type=int, default=0, help="as in training; 0 as there")
    add("--lora_module_name", default="auto", help="as in training; auto, since it fits every family")
    add("--only_optimize_lora", action="store_true", help="as in training; off as there")
    return parser


def check(args: Namespace) -> None:
    """UserError on values that mean nothing."""
    names = ("gpus", "gpu_memory", "per_device_train_batch_size")
    wrong = [f"--{name} must be above 0, not {getattr(args, name)}." for name in names if getattr(args, name) <= 0]
    wrong += [f"--max_seq_len must be at least 2, not {args.max_seq_len}."] if args.max_seq_len < 2 else []
    if args.only_optimize_lora and args.lora_dim <= 0:
        wrong.append("--only_optimize_lora needs --lora_dim above 0.")
    if wrong:
        raise UserError(" ".join(wrong))


def opt_config(name: str) -> OPTConfig:
    """The configuration of a published OPT."""
    layers, width, heads = OPT[name]
    return OPTConfig(
        hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, vocab_size=50272, max_position_embeddings=2048,
    )  # fmt: skip


def sizes_of(config: PretrainedConfig, args: Namespace, **changes: Any) -> Sizes:
    """Counts of a model on GPUs when all samples are of the full length."""
    options = {"disable_dropout": False, "dropout": None, "lora_alpha": 1.0, "lora_dropout": 0.0}
    wanted = Namespace(**{**vars(args), **options, **changes})
    tokens = args.per_device_train_batch_size * args.max_seq_len
    layout = Layout(1, tokens, tokens - args.per_device_train_batch_size)
    return Sizes(*count(meta_model(config, wanted, args.dtype), layout))


def table(args: Namespace) -> str:
    """The table, as Markdown, and the rule of thumb below it."""
    room = ROOM * args.gpu_memory * GB
    own = sizes_of(load_model_config(args.model_name_or_path), args)
    family = {name: sizes_of(opt_config(name), args) for name in OPT}
    checkpointing = "on" if args.gradient_checkpointing else "off"
    lines = [
        f"{args.gpus} GPUs of {args.gpu_memory:g} GB, of which tensors can have {ROOM:.0%}; {own.parameters / GB:.3g}B "
        f"parameters, {own.trainable / GB:.3g}B train;\n{args.per_device_train_batch_size} samples of "
        f"{args.max_seq_len} tokens per GPU, {args.dtype}, checkpointing {checkpointing}\n",
        "| ZeRO | GB per GPU | fits | CPU GB per GPU | largest OPT that fits |\n| --- | --- | --- | --- | --- |",
    ]
    for stage, offload in CHOICES:
        setting = setting_from_config(
            get_train_ds_config(offload, stage, args.dtype), args.gpus, 4 if args.dtype == "fp32" else 2, on_cpu=False
        )
        guess = estimate(own, setting)
        fitting = [name for name, sizes in family.items() if estimate(sizes, setting).peak <= room]
        lines.append(
            f"| {_name(stage, offload)} | {guess.peak / GB:.1f} | {'yes' if guess.peak <= room else 'no'} | "
            f"{guess.host / GB:.1f} | {fitting[-1] if fitting else 'none'} |"
        )
    return "\n".join([*lines, "", rule_of_thumb(args, room)])


def rule_of_thumb(args: Namespace, room: float) -> str:
    """GPU gigabytes / 3 in billions of parameters, beside what the estimate says under the rule's conditions."""
    lora = {"lora_dim": args.lora_dim or 128, "only_optimize_lora": True, "gradient_checkpointing": True}
    size = 4 if args.dtype == "fp32" else 2
    setting = setting_from_config(get_train_ds_config(False, 3, args.dtype), args.gpus, size, on_cpu=False)
    from_large = reversed(OPT)
    fits = (name for name in from_large if estimate(sizes_of(opt_config(name), args, **lora), setting).peak <= room)
    return (
        f"Rule of thumb, ZeRO 3 with checkpointing and LoRA: {args.gpus} x {args.gpu_memory:g} GB / 3 = up to "
        f"{args.gpus * args.gpu_memory / 3:.0f}B parameters; by the estimate the largest OPT is {next(fits, 'none')} "
        f"(LoRA {lora['lora_dim']} alone)."
    )


if __name__ == "__main__":
    try:
        given = build_parser().parse_args()
        check(given)
        print(table(given))
    except UserError as err:
        end_run(err, rank=0)
