"""Save a model for others: the Hugging Face folder, its LoRA adapter, and the comparison of what was saved."""

import os
from collections.abc import Callable
from typing import NamedTuple

import deepspeed
import torch
from transformers import PreTrainedTokenizerBase

from utils.distributed.ranks import is_rank_0
from utils.export.hf_model import save_model_folder, settled, unwrap
from utils.export.model_card import describe_model
from utils.export.peft_adapter import ADAPTER_FOLDER, save_lora_adapter
from utils.export.verify import live_logits, verify_saved_model
from utils.logging.console import phase
from utils.run_config import RunConfig

SAMPLE_TOKENS = 64  # of the text whose logits are compared


class ExportForm(NamedTuple):
    """How a model is saved."""

    base: str  # name or path of the model it was trained from
    max_shard_size: str
    with_adapter: bool  # write the LoRA weights alone too
    describe: Callable[[str], None]  # writes card, curves and chat template into a folder


def export_form(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> ExportForm:
    """Return how the run's arguments ask for models to be saved."""
    args = config.args
    describe = describe_model(config, tokenizer)
    return ExportForm(args.model_name_or_path, args.max_shard_size, args.save_lora_adapter, describe)


def adapter_folder(folder: str) -> str:
    """Return where the LoRA adapter of the model in `folder` is."""
    return os.path.join(folder, ADAPTER_FOLDER)


def save_verified_model(
    engine: deepspeed.DeepSpeedEngine,
    tokenizer: PreTrainedTokenizerBase,
    sample: torch.Tensor,
    folder: str,
    form: ExportForm,
) -> float:
    """Save the model, load it again with plain transformers and compare the logits. Every rank must call it.

    Args:
        sample: [length] token ids, of which the first 64 are compared.

    Returns:
        the largest difference of the logits relative to the largest logit; 0 on ranks that write nothing.

    Raises:
        UserError: the folder can't be written, or holds another model than the trained one.
    """
    ids = sample[None, :SAMPLE_TOKENS]
    expected = live_logits(engine.module, ids.to(engine.device))
    save_model_folder(settled(engine), tokenizer, folder, form.describe, form.max_shard_size)
    if form.with_adapter:
        save_lora_adapter(unwrap(engine), form.base, adapter_folder(folder))
    with phase("verifying the saved model"):
        return verify_saved_model(folder, ids, expected) if is_rank_0() else 0.0
