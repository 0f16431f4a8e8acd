"""Settings of a CUDA device that must stand before its first use, and what compiling its kernels needs."""

import importlib.util
import os
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the first since torch 2.9; both are read
HEADER = "cusparse.h"  # what toolkits without the libraries lack first
PIP_PACKAGES = ("nvidia.cu13", "nvidia.cusparse")  # pip's CUDA 13 has one folder for all, CUDA 12 one for each library


def let_segments_grow(layout: str) -> str | None:
    """Let torch's allocator enlarge its segments on a CUDA device; return a line that says so, None elsewhere.

    Rows of changing length ask for blocks of changing size, which segments of fixed size keep in pieces too small to
    use again. A user's own setting of the allocator stays as it is. Call this before the device is first used.

    layout: "max_length" where every batch has the same shape; then nothing is changed.
    """
    if get_accelerator().device_name() != "cuda" or layout == "max_length":
        return None
    own = next((f"{name}={os.environ[name]}" for name in ALLOCATOR if name in os.environ), None)
    if own is not None:
        return f"Device memory: {own}, as set"
    os.environ[ALLOCATOR[0]] = "expandable_segments:True"
    return f"Device memory: {ALLOCATOR[0]}=expandable_segments:True, since rows have changing lengths"


def use_tf32(asked: bool, dtype: str, device: torch.device) -> str | None:
    """Compute float32 matrix products in TF32 where `--tf32` asks for it; return a line, None without the flag."""
    if not asked:
        return None
    if device.type != "cuda" or dtype != "fp32":
        return f"--tf32 is not used: it is for fp32 on a CUDA device, and this run computes in {dtype} on {device.type}"
    torch.set_float32_matmul_precision("high")
    return "Precision: float32 matrix products in TF32, with 10 bits after the leading one (--tf32)"


def find_cuda_headers() -> str | None:
    """Put the CUDA headers that pip installed on CPATH where the toolkit lacks them; return a line, None if not.

    DeepSpeed's CUDA kernels include headers of libraries (cuSPARSE) that small toolkits leave out.
    """
    if get_accelerator().device_name() != "cuda":
        return None
    home = Path(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda")
    listed = [Path(part) for part in os.environ.get("CPATH", "").split(os.pathsep) if part]
    if any((folder / HEADER).is_file() for folder in (home / "include", *listed)):
        return None
    folders = [folder for name in PIP_PACKAGES for folder in _include_folders(name)]
    if not folders:
        return None
    os.environ["CPATH"] = os.pathsep.join(map(str, [*listed, *folders]))
    return f"Compiler: {HEADER} is not in {home / 'include'}; pip's headers in {folders[0]} are used"


def _include_folders(package: str) -> list[Path]:
    """Return the folders that hold a pip package's headers, of all CUDA libraries where it is one of many."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        return []
    for place in spec.submodule_search_locations or [] if spec else []:
        if (Path(place) / "include" / HEADER).is_file():
            return [Path(place) / "include", *sorted(Path(place).parent.glob("*/include"))]
    return []


def first_error(output: str) -> str:
    """Return the first line of a compiler's output that names an error, else its beginning, within 300 characters."""
    lines = [" ".join(line.split()) for line in output.splitlines()]
    named = [line for line in lines if "error:" in line.lower() or "fatal" in line.lower()]
    return (named[0] if named else " ".join(" ".join(lines).split()))[:300]
