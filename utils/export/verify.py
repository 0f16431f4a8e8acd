"""Load a saved model again and compare its logits with the live model's."""

from __future__ import annotations

import math

import torch
import transformers
from safetensors import SafetensorError

from utils.errors import UserError


def live_logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the logits [1, length, vocabulary] of the live model, float32 on the CPU. Every rank must call it."""
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False).logits
    model.train(training)
    return logits.float().cpu()


def verify_saved_model(folder: str, input_ids: torch.Tensor, expected: torch.Tensor) -> float:
    """Load `folder` with plain transformers on the CPU and compare its logits with the live model's.

    Args:
        input_ids: [1, length] token ids.
        expected: [1, length, vocabulary] float32 logits of the live model on the same ids.

    Returns:
        the largest difference relative to the largest logit.

    Raises:
        UserError: it does not load, or differs by more than the dtype's rounding explains.
    """
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as err:
        raise UserError(f"the model saved in {folder} does not load again: {err}") from err
    actual = live_logits(model, input_ids.cpu())
    if actual.shape == expected.shape:
        difference = ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
    else:
        difference = math.inf  # another vocabulary
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    if not difference <= tolerance:
        raise UserError(
            f"the model saved in {folder} is not the trained one: its logits differ by {difference:.2%} "
            f"(allowed {tolerance:.1%} in {model.dtype}). The folder was left for inspection; don't use it."
        )
    return difference
