"""Read a checkpoint into another layout: other ranks, another ZeRO stage, offload or precision.

DeepSpeed's own converter takes the shards apart into whole tensors, one folder a parameter (its universal format,
https://www.deepspeed.ai/tutorials/universal-checkpointing/). Its loader wants the stage that wrote them and gives
all parameter groups the first one's settings, so the tensors are put in place by the functions it offers for that
(`deepspeed.utils.safe_set_*`).
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from utils.checkpoint.checkpoint_folder import Checkpoint
from utils.distributed.ranks import answer_of_rank_0, is_rank_0, wait_for_all
from utils.distributed.zero3 import is_partitioned
from utils.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
States = dict[str, torch.Tensor]  # "fp32" and the moments, each in the parameter's shape


def load_full_states(engine: deepspeed.DeepSpeedEngine, checkpoint: Checkpoint) -> None:
    """Set weights, moments and counters of `engine` to those of a checkpoint of any layout. Every rank must call it.

    Raises:
        UserError: the layout it was written in, or this one, can't be taken apart.
    """
    if engine.fp16_enabled() and not engine.zero_optimization():
        raise UserError("fp16 at ZeRO 0 keeps its states in one piece: resume in the layout of the checkpoint.")
    read, steps, folder = _reader(checkpoint)
    try:
        _make_moments(engine)
        places = _places_in_groups(engine)
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                _set_states(engine, parameter, read(name), places.get(id(parameter)))
        _after_setting(engine, steps)
    finally:
        wait_for_all()
        if folder is not None and is_rank_0():
            shutil.rmtree(folder, ignore_errors=True)
    engine.global_steps, engine.skipped_steps = checkpoint.state.step, checkpoint.state.step - steps


def _reader(checkpoint: Checkpoint) -> tuple[Callable[[str], States], int, str | None]:
    """Return (a reader of a parameter's states by name, updates Adam has counted, folder to remove afterwards)."""
    layout = checkpoint.info["layout"]
    if layout["zero_stage"] == 0 and layout["precision"] == "fp32":
        return (*_read_plain(checkpoint), None)
    if layout["zero_stage"] == 0 and layout["precision"] == "fp16":
        raise UserError(
            f"{checkpoint.folder} was written by fp16 at ZeRO 0, which keeps its states in one piece: resume in the "
            "same layout."
        )
    if layout["zero_stage"] == 0:
        return (*_read_groups(checkpoint), None)
    folder = os.path.abspath(checkpoint.folder) + "-universal"
    fault = answer_of_rank_0(_convert(os.path.abspath(checkpoint.folder), folder) if is_rank_0() else "")
    if fault:
        raise UserError(f"{checkpoint.folder} can't be converted to DeepSpeed's universal format: {fault}")

    def read(name: str) -> States:
        place = os.path.join(folder, "zero", name)
        files = {key: os.path.join(place, f"{key}.pt") for key in ("fp32", *MOMENTS)}
        loaded = {key: torch.load(file, map_location="cpu", weights_only=False) for key, file in files.items()}
        return {key: value["param"] if isinstance(value, dict) else value for key, value in loaded.items()}

    return read, checkpoint.state.scheduler_steps, folder


def _convert(source: str, target: str) -> str:
    """Run DeepSpeed's converter in a process of its own; returns what went wrong, "" when nothing did."""
    shutil.rmtree(target, ignore_errors=True)
    command = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", source, "--output_folder",
        target, "--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if result.returncode == 0 else (result.stderr.strip().splitlines() or ["no reason given"])[-1]


def _read_plain(checkpoint: Checkpoint) -> tuple[Callable[[str], States], int]:
    """Read a checkpoint without ZeRO in float32, where DeepSpeed saved model and optimizer whole; as `_reader`."""
    path = os.path.join(checkpoint.folder, "mp_rank_00_model_states.pt")
    saved = torch.load(path, map_location="cpu", weights_only=False)
    numbers = {name: number for number, name in enumerate(checkpoint.info["optimizer_parameters"])}

    def read(name: str) -> States:
        moments = saved["optimizer"]["state"][numbers[name]]
        return {"fp32": saved["module"][name], **{key: moments[key] for key in MOMENTS}}

    return read, checkpoint.state.scheduler_steps


def _read_groups(checkpoint: Checkpoint) -> tuple[Callable[[str], States], int]:
    """Read a checkpoint without ZeRO in bf16, where each group's states are one flat tensor; as `_reader`."""
    groups = checkpoint.info.get("optimizer_groups")
    if not groups:
        raise UserError(
            f"{checkpoint.folder} was written by bf16 at ZeRO 0 and an earlier version, which did not record what its "
            "flat states hold: resume in the same layout."
        )
    path = os.path.join(checkpoint.folder, "mp_rank_00_model_states.pt")
    saved = torch.load(path, map_location="cpu", weights_only=False)
    moments = saved["optimizer"]["optimizer_state_dict"]["state"]
    places = {}
    for number, names in enumerate(groups):
        offset = 0
        for name in names:
            places[name] = number, offset
            offset += saved["module"][name].numel()

    def read(name: str) -> States:
        (number, offset), shape = places[name], saved["module"][name].shape
        flats = {"fp32": saved["optimizer"]["fp32_groups_flat"][number], **{k: moments[number][k] for k in MOMENTS}}
        return {k: flat.detach()[offset : offset + shape.numel()].reshape(shape) for k, flat in flats.items()}

    return read, checkpoint.state.scheduler_steps


def flat_groups(engine: deepspeed.DeepSpeedEngine) -> list[tuple[list[torch.nn.Parameter], torch.Tensor]]:
    """Return (parameters, flat master weights) of each group where 16 bits are trained without ZeRO; else nothing."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp16_groups") or not hasattr(optimizer, "fp32_groups_flat"):
        return []
    return list(zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True))


def _places_in_groups(engine: deepspeed.DeepSpeedEngine) -> dict[int, tuple[torch.Tensor, int]]:
    """Return (flat master weights, offset) by the identity of each parameter that lies in such a group."""
    if engine.zero_optimization():
        return {}
    places = {}
    for parameters, flat in flat_groups(engine):
        offset = 0
        for parameter in parameters:
            places[id(parameter)] = flat, offset
            offset += parameter.numel()
    return places


def _make_moments(engine: deepspeed.DeepSpeedEngine) -> None:
    """Give ZeRO's flat tensors the moments that a first step would make."""
    optimizer = engine.optimizer
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        for flat in getattr(optimizer, attribute, []):
            for key in MOMENTS:
                engine.basic_optimizer.state[flat].setdefault(key, torch.zeros_like(flat, requires_grad=False))
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()


def _set_states(
    engine: deepspeed.DeepSpeedEngine,
    parameter: torch.nn.Parameter,
    states: States,
    place: tuple[torch.Tensor, int] | None,
) -> None:
    """Set one parameter's weight and moments; `place` is that in a group's flat tensors, where it lies in one."""
    if place is not None:
        flat, offset = place
        own = engine.basic_optimizer.state[flat]
        for key, value in states.items():
            target = flat.data if key == "fp32" else own[key]
            target.narrow(0, offset, parameter.numel()).copy_(value.flatten())
        parameter.data.copy_(states["fp32"].reshape(parameter.shape))
    elif is_partitioned(parameter):
        # The part this rank holds; the last rank's is filled up, since parts are of one size.
        size, rank = parameter.partition_numel(), dist.get_rank()
        for key, value in states.items():
            flat = torch.nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
            part = flat.narrow(0, rank * size, size)
            if key == "fp32":
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, key)
    elif hasattr(parameter, "_hp_mapping"):
        safe_set_full_fp32_param(parameter, states["fp32"].reshape(parameter.shape))
        for key in MOMENTS:
            safe_set_full_optimizer_state(parameter, states[key].reshape(parameter.shape), key)
    else:
        parameter.data.copy_(states["fp32"].reshape(parameter.shape))
        engine.basic_optimizer.state[parameter].update(
            {key: states[key].reshape(parameter.shape).to(parameter.device, torch.float32) for key in MOMENTS}
        )


