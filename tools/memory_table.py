"""Print the memory per GPU by ZeRO stage and offload, and the largest OPT that fits.

    python -m tools.memory_table --model_name_or_path NAME --gpus 8 --gpu_memory 80

Only the model's configuration is loaded; `utils.dry_run.memory` makes the estimate. A gigabyte is 1e9 bytes.
"""

import argparse
from argparse import Namespace
from typing import Any

from transformers import OPTConfig, PretrainedConfig

from utils.distributed.failures import end_run
from utils.dry_run.activation_memory import Layout, count, simulated_model
from utils.dry_run.memory import GB, USABLE, quantized_counts, stage_choices, stage_name
from utils.dry_run.zero_memory import Sizes, estimate, setting_from_config
from utils.ds_utils import get_train_ds_config
from utils.errors import UserError
from utils.model.build import ModelForm
from utils.model.model_utils import load_model_config

# Layers, width, heads (Zhang et al. 2022, https://arxiv.org/abs/2205.01068, table 1; 350m has post-norms, left out).
OPT = {
    "125m": (12, 768, 12), "1.3b": (24, 2048, 32), "2.7b": (32, 2560, 32), "6.7b": (32, 4096, 32),
    "13b": (40, 5120, 40), "30b": (48, 7168, 56), "66b": (64, 9216, 72), "175b": (96, 12288, 96),
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `python -m tools.memory_table`; names and meanings are main.py's where it has them."""
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
    add("--quantize_base", choices=["nf4"], default=None, help="as in training; none as there; not at ZeRO 3")
    return parser


def check(args: Namespace) -> None:
    """Raise a UserError on values that are out of range."""
    names = ("gpus", "gpu_memory", "per_device_train_batch_size")
    wrong = [f"--{name} must be above 0, not {getattr(args, name)}." for name in names if getattr(args, name) <= 0]
    wrong += [f"--max_seq_len must be at least 2, not {args.max_seq_len}."] if args.max_seq_len < 2 else []
    if args.only_optimize_lora and args.lora_dim <= 0:
        wrong.append("--only_optimize_lora needs --lora_dim above 0.")
    if args.quantize_base and not (args.lora_dim > 0 and args.only_optimize_lora):
        wrong.append("--quantize_base needs --lora_dim above 0 and --only_optimize_lora.")
    if wrong:
        raise UserError(" ".join(wrong))


def opt_config(name: str) -> OPTConfig:
    """Return the configuration of a published OPT."""
    layers, width, heads = OPT[name]
    return OPTConfig(
        hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, vocab_size=50272, max_position_embeddings=2048,
    )  # fmt: skip


def sizes_of(config: PretrainedConfig, args: Namespace, **changes: Any) -> Sizes:
    """Count a model on GPUs when all samples have the full length; `changes` replace fields of its form."""
    form = ModelForm(
        lora_dim=args.lora_dim, lora_module_name=args.lora_module_name, only_optimize_lora=args.only_optimize_lora,
        gradient_checkpointing=args.gradient_checkpointing, quantize_base=args.quantize_base,
    )._replace(**changes)  # fmt: skip
    tokens = args.per_device_train_batch_size * args.max_seq_len
    layout = Layout(1, tokens, tokens - args.per_device_train_batch_size)
    packed = quantized_counts(config, form)
    return Sizes(*count(simulated_model(config, form, args.dtype), layout)._replace(**packed))


def table(args: Namespace) -> str:
    """Return the table, as Markdown, and the rule of thumb below it."""
    usable = USABLE * args.gpu_memory * GB
    own = sizes_of(load_model_config(args.model_name_or_path), args)
    family = {name: sizes_of(opt_config(name), args) for name in OPT}
    checkpointing = "on" if args.gradient_checkpointing else "off"
    in_4_bits = f", {own.quantized / GB:.3g}B parameters in 4 bits, which ZeRO 3 can't hold" * (own.quantized > 0)
    lines = [
        f"{args.gpus} GPUs of {args.gpu_memory:g} GB, {USABLE:.0%} of it for tensors; {own.parameters / GB:.3g}B "
        f"parameters, {own.trainable / GB:.3g}B train;\n{args.per_device_train_batch_size} samples of "
        f"{args.max_seq_len} tokens per GPU, {args.dtype}, checkpointing {checkpointing}{in_4_bits}\n",
        "| ZeRO | GB per GPU | fits | CPU GB per GPU | largest OPT that fits |\n| --- | --- | --- | --- | --- |",
    ]
    for stage, offload in stage_choices(own.quantized > 0):
        setting = setting_from_config(
            get_train_ds_config(offload, stage, args.dtype), args.gpus, 4 if args.dtype == "fp32" else 2, on_cpu=False
        )
        memory = estimate(own, setting)
        fitting = [name for name, sizes in family.items() if estimate(sizes, setting).peak <= usable]
        lines.append(
            f"| {stage_name(stage, offload)} | {memory.peak / GB:.1f} | {'yes' if memory.peak <= usable else 'no'} | "
            f"{memory.host / GB:.1f} | {fitting[-1] if fitting else 'none'} |"
        )
    return "\n".join([*lines, "", rule_of_thumb(args, usable)])


def rule_of_thumb(args: Namespace, usable: float) -> str:
    """Return the rule of thumb, GPU gigabytes / 3 in billions of parameters, beside the estimate for it."""
    lora = {"lora_dim": args.lora_dim or 128, "only_optimize_lora": True, "gradient_checkpointing": True}
    lora["quantize_base"] = None  # which ZeRO 3 can't hold
    size = 4 if args.dtype == "fp32" else 2
    setting = setting_from_config(get_train_ds_config(False, 3, args.dtype), args.gpus, size, on_cpu=False)
    from_large = reversed(OPT)
    fits = (name for name in from_large if estimate(sizes_of(opt_config(name), args, **lora), setting).peak <= usable)
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
