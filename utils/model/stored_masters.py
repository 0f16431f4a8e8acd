"""Master weights under ZeRO 3 from the float32 values in the checkpoint's files.

ZeRO 3 divides weights among the ranks while they load, in the training dtype, and makes the master weights of that:
where the files hold more than 16 bits they would begin rounded. Here each rank reads its own part again.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

from utils.distributed.ranks import print_rank_0
from utils.distributed.zero3 import is_partitioned, whole_shape
from utils.model.checkpoint import check_weights
from utils.model.weight_files import open_values, places_in_files

Read = Callable[[str], torch.Tensor]


@torch.no_grad()
def restore_stored_masters(engine: DeepSpeedEngine, name: str) -> int:
    """Copy into the master weights what the files of `name` hold in more than the training dtype, under ZeRO 3.

    Weights whose name in the model is another than in the files (experts that transformers joins, say), and all of
    them where the optimizer's state lies in files, keep what 16 bits left of them; a line says how many.

    Returns:
        how many parameters were restored.
    """
    parameters = {
        key: one for key, one in engine.module.named_parameters() if one.requires_grad and is_partitioned(one)
    }
    if not parameters or engine.zero_optimization_stage() < 3:
        return 0
    training = next(iter(parameters.values())).dtype
    stored = check_weights(name, engine.module.config, tell=False)
    wider = {key for key, one in stored.items() if one.is_floating_point() and one.dtype != training}
    if training == torch.float32 or not wider:
        return 0
    in_files = engine.optimizer.swap_optimizer
    places = {} if in_files else places_in_files(parameters, wider, engine.module.base_model_prefix)
    with open_values(name) as read:
        for key, place in places.items():
            _restore(parameters[key], stored[place].shape, read, place)
    rounded = sum(1 for key in parameters if key not in places and "lora_" not in key)
    if rounded:
        why = "the optimizer's state lies in files" if in_files else "they have other names in the model"
        print_rank_0(f"Master weights: {rounded} of {len(parameters)} begin as {training} leaves them, since {why}")
    return len(places)


def _restore(parameter: torch.nn.Parameter, shape: torch.Size, read: Read, place: str) -> None:
    """Write this rank's part of a stored weight into its master; rows that a grown embedding has more keep theirs."""
    local = safe_get_local_fp32_param(parameter)
    whole = whole_shape(parameter)
    if shape[1:] != whole[1:] or shape[0] > whole[0]:
        return
    begin = local.numel() * dist.get_rank(group=parameter.ds_process_group)
    part = read(place).float().reshape(-1)[begin : begin + local.numel()]
    value = local.clone()
    value[: part.numel()] = part
    safe_set_local_fp32_param(parameter, value)
