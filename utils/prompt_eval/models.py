"""The checkpoints of a comparison: checked before anything is loaded, loaded, and their perplexity measured."""

import glob
import math
import os
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from utils.data.batching.batches import collate_for, eval_batches
from utils.data.formats.custom import OwnOptions, own_options
from utils.data.formats.roles import parse_columns
from utils.data.mixture import DataSources
from utils.data.prepare import Preparation, prepare_prompt_data
from utils.data.prompt_dataset import PromptDataset
from utils.data.tokenization.tokenize_rows import SampleForm, end_of_conversation_token, end_token_id
from utils.errors import UserError
from utils.files import check_place
from utils.machine.device import free_memory as free_host_memory
from utils.machine.precision import DTYPES
from utils.model.checkpoint import check_weights
from utils.model.layout_check import choose_layout
from utils.model.loading_report import Report, check_report
from utils.model.model_folder import check_files
from utils.model.model_utils import grow_for, load_model_config
from utils.model.tokenizer import load_hf_tokenizer
from utils.module.remote_code import is_trusted
from utils.prompt_eval.config import EvalConfig
from utils.prompt_eval.same_texts import training_date
from utils.run_config import BatchCut
from utils.train.perplexity import Evaluation, evaluate

WEIGHTS = ("*.safetensors", "*.bin")
EVAL_BATCH = 16  # samples per forward; the perplexity does not depend on it


def load_config_and_tokenizer(
    path: str, extra_token: str | None = None
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Return configuration and tokenizer of a checkpoint, without loading its weights.

    Args:
        extra_token: a special token to add, as training does with --add_eot_token.

    Raises:
        UserError: the folder does not exist or holds no model, or the hub can't be reached.
    """
    check_place(path)
    if os.path.isdir(path):
        check_files(path)
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise UserError(f"{path}: no model here (config.json is missing); is it a run's --output_dir?")
        if not weight_files(path):
            raise UserError(f"{path}: no weights here ({' or '.join(WEIGHTS)}); did its run end before saving?")
    try:
        config = load_model_config(path)
        check_weights(path, config, tell=False)
        return config, load_hf_tokenizer(path, True, extra_token)
    except (OSError, ValueError) as error:
        raise _not_loadable(path, error) from error


def load(
    path: str, device: str, dtype: str = "auto", extra_token: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model of a checkpoint, on the device and ready to answer, and its tokenizer.

    Args:
        dtype: "bf16", "fp16" or "fp32"; "auto" is float32 on a CPU, elsewhere the checkpoint's own.
        extra_token: a special token to add, as training does with --add_eot_token.

    Raises:
        UserError: the checkpoint can't be loaded, or does not fit in the device's memory.
    """
    config, tokenizer = load_config_and_tokenizer(path, extra_token)
    stored = check_weights(path, config)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=chosen_dtype(config, device, dtype), trust_remote_code=is_trusted(),
            output_loading_info=True,
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _not_loadable(path, error) from error
    check_report(path, model, Report.of(info), stored)
    # The tokenizer may have gained a pad or end token for which the model has no row.
    grow_for(model, tokenizer)
    try:
        return model.to(device).eval(), tokenizer
    except torch.OutOfMemoryError as error:
        raise UserError(f"{path} does not fit on {device} ({error}): try --dtype bf16, or --device cpu") from error


def _not_loadable(path: str, error: Exception) -> UserError:
    """Return the error for a checkpoint that can't be loaded, with the first line of its reason."""
    reason = str(error).strip().split("\n")[0]
    return UserError(f"{path}: cannot be loaded, neither as a folder nor from the hub ({reason})")


def chosen_dtype(config: PretrainedConfig, device: str, dtype: str) -> torch.dtype:
    """Return the dtype in which `load` loads a checkpoint."""
    if dtype != "auto":
        return DTYPES[dtype]
    # On a CPU, half precision is slow and rounds differently.
    return torch.float32 if torch.device(device).type == "cpu" else config.dtype or torch.float32


def chosen_device(name: str | None) -> str:
    """Return `--device`, or this machine's accelerator if none is named.

    Raises:
        UserError: this machine has no such device.
    """
    if name is None:
        return get_accelerator().device_name()
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"--device {name}: not on this machine ({reason})") from error
    return name


