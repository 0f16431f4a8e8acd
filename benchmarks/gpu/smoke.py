"""The smoke test of the GPU check: imports, the compiler, one step in bf16, a collective of one rank.

    python benchmarks/gpu/smoke.py cuda|cpu

Each part prints a line `SMOKE part: what was found` as soon as it is done, so a crash shows where.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def say(part: str, words: str) -> None:
    print(f"SMOKE {part}: {words}", flush=True)


def find_compiler() -> str | None:
    """Return the version of the CUDA compiler that DeepSpeed would use; None without one: the other parts go on."""
    path = shutil.which("nvcc") or os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    try:
        return subprocess.run([path, "--version"], capture_output=True, text=True).stdout.strip().splitlines()[-1]
    except (OSError, IndexError):
        return None


def main() -> None:
    device, begun = sys.argv[1], time.perf_counter()
    import datasets
    import deepspeed
    import torch
    import torch.distributed as dist
    import transformers

    import main  # noqa: F401  (all of the program)
    from benchmarks.gpu.random_models import opt_config
    from utils.distributed.launchers import free_port
    from utils.machine.gpu_setup import find_cuda_headers

    versions = [f"{module.__name__} {module.__version__}" for module in (torch, deepspeed, transformers, datasets)]
    say("imports", f"{', '.join(versions)}, {time.perf_counter() - begun:.0f} s")
    compiler = find_compiler() if device == "cuda" else None
    if compiler is not None:
        say("compiler", f"{compiler}; {find_cuda_headers() or 'its headers are used'}")
    model = transformers.OPTForCausalLM(opt_config("tiny")).to(device, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.arange(3, 67, device=device)[None]
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if not losses[-1] < losses[0]:
        raise SystemExit(f"the loss does not fall: {losses}")
    say("step", f"bf16, loss {losses[0]:.3f} to {losses[-1]:.3f}")
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    value = torch.ones(4, device=device)
    dist.all_reduce(value)
    say("collective", f"{dist.get_backend()}, sum {value.sum().item():g} of 4")
    dist.destroy_process_group()
    if device == "cuda" and compiler is None:
        raise SystemExit("there is no nvcc, neither on PATH nor in CUDA_HOME: DeepSpeed's kernels can't be built")


if __name__ == "__main__":
    main()
