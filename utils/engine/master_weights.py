"""Master weights from the loaded float32 values, not from what 16 bits leave of them.

DeepSpeed casts a model to its training dtype and then makes the float32 master weights from that. Where the model was
loaded in float32, because its checkpoint holds more than the training dtype does, they would begin rounded.
"""

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_set_full_fp32_param

from utils.distributed.zero3 import is_partitioned

Held = list[tuple[torch.nn.Parameter, torch.Tensor]]


def hold_float32(model: torch.nn.Module) -> Held:
    """Return the trainable float32 parameters that this rank has whole, with their values before DeepSpeed's cast."""
    return [
        (parameter, parameter.data)
        for parameter in model.parameters()
        if parameter.requires_grad and parameter.dtype == torch.float32 and not is_partitioned(parameter)
    ]


@torch.no_grad()
def restore_masters(engine: DeepSpeedEngine, held: Held) -> int:
    """Copy the held values into the engine's master weights; return how many parameters had been rounded."""
    rounded = [(parameter, value) for parameter, value in held if parameter.dtype != torch.float32]
    if not rounded:
        return 0
    flat = flat_masters(engine)
    for parameter, value in rounded:
        if id(parameter) in flat:
            flat[id(parameter)].copy_(value)
        else:
            safe_set_full_fp32_param(parameter, value)
    return len(rounded)


def flat_masters(engine: DeepSpeedEngine) -> dict[int, torch.Tensor]:
    """Return the master weight of each parameter, by its id, without ZeRO, where one flat tensor holds a group's."""
    masters: dict[int, torch.Tensor] = {}
    if engine.zero_optimization() or not hasattr(engine.optimizer, "fp32_groups_flat"):
        return masters
    for flat, group in zip(engine.optimizer.fp32_groups_flat, engine.optimizer.fp16_groups, strict=True):
        start = 0
        for parameter in group:
            masters[id(parameter)] = flat.data.narrow(0, start, parameter.numel()).view(parameter.shape)
            start += parameter.numel()
    return masters