def weight_files(path: str) -> list[str]:
    """Return the weight files of a folder: its safetensors, or else its .bin files."""
    return next((files for files in (glob.glob(os.path.join(path, kind)) for kind in WEIGHTS) if files), [])


def check_fit(paths: list[str], device: str, dtype: str) -> None:
    """Refuse to hold several models at once if their weights alone exceed the free memory.

    The size of a model on the hub is not known beforehand and counts as 0.

    Raises:
        UserError: they don't fit.
    """
    needed = 0
    for path in filter(os.path.isdir, paths):
        config = load_model_config(path)
        stored = (config.dtype or torch.float32).itemsize
        needed += sum(map(os.path.getsize, weight_files(path))) * chosen_dtype(config, device, dtype).itemsize // stored
    free = free_memory(device)
    if needed > free:
        raise UserError(
            f"{len(paths)} models need {needed / 1e9:.1f} GB on {device} at once and {free / 1e9:.1f} GB are free: "
            "talk to one at a time, by giving only one of the two models, or try --dtype bf16"
        )


def free_memory(device: str) -> float:
    """Return the free bytes of the device, infinity where they are not known."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if torch.device(device).type != "cpu" or not os.path.exists("/proc/meminfo"):
        return math.inf
    return free_host_memory()


def evaluation_data(
    config: EvalConfig,
    tokenizer: PreTrainedTokenizerBase,
    path: str,
    baseline: PreTrainedTokenizerBase | None = None,
) -> PromptDataset | None:
    """Return the evaluation part of the data sets, prepared as training prepares it; None where there are none.

    Args:
        tokenizer: the tokenizer of the model `path`.
        baseline: the tokenizer that training began with, whose chat template makes the texts of both models; None
            means `tokenizer`. A trained model has a chat template also where its training had none.

    Raises:
        UserError: bad data, or the tokenizer has no end token.
    """
    args = config.args
    if not (args.data_path or args.sft_only_data_path):
        return None
    baseline = tokenizer if baseline is None else baseline
    end = end_of_conversation_token(tokenizer, config.extra_token, path)
    sample = SampleForm(tokenizer, end, args.max_seq_len, args.completion_only_loss, overlong=args.overlong)
    own, sources, preparation = data_options(config, baseline)
    train, evaluation = prepare_prompt_data(sources, sample, own, preparation)
    evaluation.content = train.content
    return evaluation


def data_options(config: EvalConfig, baseline: PreTrainedTokenizerBase) -> tuple[OwnOptions, DataSources, Preparation]:
    """Return how the data of the arguments are read: as training reads them, which began with `baseline`."""
    args = config.args
    end = end_of_conversation_token(baseline, config.extra_token, args.model_name_or_path_baseline)
    own = own_options(
        baseline,
        end_token_id(baseline, end),
        parse_columns(args.columns),
        args.chat_template,
        args.train_turns,
        args.template_date or training_date(args.model_name_or_path_finetune),
    )
    sources = DataSources(args.data_path, args.data_split, args.sft_only_data_path, args.eval_data_path)
    return own, sources, Preparation(local_rank=0, cache_folder=args.data_output_path, phase=1, seed=args.seed)


def measure_perplexity(model: PreTrainedModel, tokenizer: Any, data: PromptDataset) -> Evaluation:
    """Return perplexity, loss and token accuracy as training prints them.

    Changes the model's forward, so that the model can't `generate` afterwards. Samples are padded to the longest of
    their batch, which changes no figure and works with every model's own attention.
    """
    device = model.device
    choose_layout(model, "longest", len(tokenizer), device, longest=data.max_seq_len)
    collate = collate_for("longest", tokenizer.pad_token_id, data.max_seq_len)
    batches = eval_batches(data, collate, BatchCut(EVAL_BATCH, on_cpu=device.type == "cpu"))
    return evaluate(model, batches, device, sources=list(data.by_source()))
