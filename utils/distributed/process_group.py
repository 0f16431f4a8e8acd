"""The process group: start it, and choose this rank's device."""

import os
from contextlib import suppress
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from utils.distributed.launchers import await_address, free_port
from utils.errors import UserError
from utils.logging.console import chatter_to_log, say
from utils.machine.compile_locks import clear_stale_build_locks, extension_folder
from utils.machine.cpu_allocator import limit_kernel_caches


def local_rank_of(args_local_rank: int) -> int:
    """Return this process's rank within its node: LOCAL_RANK of the launcher, else `--local_rank`, else 0."""
    return int(os.environ.get("LOCAL_RANK", max(args_local_rank, 0)))


def check_local_rank(local_rank: int) -> None:
    """Check that no more processes were started on this node than it has devices (on a CPU: cores).

    Raises:
        UserError: more were started.
    """
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    available = (os.cpu_count() or 1) if on_cpu else accelerator.device_count()
    started = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", local_rank + 1)))
    if max(started, local_rank + 1) > available:
        what = f"CPU core{'s' * (available != 1)}" if on_cpu else f"{accelerator.device_name()} device(s)"
        raise UserError(
            f"{max(started, local_rank + 1)} processes were started but this machine has {available} {what}: "
            f"use `deepspeed --num_gpus {available} main.py ...` (or plain `python main.py ...` for one process)."
        )


@chatter_to_log()
def start_process_group(local_rank: int, timeout_seconds: int) -> torch.device:
    """Join the process group, or form one of a single rank for a plain `python main.py`; return this rank's device.

    Args:
        local_rank: number of this rank's device on its node.
        timeout_seconds: how long a collective waits for the other ranks.

    Raises:
        UserError: the ranks can't meet.
    """
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            LOCAL_WORLD_SIZE="1",
        )
    if os.environ["WORLD_SIZE"] == "1" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        # One rank meets itself, whatever address a cluster has left in the environment; torchrun meets it by its own.
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    if "LOCAL_RANK" not in os.environ:  # without it DeepSpeed would ask MPI
        os.environ["LOCAL_RANK"] = str(local_rank)
        if os.environ["RANK"] == "0" and os.environ["WORLD_SIZE"] != "1":
            say(
                f"Launcher: WORLD_SIZE {os.environ['WORLD_SIZE']} without LOCAL_RANK, as Kubeflow starts it: one "
                f"process a node, on its device {local_rank}"
            )
    if os.environ["WORLD_SIZE"] != "1":
        await_address(os.environ["MASTER_ADDR"])
    several_nodes = os.environ["WORLD_SIZE"] != os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))
    for lock in clear_stale_build_locks(extension_folder(), several_nodes):
        say(f"Removed {lock}: a run that was killed while compiling left it behind")
    if os.environ["WORLD_SIZE"] == "1":
        # On a CPU DeepSpeed compiles an all-reduce through shared memory: a minute, for nothing with one rank.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    limit_kernel_caches()
    accelerator = get_accelerator()
    accelerator.set_device(local_rank)
    try:
        deepspeed.init_distributed(
            accelerator.communication_backend_name(), timeout=timedelta(seconds=timeout_seconds), verbose=False
        )
    except (dist.DistNetworkError, dist.DistStoreError) as err:
        raise UserError(_no_meeting(str(err))) from err
    _unlink_shared_buffer()
    name = accelerator.device_name()
    return torch.device(name if name == "cpu" else accelerator.device_name(local_rank))


def _no_meeting(reason: str) -> str:
    """Return what to do where the ranks can't meet, for torch's `reason`."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if "EADDRINUSE" in reason or "address already in use" in reason.lower():
        return (
            f"port {port} of {address}, where the ranks are to meet, is taken by another program, maybe by another "
            "run: give a free one with --master_port of deepspeed or torchrun, else with the variable MASTER_PORT."
        )
    short = " ".join(reason.split())[:300]
    return (
        f"the ranks can't meet at {address}:{port} ({short}): check that all {os.environ['WORLD_SIZE']} of them were "
        "started, with this --master_addr and --master_port (variables MASTER_ADDR, MASTER_PORT), and can reach it."
    )


def leave_process_group() -> None:
    """Destroy the process group of a run that has succeeded, where it is NCCL's: it warns of one left at the end."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        dist.destroy_process_group()


def _unlink_shared_buffer() -> None:
    """Remove the name of the 69 MB of shared memory that DeepSpeed's all-reduce on CPUs maps for this rank.

    Without a name the memory is freed with the last process that maps it. DeepSpeed never removes the name, so some
    hundred runs would fill the memory.
    """
    dist.barrier()  # every rank of the node must have opened the file by its name
    place = "_".join([str(os.getuid()), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], os.environ["RANK"]])
    with suppress(OSError):  # on GPUs, over several nodes, or without that kernel there is no such file
        os.unlink(f"/dev/shm/deepspeed_allreduce_buffer_{place}")
