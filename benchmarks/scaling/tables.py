"""Tables of `scaling.py model`: the arithmetic of `step_model.py` for OPTs on 8 to 512 GPUs."""

import argparse
import sys
from argparse import Namespace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.scaling.step_model import BYTES_16, Cluster, Work, state_bytes, step, traffic  # noqa: E402
from utils.perf import ModelShape, flops_per_token  # noqa: E402

# Layers and width (Zhang et al. 2022, https://arxiv.org/abs/2205.01068, table 1).
SIZES = {"1.3b": (24, 2048), "13b": (40, 5120), "66b": (64, 9216)}
VOCABULARY, POSITIONS = 50272, 2050
GPUS = (8, 64, 512)
MAX_GB = 80
# Stage, hpZ. Stage 1 moves what stage 2 does, and 0 less than both, as DeepSpeed does it.
WAYS = {"0": (0, False), "2": (2, False), "3": (3, False), "3, hpZ": (3, True)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The assumptions, each with the reason of its default."""
    default, group = Cluster(), parser.add_argument_group("assumptions of `model`")
    add = group.add_argument
    add("--node", type=int, default=default.node, help="GPUs of a node; 8 is usual")
    add("--in_node", type=float, default=default.in_node / 1e9, help="GB/s a GPU sends within its node: NVLink 4")
    add("--between", type=float, default=default.between / 1e9, help="GB/s a node sends to others: 400 Gb/s")
    add("--peak", type=float, default=default.peak / 1e12, help="16-bit TFLOP/s of a GPU: H100 SXM's data sheet")
    add(
        "--share_of_peak", type=float, default=default.share_of_peak,
        help="of it while computing; 0.4 is the lower end of what is published for dense training on H100s",
    )  # fmt: skip
    add("--overlap", type=float, default=default.overlap, help="share of communication behind computing; a guess")
    add("--tokens", type=int, default=4096, help="of a GPU's micro batch: 8 rows of 512")
    add("--length", type=int, default=160, help="mean tokens of a sample, for attention's FLOPs: dialogues")
    add("--accumulation", type=int, default=1, help="micro batches a step; 1 as in training")
    add("--lora_dim", type=int, default=16, help="rank of LoRA, in all linear layers of the blocks, alone")


def shape_of(size: str) -> tuple[ModelShape, int]:
    """An OPT's shape and all its weights, but for norms and biases."""
    layers, width = SIZES[size]
    blocks = 12 * layers * width**2
    return ModelShape(width, layers, VOCABULARY, blocks), blocks + (VOCABULARY + POSITIONS) * width


def work_of(size: str, lora: bool, args: Namespace) -> Work:
    """Checkpointing computes the forward twice; LoRA leaves out the gradients of frozen weights (`utils.perf`)."""
    shape, parameters = shape_of(size)
    tied = shape.vocabulary * shape.hidden
    added = 18 * shape.layers * shape.hidden * args.lora_dim  # four squares, and two matrices of h x 4h
    passes = 3.0 + added / (parameters + added) if lora else 4.0
    total, trainable = (parameters + added, added) if lora else (parameters, parameters)
    return Work(total, trainable, args.tokens, flops_per_token(shape, args.length, passes), args.accumulation, tied)


def assumptions(args: Namespace) -> str:
    """Every assumption, printed above the tables."""
    return (
        f"Assumptions: nodes of {args.node} GPUs; each GPU sends {args.in_node:g} GB/s within its node, each node "
        f"{args.between:g} GB/s to others; rings, no latency; {args.peak:g} TFLOP/s peak, of which computing reaches "
        f"{args.share_of_peak:.0%}; {args.overlap:.0%} of the communication hides behind computing, as far as there is "
        f"any; 16 bits on the wire; {args.tokens} tokens a GPU and micro batch in samples of {args.length}, "
        f"{args.accumulation} micro batch(es) a step; checkpointing; LoRA {args.lora_dim} alone. Bytes are DeepSpeed's "
        "(gradients all-reduced at stages 1 and 2, the tied embedding gathered for each use at stage 3). States: 16 "
        "bytes a trained weight and 2 a frozen one, divided as ZeRO divides them; activations and buffers come on top."
    )


def tables(args: Namespace) -> str:
    """Assumptions, and a table for each size, full and LoRA."""
    cluster = Cluster(
        args.node, args.in_node * 1e9, args.between * 1e9, args.peak * 1e12, args.share_of_peak, args.overlap
    )
    lines = [assumptions(args)]
    for size in SIZES:
        for lora in (False, True):
            work = work_of(size, lora, args)
            lines += [
                f"\n{size}, {'LoRA' if lora else 'full'}: {work.parameters / 1e9:.2f}B weights, "
                f"{work.trainable / 1e9:.4g}B train\n",
                "| GPUs | ZeRO | states GB | GB sent a step | step s | communication s | not hidden | tokens/s | "
                "efficiency |",
                "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            ]
            lines += [row(work, ranks, way, cluster) for ranks in GPUS for way in WAYS]
    return "\n".join(lines)


def row(work: Work, ranks: int, way: str, cluster: Cluster) -> str:
    """One setting; efficiency is the share of the step in which the GPU computes."""
    stage, hpz = WAYS[way]
    states = state_bytes(stage, work.parameters, work.trainable, ranks, cluster.node if hpz else 0) / 1e9
    moved = traffic(stage, work.parameters, work.trainable, BYTES_16, work.accumulation, hpz=hpz, tied=work.tied)
    found = step(work, moved, ranks, cluster)
    return (
        f"| {ranks} | {way} | {states:.1f}{' (too much)' if states > MAX_GB else ''} | {found.sent / 1e9:.2f} | "
        f"{found.seconds:.3f} | {found.communication:.3f} | {found.exposed / found.seconds:.0%} | "
        f"{found.tokens_per_second:,.0f} | {found.computing / found.seconds:.0%} |"
    )
