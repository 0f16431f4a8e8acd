"""Checkpoints as prompt_eval.py uses them: looked at before anything is loaded, loaded, and measured."""

import glob
import os
import sys
from argparse import Namespace
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from utils.data.batching.batches import collate_for, eval_batches
from utils.data.data_utils import create_prompt_dataset
from utils.data.prompt_dataset import PromptDataset
from utils.errors import UserError
from utils.machine.precision import DTYPES
from utils.model.layout_check import choose_layout
from utils.model.model_utils import grow_embeddings
from utils.model.tokenizer import load_hf_tokenizer
from utils.train.perplexity import evaluate

WEIGHTS = ("*.safetensors", "*.bin")
EVAL_BATCH = 16  # samples per forward; the figure does not depend on it


def look_at(path: str, extra_token: str | None = None) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer of a checkpoint, which cost little.

    Args:
        extra_token: a special token to add, as training does with --add_eot_token.

    Raises:
        UserError: there is no such folder, it holds no model, or the hub can't be reached.
    """
    if not os.path.isdir(path) and (path.startswith(("/", ".", "~")) or path.count("/") > 1):
        raise UserError(f"{path}: there is no such folder")
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise UserError(f"{path}: no model here (config.json is missing); is it a run's --output_dir?")
        if not weight_files(path):
            raise UserError(f"{path}: no weights here ({' or '.join(WEIGHTS)}); did its run end before saving?")
    try:
        return AutoConfig.from_pretrained(path), load_hf_tokenizer(path, True, extra_token)
    except (OSError, ValueError) as error:
        raise _not_loadable(path, error) from error


def load(
    path: str, device: str, dtype: str = "auto", extra_token: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model on the device, ready to answer, and tokenizer of one checkpoint.

    Args:
        dtype: "auto" is the checkpoint's own, on a CPU float32; or "bf16", "fp16", "fp32".
    """
    config, tokenizer = look_at(path, extra_token)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=chosen_dtype(config, device, dtype))
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _not_loadable(path, error) from error
    # The tokenizer may have got a pad or end token that the model has no row for.
    grow_embeddings(model, len(tokenizer))
    try:
        return model.to(device).eval(), tokenizer
    except torch.OutOfMemoryError as error:
        raise UserError(f"{path} does not fit on {device} ({error}): try --dtype bf16, or --device cpu") from error


def _not_loadable(path: str, error: Exception) -> UserError:
    reason = str(error).strip().split("\n")[0]
    return UserError(f"{path}: cannot be loaded, neither as a folder nor from the hub ({reason})")


def chosen_dtype(config: PretrainedConfig, device: str, dtype: str) -> torch.dtype:
    """What `load` loads in."""
    if dtype != "auto":
        return DTYPES[dtype]
    # On a CPU half precision is slow, and rounds differently.
    return torch.float32 if torch.device(device).type == "cpu" else config.dtype or torch.float32


def chosen_device(name: str | None) -> str:
    """`--device`, or the accelerator this machine has; UserError where torch has no such device."""
    if name is None:
        return get_accelerator().device_name()
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"--device {name}: not on this machine ({reason})") from error
    return name


def weight_files(path: str) -> list[str]:
    """The files of a folder that hold weights: safetensors where there are any."""
    return next((files for files in (glob.glob(os.path.join(path, kind)) for kind in WEIGHTS) if files), [])


def check_fit(paths: list[str], device: str, dtype: str) -> None:
    """Refuses to hold several models at once where their weights alone are more than the free memory.

    A hub name's size is not known beforehand: it counts as nothing.
    """
    needed = 0
    for path in filter(os.path.isdir, paths):
        config = AutoConfig.from_pretrained(path)
        stored = (config.dtype or torch.float32).itemsize
        needed += sum(map(os.path.getsize, weight_files(path))) * chosen_dtype(config, device, dtype).itemsize // stored
    free = free_memory(device)
    if needed > free:
        raise UserError(
            f"{len(paths)} models need {needed / 1e9:.1f} GB on {device} at once and {free / 1e9:.1f} GB are free: "
            "talk to one at a time, by giving only one of the two, or try --dtype bf16"
        )


def free_memory(device: str) -> int:
    """Bytes that are free on the device, on a CPU as Linux says; where that is not known, no limit."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if torch.device(device).type != "cpu" or not os.path.exists("/proc/meminfo"):
        return sys.maxsize
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def evaluation_data(args: Namespace, tokenizer: PreTrainedTokenizerBase) -> PromptDataset | None:
    """The evaluation part of `--data_path`, prepared as training prepares it; None without `--data_path`."""
    if not args.data_path:
        return None
    end = args.eot_token if args.add_eot_token else tokenizer.eos_token
    if end is None:
        raise UserError("--data_path: the tokenizer has no end token; give --add_eot_token as in training")
    return create_prompt_dataset(
        0, args.data_path, args.data_split, args.data_output_path, 1, args.seed, tokenizer, args.max_seq_len, end,
        completion_only=args.completion_only_loss,
    )[1]  # fmt: skip


def measure_perplexity(model: PreTrainedModel, tokenizer: Any, data: PromptDataset) -> tuple[float, float]:
    """(perplexity, loss) as training prints them. Leaves the model's forward changed: it can't `generate` after this.

    Samples are padded to the longest of their batch, which changes no figure and needs no special attention.
    """
    device = model.device
    choose_layout(model, "longest", len(tokenizer), device)
    collate = collate_for("longest", tokenizer.pad_token_id, data.max_seq_len)
    return evaluate(model, eval_batches(data, collate, EVAL_BATCH, 1, 0, device.type == "cpu"), device)
