"""Helpers of DeepSpeed-Chat's reward and RLHF phases (steps 2 and 3) that scripts import from `utils.utils`.

Nothing in SFT uses them: averages follow PPO's rewards and the actor's weights (its EMA), and a state dict is loaded
into the reward model. The models may be partitioned by ZeRO 3; then every rank must call these functions.
"""

from collections.abc import Mapping

import torch

from utils.distributed.ranks import is_rank_0
from utils.distributed.zero3 import gather, is_partitioned, whole_shape


class MovingAverage:
    """The mean of all numbers so far. Used by step 3, for rewards."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.mean = 0.0

    def update(self, num: float) -> float:
        """Add a number; return the mean."""
        self.total += num
        self.count += 1
        self.mean = self.total / self.count
        return self.mean


class ExponentialMovingAverage:
    """The average `alpha * average + (1 - alpha) * number`, which begins at the first number. Used by step 3."""

    def __init__(self, alpha: float = 0.9) -> None:
        self.alpha = alpha
        self.ema: float | None = None

    def update(self, num: float) -> float:
        """Add a number; return the average."""
        self.ema = num if self.ema is None else self.alpha * self.ema + (1 - self.alpha) * num
        return self.ema

    def get(self) -> float:
        """Return the average; 0 before the first number."""
        return 0.0 if self.ema is None else self.ema


@torch.no_grad()
def moving_average(
    model: torch.nn.Module,
    model_ema: torch.nn.Module,
    beta: float = 0.992,
    device: torch.device | str | None = None,
    zero_stage: int = 0,
) -> None:
    """Make every weight of `model_ema` `beta` times itself plus `1 - beta` times the one of `model`. Used by step 3.

    Args:
        device: where the average is computed, that of `model_ema`; None: where both are.
        zero_stage: kept for callers of the original; how a parameter is partitioned is read off itself.
    """
    for parameter, average in zip(model.parameters(), model_ema.parameters(), strict=True):
        with gather([parameter]), gather([average], modifier_rank=0):
            data = parameter.data if device is None else parameter.data.to(device)
            average.data.copy_(torch.lerp(data, average.data, beta))


@torch.no_grad()
def load_state_dict_into_model(
    model_to_load: torch.nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    start_prefix: str = "",
    zero_stage: int = 0,
) -> list[str]:
    """Copy a state dict into a model whose weights ZeRO 3 may have partitioned. Used by steps 2 and 3.

    Args:
        state_dict: weights and buffers by name; names that only one side has are left out.
        start_prefix: what the names in `state_dict` have before the model's.
        zero_stage: kept for callers of the original; how a parameter is partitioned is read off itself.

    Returns:
        a message for each tensor whose shape is another, which is not copied.
    """
    errors = []
    for name, tensor in model_to_load.state_dict(keep_vars=True).items():
        value = state_dict.get(start_prefix + name)
        if value is None:
            continue
        if value.shape != whole_shape(tensor):
            shapes = f"{tuple(value.shape)} in the state dict, {tuple(whole_shape(tensor))} in the model"
            errors.append(f"size mismatch for {start_prefix}{name}: {shapes}")
            continue
        with gather([tensor], modifier_rank=0):
            if is_rank_0() or not is_partitioned(tensor):
                tensor.data.copy_(value)
    return errors
