"""AdamW's step in 16 bits without ZeRO as one sweep over pieces that stay in a cache.

DeepSpeed's `FP16_Optimizer.step`, which bf16 uses too, turns all gradients into float32, joins them, reads them for
their norm, scales them and only then calls FusedAdam: about 60 bytes of traffic a weight, and 8 bytes a weight of
memory. Here a piece of the gradients becomes float32 in a small buffer, is scaled, goes through the same kernel and is
copied into the weights before the next one. The arithmetic of each weight is the same, and so is that of the norm but
for the order of its sum.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.ops.adam import FusedAdam
from deepspeed.ops.adam.fused_adam import multi_tensor_applier
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer

# Elements of a piece: gradient, weight and two moments, 16 bytes each, fit a CPU's last cache (32 MB) or a GPU's (50 MB
# on an H100), and the kernels still run long enough to hide their launch.
PIECE = {"cpu": 1 << 20, "cuda": 1 << 21}


class Segment(NamedTuple):
    """What one piece holds of one parameter, in elements of the flattened parameter and of the piece."""

    parameter: torch.nn.Parameter
    begin: int
    end: int
    place: int


class Piece(NamedTuple):
    """A part of one group's flat master weights."""

    group: int
    begin: int
    end: int
    segments: list[Segment]


def sweep_in_steps(engine: DeepSpeedEngine) -> bool:
    """Have the engine's optimizer step in one sweep where it is DeepSpeed's 16-bit wrapper of FusedAdam.

    Returns:
        whether it does now: not with parallel models, DeepSpeed's own expert layers or another optimizer.
    """
    optimizer = engine.optimizer
    if not isinstance(optimizer, FP16_Optimizer) or not isinstance(optimizer.optimizer, FusedAdam):
        return False
    if optimizer.mpu is not None or optimizer.has_moe_layers or optimizer.fused_adam_legacy:
        return False
    pieces = list(cut(optimizer.fp16_groups, PIECE.get(engine.device.type, PIECE["cuda"])))
    optimizer.step = lambda closure=None: _step(optimizer, pieces)
    return True


def cut(groups: list[list[torch.nn.Parameter]], size: int) -> Iterator[Piece]:
    """Yield pieces of at most `size` elements that cover each group's parameters, one behind the other."""
    for number, group in enumerate(groups):
        begin, filled, segments = 0, 0, []
        for parameter in group:
            done = 0
            while done < parameter.numel():
                taken = min(size - filled, parameter.numel() - done)
                segments.append(Segment(parameter, done, done + taken, filled))
                done, filled = done + taken, filled + taken
                if filled == size:
                    yield Piece(number, begin, begin + filled, segments)
                    begin, filled, segments = begin + filled, 0, []
        if segments:
            yield Piece(number, begin, begin + filled, segments)


@torch.no_grad()
def _step(optimizer: FP16_Optimizer, pieces: list[Piece]) -> bool:
    """Take one step, or skip it where the gradients are not finite; return whether it was skipped."""
    scale = optimizer.loss_scale_config
    buffer = torch.empty(
        max((piece.end - piece.begin for piece in pieces), default=0), device=optimizer.fp32_groups_flat[0].device
    )
    scaled_norm = gradient_norm(pieces, buffer)
    optimizer.overflow = not scaled_norm < float("inf")
    if optimizer.overflow:
        return optimizer._skip_invalid_grad_norm()
    if scale.use_grad_scaling:
        optimizer._update_scale(False)
    optimizer._global_grad_norm = scaled_norm / scale.cur_scale
    factor = 1.0 / optimizer.unscale_and_clip_grads([], scaled_norm)
    adam = optimizer.optimizer
    for flat in optimizer.fp32_groups_flat:
        adam.state[flat]["step"] += 1
    for piece in pieces:
        gradient = buffer[: piece.end - piece.begin]
        _read_gradient(piece, gradient)
        if factor != 1:
            gradient.mul_(factor)
        _update(optimizer, piece, gradient)
    optimizer.zero_grad(set_to_none=True)
    return False


def gradient_norm(pieces: list[Piece], buffer: torch.Tensor) -> float:
    """Return the 2-norm of all gradients, summed in float32 or better; the one time a step waits for the device."""
    gradients = {id(one.parameter): one.parameter.grad for piece in pieces for one in piece.segments}
    present = [gradient for gradient in gradients.values() if gradient is not None]
    if not present:
        return 0.0
    if buffer.device.type != "cpu":
        norms = torch._foreach_norm(present, 2, dtype=torch.float32)
        return torch.stack(norms).double().norm().item()
    # On a CPU a norm in another dtype than its input's makes a copy of all of it.
    squares = torch.zeros((), dtype=torch.float64)
    for piece in pieces:
        gradient = buffer[: piece.end - piece.begin]
        _read_gradient(piece, gradient)
        squares += torch.linalg.vector_norm(gradient).double() ** 2
    return squares.sqrt().item()


def _read_gradient(piece: Piece, into: torch.Tensor) -> None:
    """Write the piece's gradients into a float32 buffer; zeros where a parameter has none."""
    sources, places = [], []
    for parameter, begin, end, place in piece.segments:
        part = into[place : place + end - begin]
        if parameter.grad is None:
            part.zero_()
        else:
            sources.append(parameter.grad.reshape(-1)[begin:end])
            places.append(part)
    if places:
        torch._foreach_copy_(places, sources)


def _update(optimizer: FP16_Optimizer, piece: Piece, gradient: torch.Tensor) -> None:
    """Update master weights and moments of a piece by FusedAdam's kernel, and copy the weights into the model."""
    adam, flat = optimizer.optimizer, optimizer.fp32_groups_flat[piece.group]
    group, state = adam.param_groups[piece.group], adam.state[flat]
    part = slice(piece.begin, piece.end)
    master = flat.data[part]
    multi_tensor_applier(
        adam.multi_tensor_adam, adam._dummy_overflow_buf,
        [[gradient], [master], [state["exp_avg"][part]], [state["exp_avg_sq"][part]]],
        group["lr"], *group["betas"], group["eps"], state["step"], adam.adam_w_mode,
        1 if group["bias_correction"] else 0, group["weight_decay"],
    )  # fmt: skip
    weights = [parameter.data.view(-1)[begin:end] for parameter, begin, end, _ in piece.segments]
    torch._foreach_copy_(weights, [master[place : place + end - begin] for _, begin, end, place in piece.segments])