def _after_setting(engine: deepspeed.DeepSpeedEngine, steps: int) -> None:
    """Bring the working copies of the weights, and every count of steps, in line."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        optimizer.checkpoint_event_prologue()
        for group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            if flat.numel():
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    for group in engine.basic_optimizer.param_groups:
        if "step" in group:
            group["step"] = steps
    for state in engine.basic_optimizer.state.values():
        as_tensor = torch.is_tensor(state.get("step")) or ("step" not in state and _counts_in_tensors(engine))
        state["step"] = torch.tensor(float(steps)) if as_tensor else steps


def _counts_in_tensors(engine: deepspeed.DeepSpeedEngine) -> bool:
    return isinstance(engine.basic_optimizer, torch.optim.AdamW)


def optimizer_parameter_names(engine: deepspeed.DeepSpeedEngine) -> list[str]:
    """List the trained parameters in the order a plain optimizer numbers them: ZeRO 0 saves their numbers alone."""
    if engine.zero_optimization() or engine.bfloat16_enabled():
        return []
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    return [names[id(p)] for group in engine.basic_optimizer.param_groups for p in group["params"] if id(p) in names]


def optimizer_group_names(engine: deepspeed.DeepSpeedEngine) -> list[list[str]]:
    """List the trained parameters of each group in the order of its flat states, where bf16 is saved without ZeRO."""
    if engine.zero_optimization() or not engine.bfloat16_enabled():
        return []
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    return [[names[id(parameter)] for parameter in parameters] for parameters, _ in flat_groups(engine)]
