"""Attention of one document on a CPU: torch's kernel in bf16 against the same in float32, speed and rounding.

    python benchmarks/attention.py

Forward and backward of causal attention as `utils.module.attention` calls it, on bf16 queries, keys and values of
OPT-125m's 12 heads of 64; the two take turns. Errors are those of output and gradients together against float64.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from utils.machine.cpu_allocator import keep_freed_memory

LENGTHS = (30, 64, 100, 160, 200, 256, 300, 400, 512, 1024)
HEADS, SIZE, TURNS = 12, 64, 15


def attention_and_gradients(inputs: list[torch.Tensor], output_gradient: torch.Tensor, dtype: torch.dtype) -> tuple:
    """(output, gradients of query, key and value), computed in `dtype`, given in the dtype of the inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = F.scaled_dot_product_attention(*(leaf.to(dtype) for leaf in leaves), is_causal=True)
    output = output.to(output_gradient.dtype)
    return output.detach(), *torch.autograd.grad(output, leaves, output_gradient)


def error(found: tuple, exact: tuple) -> float:
    """Norm of the difference over the norm, of all tensors together."""
    pairs = list(zip(found, exact, strict=True))
    wrong = sum((one.double() - other).square().sum() for one, other in pairs)
    return float((wrong / sum(other.square().sum() for _, other in pairs)).sqrt())


def main() -> None:
    keep_freed_memory()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {TURNS}\n")
    print("| tokens | bf16 ms | float32 ms | bf16 / float32 | error in bf16 | error in float32 |")
    print("| --- | --- | --- | --- | --- | --- |")
    for length in LENGTHS:
        inputs = [torch.randn(1, length, HEADS, SIZE).bfloat16().transpose(1, 2) for _ in range(3)]
        gradient = torch.randn(1, length, HEADS, SIZE).bfloat16().transpose(1, 2)
        exact = attention_and_gradients([tensor.double() for tensor in inputs], gradient.double(), torch.float64)
        seconds: dict[torch.dtype, list[float]] = {torch.bfloat16: [], torch.float32: []}
        errors = {}
        for _ in range(TURNS):
            for dtype, taken in seconds.items():
                start = time.perf_counter()
                found = attention_and_gradients(inputs, gradient, dtype)
                taken.append(time.perf_counter() - start)
                errors[dtype] = error(found, exact)
        half, single = (1000 * statistics.median(taken) for taken in seconds.values())
        print(
            f"| {length} | {half:.2f} | {single:.2f} | {half / single:.2f} | "
            f"{errors[torch.bfloat16]:.1e} | {errors[torch.float32]:.1e} |"
        )


if __name__ == "__main__":
    main()
