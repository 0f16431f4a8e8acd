"""Time the optimizer step in 16 bits without ZeRO: the sweep over pieces against DeepSpeed's own, in turns.

    python benchmarks/optimizer_step.py [--rounds 8] [--piece ELEMENTS]

The model has OPT-125m's shape; both optimizers get gradients of the same size in every round.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from deepspeed.ops.adam import FusedAdam
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from transformers import OPTConfig, OPTForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.engine import sweep_step
from utils.engine.engine import get_optimizer_grouped_parameters
from utils.machine.cpu_allocator import keep_freed_memory


def wrapped(device: torch.device) -> tuple[torch.nn.Module, FP16_Optimizer]:
    """Return a model in bf16 and DeepSpeed's wrapper of FusedAdam around its weights."""
    model = OPTForCausalLM(OPTConfig()).bfloat16().to(device)
    inner = FusedAdam(get_optimizer_grouped_parameters(model, 0.1), lr=1e-4)
    return model, FP16_Optimizer(inner, low_precision_dtype=torch.bfloat16, clip_grad=1.0)


def step_seconds(model: torch.nn.Module, optimizer: FP16_Optimizer) -> float:
    """Take one step with random gradients; return its seconds."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    device = next(model.parameters()).device
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    optimizer.step()
    wait()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="steps of each; the first is not counted")
    parser.add_argument("--piece", type=int, help="elements of a piece; utils/engine/sweep_step.py has the default")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.piece:
        sweep_step.PIECE[device.type] = args.piece
    keep_freed_memory()  # as a run does
    both = {"DeepSpeed's": wrapped(device), "in one sweep": wrapped(device)}
    sweep_step.sweep_in_steps(SimpleNamespace(optimizer=both["in one sweep"][1], device=device))
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for number in range(args.rounds):
        for name, (model, optimizer) in both.items():
            taken = step_seconds(model, optimizer)
            if number:
                seconds[name].append(taken)
    for name, taken in seconds.items():
        print(f"{name}: {min(taken) * 1e3:.0f} ms at best, {statistics.median(taken) * 1e3:.0f} ms in the middle")
    ratios = [one / two for one, two in zip(*seconds.values(), strict=True)]
    print(f"ratio of a round: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
