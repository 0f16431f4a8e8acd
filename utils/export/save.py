"""Save a model for others: the Hugging Face folder, its LoRA adapter, and the comparison of what was saved."""

import os
from collections.abc import Callable
from typing import NamedTuple

import deepspeed
import torch
from transformers import PreTrainedTokenizerBase

from utils.distributed.ranks import is_rank_0
from utils.export import verify
from utils.export.hf_model import save_model_folder, settled, unwrap
from utils.export.merged import compare_merged
from utils.export.model_card import describe_model
from utils.export.owned_files import ADAPTER_FOLDER
from utils.export.peft_adapter import write_adapter
from utils.export.verify import Verification, live_logits
from utils.export.weights import saved_bytes
from utils.logging.console import phase
from utils.run_config import RunConfig


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
) -> Verification:
    """Save the model, with its adapter if asked for, read it back and compare. Every rank must call it.

    Args:
        sample: [length] token ids, of which the first 64 are compared.

    Returns:
        what was compared; nothing on ranks that write nothing.

    Raises:
        UserError: the folder can't be written, or holds another model than the trained one.
    """
    expected = None
    if saved_bytes(unwrap(engine)) <= verify.FORWARD_LIMIT:
        expected = live_logits(engine.module, sample[None, : verify.SAMPLE_TOKENS].to(engine.device))
    model = settled(engine)

    def add_adapter(work: str, is_writer: bool) -> None:
        write_adapter(model, form.base, adapter_folder(work), is_writer)

    add = add_adapter if form.with_adapter else None
    written = save_model_folder(model, tokenizer, folder, form.describe, form.max_shard_size, add)
    merged = 0
    if expected is None:
        with phase("verifying the merged weights"):
            merged = compare_merged(model, folder, written)
    if not is_rank_0():
        return Verification()
    with phase("verifying the saved model"):
        return verify.verify_folder(folder, written, tokenizer, sample, expected)._replace(merged=merged)
