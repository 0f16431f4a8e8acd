"""Throughput lines: real tokens, FLOPs by the Megatron-LM formula, share of the device's known peak."""

import re
from argparse import Namespace
from typing import NamedTuple

import torch

from utils.logging.console import say

# Dense 16-bit matrix rate in TFLOP/s by the vendors' data sheets; the longest name contained wins.
PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "H800": 989, "B200": 2250, "GB200": 2500,
    "A100": 312, "A800": 312, "A10G": 70, "A10": 125, "A30": 165, "A40": 150, "A6000": 155,
    "V100": 125, "T4": 65, "L4": 121, "L40S": 362, "L40": 181,
    "RTX 3090": 71, "RTX 4090": 165, "RTX 5090": 210, "MI250X": 383, "MI300X": 1307,
}  # fmt: skip


class ModelShape(NamedTuple):
    """What the FLOP count needs to know of a model."""

    hidden: int
    layers: int
    vocabulary: int
    block_weights: int  # weights of the transformer blocks, each counted once


def model_shape(model: torch.nn.Module) -> ModelShape:
    """Read the shape off any decoder-only model; LoRA's own weights are not part of it."""
    config = model.config.get_text_config()
    embeddings = {
        id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module
    }
    total = 0
    for name, parameter in model.named_parameters():
        numel = getattr(parameter, "ds_numel", parameter.numel())
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        is_table = id(parameter) in embeddings or "embed_positions" in name or name.endswith("wpe.weight")
        if dimensions > 1 and not is_table and "lora_" not in name:
            total += numel
    vocabulary = getattr(model.get_input_embeddings().weight, "ds_shape", model.get_input_embeddings().weight.shape)[0]
    return ModelShape(config.hidden_size, config.num_hidden_layers, vocabulary, total)


def flops_per_token(shape: ModelShape, length: float, passes: float = 3.0) -> float:
    """FLOPs to train on one token of a sequence of `length` tokens.

    Megatron-LM (Narayanan et al. 2021, https://arxiv.org/abs/2104.04473, appendix): for B sequences of
    length s, l layers of width h and vocabulary V, `72 B s l h^2 (1 + s/6h + V/12lh)` with 3 passes (one
    forward, two backward). Written here per token with the blocks' true weight count in place of 12 l h^2,
    so that grouped-query attention and gated MLPs count as they are.

    Args:
        passes: 3; 4 when checkpointing computes the forward twice; less when weights are frozen.
    """
    blocks = 2 * shape.block_weights
    attention = 4 * shape.layers * shape.hidden * length
    head = 2 * shape.hidden * shape.vocabulary
    return passes * (blocks + attention + head)


def training_passes(model: torch.nn.Module, gradient_checkpointing: bool) -> float:
    """Forward-equivalents per step: the forward, the activations' gradient, and the trainable weights' own."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    trainable = sum(numel for numel, trains in sizes if trains) / max(sum(numel for numel, _ in sizes), 1)
    return 2.0 + trainable + (1.0 if gradient_checkpointing else 0.0)


def device_peak(name: str) -> int | None:
    """Known 16-bit peak of the device called `name` in TFLOP/s; None when it is not in the table."""
    # Whole words: a T400 is no T4, an RTX A4000 no A40; and an RTX 4090 Laptop GPU shares only the name.
    found = [key for key in PEAK_TFLOPS if re.search(rf"\b{key}\b(?! (?:Ti|D|Laptop)\b)", name)]
    return PEAK_TFLOPS[max(found, key=len)] if found else None


class Throughput(NamedTuple):
    """What all ranks did in a span of time."""

    tokens_per_second: float  # real (unpadded) ones
    samples_per_second: float
    tflops: float  # per device
    peak_share: float | None  # of the device's 16-bit peak, None where that is unknown


def measure_throughput(
    hf_model: torch.nn.Module,
    args: Namespace,
    seconds: float,
    *,
    tokens: int,
    samples: int,
    world_size: int,
    device_name: str,
) -> Throughput:
    """The rates of work all ranks did in `seconds`; arguments as of `print_throughput`."""
    passes = training_passes(hf_model, args.gradient_checkpointing)
    flops = tokens * flops_per_token(model_shape(hf_model), tokens / max(samples, 1), passes)
    tflops = flops / seconds / world_size / 1e12
    peak = device_peak(device_name)
    return Throughput(tokens / seconds, samples / seconds, tflops, tflops / peak if peak else None)


def throughput_line(rates: Throughput, world_size: int, device_name: str) -> str:
    """The rates in words."""
    share = f"peak of {device_name} unknown"
    if rates.peak_share is not None:
        share = f"{rates.peak_share:.1%} of {device_name}'s {device_peak(device_name)}"
    return (
        f"Throughput: {rates.tokens_per_second:.0f} real tokens/s, {rates.samples_per_second:.2f} samples/s, "
        f"{rates.tflops:.4g} TFLOP/s per device ({share}), {world_size} rank{'s' * (world_size > 1)}"
    )


def print_throughput(
    hf_model: torch.nn.Module,
    args: Namespace,
    e2e_time: float,
    rank: int = 0,
    *,
    tokens: int,
    samples: int,
    world_size: int,
    device_name: str,
) -> str:
    """Print (rank 0) and return one throughput line for the work all ranks did in `e2e_time` seconds.

    Args:
        hf_model: the bare model.
        args: `gradient_checkpointing` is read.
        tokens: real (unpadded) tokens over all ranks.
        samples: samples over all ranks.
    """
    rates = measure_throughput(
        hf_model, args, e2e_time, tokens=tokens, samples=samples, world_size=world_size, device_name=device_name
    )
    line = throughput_line(rates, world_size, device_name)
    if rank <= 0:
        say(line)
    return line
