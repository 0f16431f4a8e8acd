"""Models larger than memory: sizes of shards, swap files on NVMe, and ZeRO++'s ways to hold weights (LoRA in 8 bits).

DeepSpeed's swapper (ZeRO-Infinity, Rajbhandari et al. 2021, https://arxiv.org/abs/2104.07857) keeps at stage 3 the
parts of weights, float32 masters, moments and gradients in files, one folder a rank, and reads each where it is needed
into buffers of a fixed size. What is below a megabyte a rank stays in memory.
"""

import os
import re
import shutil
import socket
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from filelock import FileLock, Timeout

from utils.errors import UserError
from utils.hardware import parse_gpus

DEFAULT_SHARD_SIZE = "5GB"
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SWAP_PREFIX = "swap-"
SWAP_BUFFERS = 8  # a module's own weights (LoRA has three of a size) and those read ahead
# Elements of a part of the optimizer that is read and written at a time; four buffers of it are held.
SUB_GROUP = 50_000_000


def parse_size(text: str) -> int:
    """Bytes of a size in transformers' spelling: 5GB, 200MB.

    Raises:
        UserError: it is not of that form, or nothing.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", text.strip(), flags=re.IGNORECASE)
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise UserError(f"--max_shard_size {text}: write a number above 0 with KB, MB, GB or TB, as in 5GB or 200MB.")
    return size


def check_scale_values(args: Namespace) -> list[str]:
    """What is wrong with the arguments of big models, seen by themselves."""
    problems = []
    try:
        parse_size(args.max_shard_size)
    except UserError as err:
        problems.append(str(err))
    if args.offload == "nvme" and args.nvme_path is None:
        problems.append("--offload nvme needs --nvme_path DIR, a folder on a local disk.")
    if args.offload == "nvme" and args.zero_stage != 3 and not args.deepspeed_config:
        problems.append(
            f"--offload nvme needs --zero_stage 3, not {args.zero_stage}: below it DeepSpeed has no files and would "
            "keep optimizer states in CPU memory, which is --offload cpu."
        )
    if args.offload == "nvme" and args.save_strategy != "no" and not args.save_only_model:
        problems.append(
            "--offload nvme writes no checkpoints a run could go on from: DeepSpeed reads back only a part of what "
            "is in its swap files. Give --save_only_model, which keeps models, or --offload cpu."
        )
    if args.offload == "nvme" and args.resume_from_checkpoint is not None:
        problems.append("--resume_from_checkpoint can't be used with --offload nvme: go on with --offload cpu.")
    if args.nvme_path is not None and args.offload != "nvme":
        problems.append("--nvme_path is for --offload nvme.")
    if args.zero_hpz_partition_size > 1 and args.offload == "nvme":
        problems.append(
            "--zero_hpz_partition_size keeps a second copy of the weights in memory, which DeepSpeed can't with "
            "--offload nvme: give one of them."
        )
    if args.zero_hpz_partition_size > 1 and args.zero_stage != 3:
        problems.append(f"--zero_hpz_partition_size needs --zero_stage 3, not {args.zero_stage}.")
    if args.enable_mixed_precision_lora and (args.zero_stage != 3 or args.lora_dim == 0):
        problems.append("--enable_mixed_precision_lora needs --zero_stage 3 and --lora_dim above 0.")
    return problems


def check_scale(args: Namespace, ranks: int) -> list[str]:
    """What this machine, or the one of a plan, can't do of the arguments of big models."""
    problems, size = [], args.zero_hpz_partition_size
    if size > 1 and ranks % size != 0:
        problems.append(
            f"--zero_hpz_partition_size {size} does not divide {ranks} rank(s): give the number of a node's devices."
        )
    if args.enable_mixed_precision_lora and args.dtype != "fp16":
        problems.append(
            f"--enable_mixed_precision_lora needs --dtype fp16, not {args.dtype}: DeepSpeed's 8-bit kernel reads fp16."
        )
    if parse_gpus(args.dry_run) is not None:
        return problems
    if args.enable_mixed_precision_lora and get_accelerator().device_name() != "cuda":
        problems.append(
            f"--enable_mixed_precision_lora can't be used on {get_accelerator().device_name()}: DeepSpeed's 8-bit "
            "kernel exists for CUDA alone. Leave it out."
        )
    if args.offload == "nvme":
        for check in (check_async_io, lambda: args.nvme_path is None or check_swap_folder(args.nvme_path)):
            try:
                check()
            except UserError as err:
                problems.append(str(err))
    return problems


