"""What DeepSpeed's configuration takes from the device: pinned memory, and ZeRO 3's limits by its memory."""

from collections.abc import Callable
from typing import Any

from deepspeed.accelerator import get_accelerator

from utils.distributed.ranks import print_rank_0
from utils.run_config import RunConfig

SMALLEST = 3e7  # elements: of both limits on a small device
# Shares of an 80 GB device at which DeepSpeed's own defaults, 1e9 elements live and 5e7 read ahead, stand.
LIVE_PER_BYTE, AHEAD_PER_BYTE = 1e9 / 80e9, 5e7 / 80e9


def zero_settings_of_device(config: RunConfig, say: Callable[[str], None] = print_rank_0) -> dict[str, Any]:
    """Return additions to DeepSpeed's block `zero_optimization`, each said in a line; none for a run on a CPU."""
    memory = _device_bytes(config)
    if memory is None:
        return {}
    settings: dict[str, Any] = {}
    if config.offload == "cpu":
        settings = {name: {"pin_memory": True} for name in ("offload_param", "offload_optimizer")}
        say("Offload: CPU memory is pinned, so that copies to the device run beside the computation")
    if config.zero_stage == 3:
        live, ahead = max(memory * LIVE_PER_BYTE, SMALLEST), max(memory * AHEAD_PER_BYTE, SMALLEST)
        settings |= {"stage3_max_live_parameters": int(live), "stage3_prefetch_bucket_size": int(ahead)}
        say(
            f"ZeRO 3: up to {live / 1e6:.0f} million weights are gathered at a time and {ahead / 1e6:.0f} million read "
            f"ahead, for {memory / 1e9:.0f} GB of device memory"
        )
    return settings


def _device_bytes(config: RunConfig) -> float | None:
    """Return the memory of this rank's device, or of a planned one, in bytes; None on a CPU."""
    if config.gpus is not None:
        return config.gpus.gigabytes * 1e9
    return None if config.device.type == "cpu" else float(get_accelerator().total_memory())
