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
    engine.backward(loss * batch.weight)
    engine.step()
    return loss