def check_async_io() -> None:
    """UserError when the operator that reads and writes swap files can't be compiled here."""
    builder = get_accelerator().create_op_builder("AsyncIOBuilder")
    if builder is None or not builder.is_compatible(verbose=False):
        raise UserError(
            "--offload nvme needs DeepSpeed's operator async_io, and that libaio with its headers: install libaio-dev "
            "(apt) or libaio-devel (dnf, yum), or leave it at --offload cpu."
        )


def scale_settings(args: Namespace) -> dict[str, Any]:
    """What these arguments add to DeepSpeed's block `zero_optimization`."""
    settings: dict[str, Any] = {}
    if args.zero_hpz_partition_size > 1:
        settings["zero_hpz_partition_size"] = args.zero_hpz_partition_size
    if args.enable_mixed_precision_lora:
        settings["zero_quantized_nontrainable_weights"] = True
    if args.offload == "nvme":
        folder = {"device": "nvme", "nvme_path": _swap_folder(args)}
        # No weights are to stay in CPU memory; buffers are sized when the model is known.
        settings["offload_param"] = {**folder, "buffer_count": SWAP_BUFFERS, "max_in_cpu": 0}
        settings["offload_optimizer"] = {**folder, "buffer_count": 4}
        settings["sub_group_size"] = SUB_GROUP
    return settings


def needs_swap_buffers(ds_config: dict[str, Any]) -> bool:
    """Whether weights go to files through buffers whose size is still to be said."""
    block = ds_config["zero_optimization"].get("offload_param", {})
    return block.get("device") == "nvme" and "buffer_size" not in block


def size_swap_buffers(ds_config: dict[str, Any], largest: int, ranks: int) -> None:
    """Have buffers in `ds_config` that hold a rank's part of the model's largest weight (`largest` elements)."""
    ds_config["zero_optimization"]["offload_param"]["buffer_size"] = -(-largest // ranks) + ranks


# ------------------------------------------------------------------------------------------ swap files


def _swap_folder(args: Namespace) -> str:
    """This process's, or for a plan for machines that are not here its parent."""
    return open_swap_folder(args.nvme_path) if parse_gpus(args.dry_run) is None else args.nvme_path


_held: dict[str, FileLock] = {}  # this process's folders, each with its lock


def open_swap_folder(root: str) -> str:
    """A folder for this process's swap files below `root`; `remove_swap_folders` ends it.

    Left-overs of processes that were killed are removed: a folder is in use as long as its lock is held.
    """
    os.makedirs(root, exist_ok=True)
    for lock_file in Path(root).glob(f"{SWAP_PREFIX}*.lock"):
        lock = FileLock(lock_file)
        try:
            with lock.acquire(timeout=0):
                shutil.rmtree(lock_file.with_suffix(""), ignore_errors=True)
                lock_file.unlink(missing_ok=True)
        except Timeout:
            continue
    folder = os.path.join(root, f"{SWAP_PREFIX}{socket.gethostname()}-{os.getpid()}")
    _held[folder] = FileLock(folder + ".lock")
    _held[folder].acquire()
    os.makedirs(folder)
    return folder


def remove_swap_folders() -> None:
    """Remove this process's swap files."""
    for folder, lock in _held.items():
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()
        Path(folder + ".lock").unlink(missing_ok=True)
    _held.clear()


def check_swap_folder(root: str) -> None:
    """UserError when `root` can't hold swap files: they are read and written past the system's cache (O_DIRECT)."""
    existing = os.path.abspath(root)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    try:
        with tempfile.NamedTemporaryFile(dir=existing) as probe:
            os.close(os.open(probe.name, os.O_RDWR | os.O_DIRECT))
    except OSError as err:
        raise UserError(
            f"--nvme_path {root} can't hold swap files ({err}): give a folder on a local disk you may write to; memory "
            "file systems and some network ones can't be read past the cache (O_DIRECT)."
        ) from err
