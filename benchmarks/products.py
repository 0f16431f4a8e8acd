"""Time the matrix products of a step on a CPU, by shape and layout, against a large square product, in turns.

    python benchmarks/products.py [--tokens 2048] [--dtype bf16] [--rounds 9]

Each linear layer of OPT-125m's shape multiplies three times: its output, the gradient of its input and the gradient of
its weight. The last one has tokens as its inner dimension, and one side is read across its rows: beside it stand the
same product from a transposed copy, with the copy's time, and without.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

LAYERS = {"attention, 768 to 768": (768, 768), "MLP up, 768 to 3072": (768, 3072), "MLP down, 3072 to 768": (3072, 768)}
VOCABULARY = 50272
BLOCK = 2048  # rows of the head's gradient, as in utils/module/chunk_loss.py


def products(tokens: int, width: int, outputs: int, dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the products of one linear layer over so many tokens, by name."""
    inputs, weight = torch.randn(tokens, width).to(dtype), torch.randn(outputs, width).to(dtype)
    bias, gradient = torch.randn(outputs).to(dtype), torch.randn(tokens, outputs).to(dtype)
    across = gradient.t().contiguous()
    return {
        "output": lambda: F.linear(inputs, weight, bias),
        "gradient of the input": lambda: gradient @ weight,
        "gradient of the weight": lambda: gradient.t() @ inputs,
        "... from the input's side": lambda: (inputs.t() @ gradient).t(),
        "... from a copy made here": lambda: gradient.t().contiguous() @ inputs,
        "... from a copy that is there": lambda: across @ inputs,
    }


def head_products(tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return those of the head, whose results are large: also into memory that is there, and in blocks."""
    hidden, weight = torch.randn(tokens, 768).to(dtype), torch.randn(VOCABULARY, 768).to(dtype)
    logits, kept = torch.randn(tokens, VOCABULARY).to(dtype), torch.empty(tokens, VOCABULARY, dtype=dtype)
    total = torch.zeros(VOCABULARY, 768)

    def in_blocks() -> None:
        for rows, columns in zip(total.split(BLOCK), logits.split(BLOCK, dim=1), strict=True):
            rows.add_(columns.t() @ hidden)

    return {
        "output": lambda: F.linear(hidden, weight),
        "output into memory that is there": lambda: torch.mm(hidden, weight.t(), out=kept),
        "gradient of the input": lambda: logits @ weight,
        "gradient of the weight, added up": lambda: total.add_(logits.t() @ hidden),
        f"... in blocks of {BLOCK} rows": in_blocks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro batch")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--rounds", type=int, default=9, help="times each product is timed; the middle one counts")
    args = parser.parse_args()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    square = torch.randn(2048, 2048).to(dtype)
    timed = {("square", "2048 x 2048 x 2048"): (2 * 2048**3, lambda: square @ square.t())}
    for layer, (width, outputs) in LAYERS.items():
        for name, product in products(args.tokens, width, outputs, dtype).items():
            timed[layer, name] = (2 * args.tokens * width * outputs, product)
    for name, product in head_products(args.tokens // 2, dtype).items():
        timed[f"head, 768 to {VOCABULARY}, half of the tokens", name] = (args.tokens * 768 * VOCABULARY, product)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in timed}
    for number in range(args.rounds + 1):
        for key, (_, product) in timed.items():
            begin = time.perf_counter()
            product()
            if number:
                seconds[key].append(time.perf_counter() - begin)
    rates = {key: timed[key][0] / statistics.median(taken) / 1e9 for key, taken in seconds.items()}
    best = rates["square", "2048 x 2048 x 2048"]
    print(f"{args.dtype}, {torch.get_num_threads()} threads, {args.tokens} tokens, median of {args.rounds}")
    print("| layer | product | GFLOP/s | of the square's |\n| --- | --- | --- | --- |")
    for (layer, name), rate in rates.items():
        print(f"| {layer} | {name} | {rate:.0f} | {rate / best:.0%} |")


if __name__ == "__main__":
    main()
