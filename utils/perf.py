"""Throughput: real tokens and samples per second, FLOPs by the Megatron-LM formula, share of the device's peak."""

import re
from argparse import Namespace
from typing import Any, NamedTuple

import torch

from utils.distributed.zero3 import whole_numel, whole_shape
from utils.logging.console import say

# Peak rate of dense 16-bit matrix products in TFLOP/s by the vendors' data sheets. Of several names that are contained
# in a device's name the longest counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "H800": 989, "B200": 2250, "GB200": 2500,
    "A100": 312, "A800": 312, "A10G": 70, "A10": 125, "A30": 165, "A40": 150, "A6000": 155,
    "V100": 125, "T4": 65, "L4": 121, "L40S": 362, "L40": 181,
    "RTX 3090": 71, "RTX 4090": 165, "RTX 5090": 210, "MI250X": 383, "MI300X": 1307,
}  # fmt: skip


class ModelShape(NamedTuple):
    """The sizes of a model that its FLOPs depend on."""

    hidden: int  # width
    layers: int
    vocabulary: int
    block_weights: int  # weights of the transformer blocks, each counted once


def model_shape(model: torch.nn.Module) -> ModelShape:
    """Return the shape of any decoder-only model, without LoRA's weights."""
    config = model.config.get_text_config()
    embeddings = {
        id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module
    }
    total = 0
    for name, parameter in model.named_parameters():
        is_table = id(parameter) in embeddings or "embed_positions" in name or name.endswith("wpe.weight")
        if len(whole_shape(parameter)) > 1 and not is_table and "lora_" not in name:
            total += whole_numel(parameter)
    vocabulary = whole_shape(model.get_input_embeddings().weight)[0]
    return ModelShape(config.hidden_size, config.num_hidden_layers, vocabulary, total)


def flops_per_token(shape: ModelShape, length: float, passes: float = 3.0) -> float:
    """Return the FLOPs to train on one token of a sequence of `length` tokens.

    Megatron-LM (Narayanan et al. 2021, https://arxiv.org/abs/2104.04473, appendix): for B sequences of length s, l
    layers of width h and vocabulary V, `72 B s l h^2 (1 + s/6h + V/12lh)` with 3 passes (one forward, two backward).
    Here it is per token, with the actual number of the blocks' weights in place of 12 l h^2, so it also holds for
    grouped-query attention and gated MLPs.

    Args:
        passes: forward-equivalents, as of `training_passes`.
    """
    blocks = 2 * shape.block_weights
    attention = 4 * shape.layers * shape.hidden * length
    head = 2 * shape.hidden * shape.vocabulary
    return passes * (blocks + attention + head)


def training_passes(model: torch.nn.Module, gradient_checkpointing: bool) -> float:
    """Return the forward-equivalents of a step: 3 where all weights train and nothing is checkpointed.

    They are the forward, the gradient of the activations, that of the weights (for the share of them that trains), and
    with checkpointing the second forward.
    """
    sizes = [(whole_numel(p), p.requires_grad) for p in model.parameters()]
    trainable = sum(numel for numel, trains in sizes if trains) / max(sum(numel for numel, _ in sizes), 1)
    return 2.0 + trainable + (1.0 if gradient_checkpointing else 0.0)


def device_peak(name: str) -> int | None:
    """Return the 16-bit peak of the device called `name` in TFLOP/s; None when it is not in the table."""
    # Whole words only: a T400 is no T4, an RTX A4000 no A40. An RTX 4090 Laptop GPU is another chip.
    found = [key for key in PEAK_TFLOPS if re.search(rf"\b{key}\b(?! (?:Ti|D|Laptop)\b)", name)]
    return PEAK_TFLOPS[max(found, key=len)] if found else None


class Work(NamedTuple):
    """What all ranks together trained on in a span of time."""

    tokens: int  # real ones: padding is not counted
    samples: int
    seconds: float


class Throughput(NamedTuple):
    """The rates of some work."""

    tokens_per_second: float  # of all ranks; padding is not counted
    samples_per_second: float  # of all ranks
    tflops: float  # TFLOP/s per device
    peak_share: float | None  # of the device's 16-bit peak; None where that is unknown


def measure_throughput(
    hf_model: torch.nn.Module, gradient_checkpointing: bool, work: Work, *, world_size: int, device_name: str
) -> Throughput:
    """Return the rates of `work`.

    Args:
        hf_model: the bare model.
        gradient_checkpointing: the forward is computed twice.
        world_size: the number of ranks that did the work.
        device_name: their device's name, for its peak.
    """
    tokens, samples, seconds = work
    passes = training_passes(hf_model, gradient_checkpointing)
    flops = tokens * flops_per_token(model_shape(hf_model), tokens / max(samples, 1), passes)
    tflops = flops / seconds / world_size / 1e12
    peak = device_peak(device_name)
    return Throughput(tokens / seconds, samples / seconds, tflops, tflops / peak if peak else None)


def throughput_line(rates: Throughput, world_size: int, device_name: str) -> str:
    """Return a line with the rates, the number of ranks and the share of the device's peak."""
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
    tokens: int | None = None,
    samples: int = 0,
    world_size: int = 1,
    device_name: str = "",
) -> str:
    """Print (on rank 0) and return one throughput line for what was done in `e2e_time` seconds.

    Args:
        hf_model: the bare model.
        args: its `gradient_checkpointing` is read.
        tokens: tokens over all ranks; padding is not counted. None: one micro batch of padded rows, as DeepSpeed-Chat
            counts it from `args` (see `padded_throughput_line`).
        samples: samples over all ranks.
    """
    if tokens is None:
        line = padded_throughput_line(hf_model, args, e2e_time)
    else:
        work = Work(tokens, samples, e2e_time)
        rates = measure_throughput(
            hf_model, args.gradient_checkpointing, work, world_size=world_size, device_name=device_name
        )
        line = throughput_line(rates, world_size, device_name)
    if rank <= 0:
        say(line)
    return line


def padded_throughput_line(hf_model: torch.nn.Module, args: Namespace, seconds: float) -> str:
    """Return DeepSpeed-Chat's line for one micro batch of `per_device_train_batch_size` rows of `max_seq_len` tokens.

    All figures are one device's, whatever the number of ranks. FLOPs by `padded_flops`, in which every token counts,
    padding too.
    """
    rows, length = args.per_device_train_batch_size, args.max_seq_len
    passes = 4.0 if args.gradient_checkpointing else 3.0
    if args.lora_dim > 0:  # all but the gradients of the weights that LoRA froze
        passes -= 1 - 2 * args.lora_dim / hf_model.config.get_text_config().hidden_size
    billions = sum(whole_numel(parameter) for parameter in hf_model.parameters()) / 1e9
    tflops = padded_flops(passes, rows, length, hf_model.config.get_text_config()) / seconds / 1e12
    return (
        f"Model Parameters: {billions:.3f} B, Latency: {seconds:.2f}s, TFLOPs: {tflops:.2f}, "
        f"Samples/sec: {rows / seconds:.2f}, Time/seq {seconds / rows:.2f}s, Batch Size: {rows}, "
        f"Sequence Length: {length}"
    )


def padded_flops(passes: float, rows: int, length: int, config: Any) -> float:
    """Return Megatron-LM's FLOPs of `passes` forward-equivalents: `24 B s l h^2 (1 + s/6h + V/16lh)` for each.

    `V/16lh` is for the 4 passes of activation checkpointing, of which the head takes only 3.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    extra = length / (6 * hidden) + config.vocab_size / (16 * layers * hidden)
    return 24 * passes * rows * length * layers * hidden**2 * (1 + extra)
