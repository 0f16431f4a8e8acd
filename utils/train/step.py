"""One micro batch through the engine: forward, loss, backward, and the optimizer's step where it is due."""

import deepspeed
import torch

from utils.data.batching.batches import TrainBatch
from utils.machine.device import to_device
from utils.module.fused_loss import summed_loss


def micro_step(engine: deepspeed.DeepSpeedEngine, batch: TrainBatch, device: torch.device) -> torch.Tensor:
    """Run one micro batch and return its loss, summed over its label tokens, float32.

    `batch.weight` turns DeepSpeed's averages over accumulation steps and ranks into the mean over all label tokens of
    the optimizer step.
    """
    engine.set_gradient_accumulation_boundary(batch.is_last)
    loss = summed_loss(engine, to_device(batch.tensors, device))
    engine.backward(loss * (batch.weight * unapplied_loss_scale(engine)))
    engine.step()
    return loss


def unapplied_loss_scale(engine: deepspeed.DeepSpeedEngine) -> float:
    """Return the factor by which the loss must be multiplied before `engine.backward`; 1 but in fp16 without ZeRO.

    `engine.backward` of DeepSpeed 0.19.3 to 0.19.8 scales the loss for ZeRO's optimizers alone, but the fp16 optimizer
    without ZeRO divides the gradients by the loss scale too. Unscaled, small gradients would vanish and the rest be
    divided by the scale.
    """
    scaling = getattr(engine.optimizer, "loss_scale_config", None)
    if engine.zero_optimization() or scaling is None or not scaling.use_grad_scaling:
        return 1.0
    return scaling.cur_scale
