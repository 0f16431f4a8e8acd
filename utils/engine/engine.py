"""Build AdamW in the fastest form this machine can run, and the DeepSpeed engine around it."""

import subprocess
from argparse import Namespace
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder
from deepspeed.runtime.utils import clip_grad_norm_
from torch import nn

from utils.distributed.ranks import print_rank_0
from utils.engine.master_weights import hold_float32, restore_masters
from utils.engine.sweep_step import sweep_in_steps
from utils.logging.console import chatter_to_log, phase
from utils.machine.cpu_allocator import keep_freed_memory
from utils.machine.gpu_setup import find_cuda_headers, first_error
from utils.run_config import RunConfig

BETAS = (0.9, 0.95)
# DeepSpeed-Chat's names of what is not decayed; a model's own structure says the rest (`_undecayed`).
NO_DECAY_NAMES = ("bias", "layer_norm.weight", "layernorm.weight", "norm.weight", "ln_f.weight")
LEFT_WEIGHT = "lora_left_weight"
LORA_NAMES = ("lora_right_weight", LEFT_WEIGHT)
# What is raised where a kernel can't be compiled or loaded.
UNBUILT = (RuntimeError, ImportError, OSError, subprocess.CalledProcessError, AssertionError)


@chatter_to_log()
def create_optimizer(
    model: torch.nn.Module,
    learning_rate: float,
    weight_decay: float = 0.0,
    lora_learning_rate: float = 5e-4,
    offload: bool = False,
    lora_plus_ratio: float = 1.0,
) -> torch.optim.Optimizer:
    """Return DeepSpeedCPUAdam with `offload`, FusedAdam otherwise, torch's AdamW where their kernels don't build.

    All three are AdamW (decoupled weight decay) with betas (0.9, 0.95).
    """
    groups = get_optimizer_grouped_parameters(model, weight_decay, lora_learning_rate, lora_plus_ratio=lora_plus_ratio)
    kernel = DeepSpeedCPUAdam if offload else FusedAdam
    headers = find_cuda_headers()
    if headers is not None:
        print_rank_0(headers)
    try:
        with phase("preparing the optimizer"):  # compiled the first time
            optimizer = kernel(groups, lr=learning_rate, betas=BETAS)
    except UNBUILT as err:
        fused = not offload and all(one.device.type == "cuda" for group in groups for one in group["params"])
        name = "torch AdamW, fused" if fused else "torch AdamW"
        print_rank_0(f"Optimizer: {name}, since {kernel.__name__} can't be built here ({first_error(str(err))})")
        return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=fused or None)
    print_rank_0(f"Optimizer: {kernel.__name__}")
    return optimizer


@chatter_to_log()
def build_kernels(offloads: Iterable[bool]) -> None:
    """Compile the kernels that `create_optimizer` loads, with `offload` or not, where they can be built here."""
    headers = find_cuda_headers()
    if headers is not None:
        print_rank_0(headers)
    for builder in {CPUAdamBuilder if offload else FusedAdamBuilder for offload in offloads}:
        with suppress(*UNBUILT), phase("preparing the optimizer"):
            builder().load()


def create_engine(
    config: RunConfig, model: torch.nn.Module, ds_config: dict[str, Any], groups: Namespace | None
) -> deepspeed.DeepSpeedEngine:
    """Build the optimizer and the DeepSpeed engine of a run; `groups` of `start_sequence_parallel`."""
    args = config.args
    optimizer = create_optimizer(
        model,
        args.learning_rate,
        args.weight_decay,
        args.lora_learning_rate,
        config.offload is not None,
        args.lora_plus_ratio,
    )
    return initialize_engine(model, optimizer, ds_config, groups)


@chatter_to_log()
def initialize_engine(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], mpu: Namespace | None = None
) -> deepspeed.DeepSpeedEngine:
    """Call `deepspeed.initialize` and undo the step it takes by itself; returns the engine.

    `mpu` comes from `start_sequence_parallel`.

    In 16 bits at ZeRO 0 DeepSpeed (0.19) allocates Adam's moments by a step with zero gradients. It would
    count in the bias correction, so that the first real update is a quarter too small, and decay the weights.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    held = hold_float32(model)
    with phase("preparing DeepSpeed"):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)
    restore_masters(engine, held)
    del held
    engine.monitor.enabled = False  # its one event a step would come before ours of earlier steps: see trackers.py
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
        if "step" in group:
            group["step"] = 0
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"].zero_()
        elif "step" in state:
            state["step"] = 0
    if engine.zero_quantized_nontrainable_weights():
        engine.optimizer.quantize_nontrainable_params()  # LoRA froze them after they were loaded
    skip_steps_that_are_not_finite(engine)
    leave_overflow_to_the_norm(engine)
    leave_out_reduction_of_one_rank(engine)
    sweep_in_steps(engine)
    keep_freed_memory()  # from here on every step allocates what the one before freed
    return engine


def recount_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Bring DeepSpeed's CPU kernels to the number of updates that a resumed run has already made.

    The kernels keep beta^t as a running product beside the optimizer's state. A new kernel computes it as a power: the
    same number but for its last bits, in which the resumed run would differ from the uninterrupted one.
    """
    one = [torch.zeros(1) for _ in range(4)]
    if isinstance(optimizer, DeepSpeedCPUAdam):
        for count in range(1, updates + 1):
            optimizer.ds_opt_adam.adam_update(optimizer.opt_id, count, 0.0, *BETAS, 1e-8, 0.0, True, *one)
    elif isinstance(optimizer, FusedAdam) and get_accelerator().device_name() == "cpu":
        lists = [[tensor] for tensor in one]
        for count in range(1, updates + 1):
            optimizer.multi_tensor_adam(
                2048 * 32, optimizer._dummy_overflow_buf, lists, 0.0, *BETAS, 1e-8, count, optimizer.adam_w_mode, 1, 0.0
            )


