"""Small helpers of a run: rank-0 printing, seeds, tokenizer, parameter groups, saving by the users' names."""

import json
import os
import random
from argparse import Namespace
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from transformers import AutoConfig, AutoTokenizer, GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from utils.big_models import DEFAULT_SHARD_SIZE
from utils.console import say
from utils.errors import UserError
from utils.saving import save_model_folder, settled, write_weights

# Spellings of "this parameter is a bias or belongs to a normalisation layer" in the families in use:
# OPT/GPT-2 `..._layer_norm`, `ln_1`, BLOOM/NeoX `..._layernorm`, Llama/Qwen/Gemma `...norm.weight`, MPT `norm_1`.
NO_DECAY_NAMES = ("bias", "layer_norm.", "layernorm.", "norm.", "norm_", "norm1.", "norm2.", "ln_")
LORA_NAMES = ("lora_right_weight", "lora_left_weight")


def global_rank() -> int:
    """This process's rank over all nodes, 0 when nothing is distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def print_rank_0(msg: str, rank: int | None = None) -> None:
    """Print on rank 0 only; `rank` overrides the process group's own answer (<= 0 prints)."""
    if (global_rank() if rank is None else rank) <= 0:
        say(msg)


def to_device(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Move every tensor of a batch to `device` without waiting for the copy."""
    return {
        key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value for key, value in batch.items()
    }


def set_random_seed(seed: int) -> None:
    """Seed Python, numpy, torch and the accelerator."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    get_accelerator().manual_seed_all(seed)


def get_all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Average `tensor` over all ranks, in place; returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        tensor /= dist.get_world_size()
    return tensor


def wait_for_all() -> None:
    """Go on when every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


def answer_of_rank_0(answer: Any) -> Any:
    """What rank 0 passes in, on every rank; each must call it."""
    answers = [answer]
    if dist.is_initialized():
        dist.broadcast_object_list(answers, src=0)
    return answers[0]


def all_reduce_sum(values: Iterable[float], device: torch.device | str) -> list[float]:
    """Sum each of `values` over all ranks (float64 where the device has it)."""
    dtype = torch.float32 if get_accelerator().device_name() == "mps" else torch.float64
    tensor = torch.tensor(list(values), dtype=dtype, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor.tolist()


# --------------------------------------------------------------------------------------------- tokenizer


def load_hf_tokenizer(
    model_name_or_path: str,
    fast_tokenizer: bool = True,
    add_special_tokens: str | list[str] | None = None,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to `model_name_or_path`: a folder is never looked up elsewhere.

    Args:
        model_name_or_path: a local folder, or a name on the hub.
        fast_tokenizer: use the Rust implementation where there is one.
        add_special_tokens: extra special tokens to add (the end-of-conversation token).

    Raises:
        UserError: the folder holds no tokenizer, or the hub name can't be reached.
    """
    tokenizer = _read_tokenizer(model_name_or_path, fast_tokenizer)
    if add_special_tokens:
        extra = [add_special_tokens] if isinstance(add_special_tokens, str) else list(add_special_tokens)
        tokenizer.add_special_tokens({"additional_special_tokens": extra})
    if tokenizer.eos_token is None:
        _adopt_eos_of_config(tokenizer, model_name_or_path)
    if tokenizer.pad_token is None:
        # Masks come from lengths here, never from ids, so sharing eos is safe and the vocabulary stays
        # as it is; a new token is made only where there is no eos to share.
        if tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token
        else:
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.padding_side = "right"
    return tokenizer


def _read_tokenizer(path: str, fast: bool) -> PreTrainedTokenizerBase:
    local = os.path.isdir(path)
    if local:
        files = set(os.listdir(path))
        known = {
            "tokenizer.json",
            "tokenizer.model",
            "vocab.json",
            "vocab.txt",
            "spiece.model",
            "tekken.json",
        }
        if not files & known:
            raise UserError(
                f"no tokenizer in the folder {path}: it has none of {', '.join(sorted(known))}. "
                "Put the model's tokenizer files there (tokenizer.save_pretrained(folder) writes them)."
            )
    try:
        if local and _is_bare_opt_vocabulary(path, files):
            return _opt_tokenizer(path)
        if local and _is_bare_llama_vocabulary(path, files):
            return LlamaTokenizer.from_pretrained(path, add_bos_token=True, local_files_only=True)
        return AutoTokenizer.from_pretrained(path, use_fast=fast, local_files_only=local)
    except (OSError, ValueError, KeyError, ImportError, json.JSONDecodeError) as err:
        reason = " ".join(str(err).split())[:300]
        if not local:
            advice = "is the name right and the hub reachable? Offline, give the path of a downloaded folder"
        elif "tokenizer.model" in files and find_spec("sentencepiece") is None:
            advice = "tokenizer.model wants `pip install sentencepiece protobuf`"
        else:
            advice = "check that the folder's tokenizer files are complete"
        raise UserError(f"the tokenizer of {path} can't be loaded ({reason}): {advice}.") from err


def _is_bare_opt_vocabulary(path: str, files: set[str]) -> bool:
    """True for OPT's vocab.json + merges.txt without the configuration that says how OPT uses them."""
    if "vocab.json" not in files or "tokenizer.json" in files or "tokenizer_config.json" in files:
        return False
    with open(os.path.join(path, "vocab.json"), encoding="utf-8") as file:
        vocab = json.load(file)
    return (vocab.get("<s>"), vocab.get("<pad>"), vocab.get("</s>")) == (0, 1, 2)


def _is_bare_llama_vocabulary(path: str, files: set[str]) -> bool:
    """True for a Llama's tokenizer.model without the configuration that says it starts with BOS and a space."""
    if "tokenizer.model" not in files or "tokenizer.json" in files or "tokenizer_config.json" in files:
        return False
    return "config.json" in files and AutoConfig.from_pretrained(path).model_type in ("llama", "mistral")


def _opt_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """OPT's own way with GPT-2's byte-level BPE: every text starts with `</s>`, which also ends it."""
    return GPT2Tokenizer.from_pretrained(
        path,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
        add_bos_token=True,
        local_files_only=True,
    )


def _adopt_eos_of_config(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Use the model configuration's eos id where the tokenizer's own files name none."""
    try:
        eos = AutoConfig.from_pretrained(path, local_files_only=os.path.isdir(path)).eos_token_id
    except (OSError, ValueError):
        return
    eos = eos[0] if isinstance(eos, list) and eos else eos
    if isinstance(eos, int) and eos < len(tokenizer):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)


# ------------------------------------------------------------------------------------------ optimizer


def get_optimizer_grouped_parameters(
    model: torch.nn.Module,
    weight_decay: float,
    lora_lr: float = 5e-4,
    no_decay_name_list: Iterable[str] = NO_DECAY_NAMES,
    lora_name_list: Iterable[str] = LORA_NAMES,
) -> list[dict[str, Any]]:
    """Trainable parameters in up to three groups: decayed, LoRA (own rate), not decayed.

    Biases and the weights of all normalisation layers get no decay. Empty groups are left out.
    """
    no_decay, lora_names = tuple(no_decay_name_list), tuple(lora_name_list)
    decayed, lora, plain = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if any(part in name for part in lora_names):
            lora.append(parameter)
        elif any(part in name.lower() for part in no_decay):
            plain.append(parameter)
        else:
            decayed.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": lora, "weight_decay": weight_decay, "lr": lora_lr},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


# --------------------------------------------------------------------------------------------- saving


def save_hf_format(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    args: Namespace,
    sub_folder: str = "",
    describe: Callable[[str], None] | None = None,
) -> str:
    """Save model, configuration, generation configuration and tokenizer so that plain transformers loads them.

    Every rank must call it (ZeRO 3 gathers). LoRA is merged on the way out; live weights stay untouched.
    `describe` adds what else is to be there. Returns the folder, `args.output_dir` / `sub_folder`.
    """
    folder = os.path.join(args.output_dir, sub_folder) if sub_folder else args.output_dir
    shard_size = getattr(args, "max_shard_size", DEFAULT_SHARD_SIZE)  # callers of the original have no such argument
    save_model_folder(settled(model), tokenizer, folder, describe, shard_size)
    return folder


def save_zero_three_model(model_ema: torch.nn.Module, global_rank: int, save_dir: str, zero_stage: int = 0) -> None:
    """Write the weights alone, as safetensors, into `save_dir`; every rank must call it.

    `zero_stage` is kept for callers of the original; how a parameter is partitioned is read off itself.
    """
    if global_rank == 0:
        os.makedirs(save_dir, exist_ok=True)
    write_weights(settled(model_ema), save_dir, is_writer=global_rank == 0)
