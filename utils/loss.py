"""The loss of a batch as a float32 sum over its label tokens; averaging is the caller's, over the whole step."""

import torch
import torch.nn.functional as F

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def summed_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of the negative log-likelihoods of all label tokens of `batch`: a float32 scalar.

    Logits leave the model in its own dtype; cross-entropy runs in float32, on labelled positions only.
    A batch without a label gives 0 with a gradient, so that every rank runs the same backward.
    """
    inputs = {key: batch[key] for key in MODEL_INPUTS if key in batch}
    logits = model(**inputs, use_cache=False).logits
    picked = logits.flatten(0, 1).index_select(0, batch["positions"])
    return F.cross_entropy(picked.float(), batch["targets"], reduction="sum")