def get_optimizer_grouped_parameters(
    model: torch.nn.Module,
    weight_decay: float,
    lora_lr: float = 5e-4,
    no_decay_name_list: Iterable[str] | None = None,
    lora_name_list: Iterable[str] = LORA_NAMES,
    lora_plus_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """Put trainable parameters into up to four groups: decayed, LoRA (own rate), LoRA's left weights, not decayed.

    The left weights, which start at zero, are a group of their own where `lora_plus_ratio` is not 1: their rate is that
    many times `lora_lr` (LoRA+, Hayou et al. 2024, https://arxiv.org/abs/2402.12354).

    Biases and the weights of all normalisation layers get no decay; with `no_decay_name_list` the parameters whose
    names contain one of its parts, and no others. Empty groups are left out.
    """
    no_decay, lora_names = tuple(no_decay_name_list or NO_DECAY_NAMES), tuple(lora_name_list)
    undecayed = _undecayed(model) if no_decay_name_list is None else set()
    decayed, lora, left, plain = [], [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if any(part in name for part in lora_names):
            (left if lora_plus_ratio != 1 and LEFT_WEIGHT in name else lora).append(parameter)
        elif id(parameter) in undecayed or any(part in name.lower() for part in no_decay):
            plain.append(parameter)
        else:
            decayed.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": lora, "weight_decay": weight_decay, "lr": lora_lr},
        {"params": left, "weight_decay": weight_decay, "lr": lora_lr * lora_plus_ratio},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _undecayed(model: torch.nn.Module) -> set[int]:
    """Return the ids of biases, of normalisation layers' weights, and of what the model itself marks as not decayed.

    A normalisation layer is known by its class, which every family calls a norm (LayerNorm, LlamaRMSNorm), whatever
    its name in the model is (`ln1`, `pre_ln`).
    """
    found = set()
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower() and not isinstance(module, (nn.Linear, nn.Embedding))
        for name, parameter in module.named_parameters(recurse=False):
            if is_norm or "bias" in name or getattr(parameter, "_no_weight_decay", False):
                found.add(id(parameter))
    return found


def skip_steps_that_are_not_finite(engine: deepspeed.DeepSpeedEngine) -> None:
    """Make a plain float32 optimizer skip such steps as all of DeepSpeed's own optimizers do.

    Without ZeRO and 16 bits DeepSpeed clips and steps without looking, and one bad gradient ruins every weight.
    """
    if engine.zero_optimization() or engine.bfloat16_enabled() or engine.fp16_enabled():
        return

    def clip() -> None:
        parameters = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = clip_grad_norm_(parameters, max_norm=engine.gradient_clipping(), mpu=engine.mpu)
        engine._global_grad_norm = norm
        engine.optimizer.overflow = not torch.isfinite(norm).item()
        if engine.optimizer.overflow:
            for parameter in parameters:
                parameter.grad = None

    engine.clip_fp32_gradients = clip


def leave_overflow_to_the_norm(engine: deepspeed.DeepSpeedEngine) -> None:
    """Switch off DeepSpeed's check of every gradient for overflow in 16 bits without ZeRO, a wait for each tensor.

    The norm of all gradients, computed right after, is not finite where one of them is not, and DeepSpeed skips such a
    step in the same way.
    """
    checker = getattr(engine.optimizer, "overflow_checker", None)
    if checker is not None and hasattr(engine.optimizer, "_skip_invalid_grad_norm"):
        checker.has_overflow = lambda params, has_moe_params=None: False


def leave_out_reduction_of_one_rank(engine: deepspeed.DeepSpeedEngine) -> None:
    """Switch off the reduction of gradients without ZeRO on one rank: it copies all of them twice, for nothing."""
    if dist.get_world_size() == 1 and not engine.zero_optimization():
        engine.enable_backward_allreduce = False
