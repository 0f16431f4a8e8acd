"""Checks before a run: everything that can be known to fail is found, all at once, before a model is loaded."""

from __future__ import annotations

import copy
import os
from argparse import Namespace
from collections.abc import Callable
from typing import Any, TypeVar

from deepspeed.accelerator import get_accelerator
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from utils.arguments.output_folder import check_output_folder
from utils.arguments.places import check_model_folder, check_temporary_folder, check_writable
from utils.arguments.values import can_split, check_values, check_zero
from utils.checkpoint.checkpoint_folder import find_checkpoint
from utils.checkpoint.resume import check_same_run
from utils.data.cache import cache_lock
from utils.data.formats.chat_template import ChatFormat, resolve_chat_format
from utils.data.formats.custom import OwnOptions
from utils.data.formats.roles import parse_columns
from utils.data.mixture import SFT_ONLY_SPLIT, shares_of
from utils.data.prepare import get_raw_dataset
from utils.data.raw_datasets import known_name
from utils.data.splits import split_boundaries
from utils.data.tokenization.tokenize_rows import end_of_conversation_token
from utils.distributed.launchers import launched_rank, launched_ranks
from utils.distributed.process_group import check_local_rank, local_rank_of
from utils.ds_file.read import Zero, merged_zero, read_deepspeed_file
from utils.ds_utils import check_ds_file
from utils.engine.nvme_swap import check_async_io, check_swap_folder
from utils.errors import UserError, join_problems, root_cause
from utils.export.peft_adapter import check_adapter
from utils.files import check_place
from utils.logging.console import say
from utils.logging.trackers import check_monitors, check_reports, wanted_reports
from utils.model.build import create_meta_model, model_form
from utils.model.checkpoint import check_weights
from utils.model.config_values import check_length, check_rope
from utils.model.model_utils import check_activation_offloading, configure_dropout
from utils.model.special_tokens import token_rows
from utils.model.tokenizer import check_saving, load_hf_tokenizer
from utils.module.empty_model import empty_model
from utils.module.lora_names import check_lora_module_name
from utils.module.quantized import check_quantization, check_quantized_model
from utils.module.remote_code import trust_remote_code
from utils.module.sequence_parallel import check_sequence_parallel
from utils.module.tiled_mlp import check_tiled_mlp
from utils.notation import Gpus, asked_eot_token, parse_data_split, parse_gpus, parse_source
from utils.prompt_eval.samples import read_asked
from utils.run_config import decide_dtype

Result = TypeVar("Result")


def check_run(args: Namespace) -> None:
    """Check the arguments against machine, model, tokenizer and data, before a model is loaded or a file written.

    Raises:
        UserError: everything that is wrong, in one message.
    """
    problems, causes = check_values(args), set()
    trust_remote_code(args.trust_remote_code)

    def attempt(check: Callable[..., Result], *arguments: Any) -> Result | None:
        try:
            return check(*arguments)
        except UserError as err:
            cause = root_cause(err)  # a configuration that can't be read stops its tokenizer too
            if str(err) not in problems and (cause is None or cause not in causes):
                problems.append(str(err))
            causes.add(cause)
            return None

    gpus = attempt(parse_gpus, args.dry_run)
    ranks = launched_ranks() if gpus is None else gpus.count
    problems += _check_machine(args, gpus, ranks, attempt)
    if args.output_dir is not None:
        attempt(check_writable, args.output_dir, "--output_dir")
        attempt(check_output_folder, args)
    if "tensorboard" in wanted_reports(args.report_to, args.enable_tensorboard):
        attempt(check_writable, os.path.join(args.tensorboard_path, "ds_tensorboard_logs"), "--tensorboard_path")
    has_room = attempt(check_temporary_folder)
    if not problems:
        attempt(_check_resume, args)
    is_place = attempt(check_place, args.model_name_or_path)
    config = attempt(check_model_folder, args.model_name_or_path, not args.dry_run) if is_place else None
    if config is not None:
        _check_model(args, config, attempt)
    tokenizer = attempt(_check_tokenizer, args) if is_place and has_room else None
    if args.save_lora_adapter and config is not None and tokenizer is not None:
        attempt(_check_adapter_base, args, config, token_rows(tokenizer))
    if args.add_eot_token and args.lora_dim > 0 and config is not None and tokenizer is not None:
        attempt(_check_new_row, args, config, tokenizer)
    columns = attempt(_check_columns, args)
    chat = None if tokenizer is None else attempt(_chat_format, args, tokenizer)
    if args.sample_prompts is not None and config is not None and tokenizer is not None:
        names = [parse_source(name).name for name in (*args.data_path, *args.sft_only_data_path)]
        is_own = any(known_name(name) is None for name in names)
        attempt(read_asked, args, chat if is_own else None, tokenizer, config)
    many = len([*args.data_path, *args.sft_only_data_path, *args.eval_data_path]) > 1
    own = OwnOptions(columns or {}, chat or ChatFormat(), args.train_turns, tokenizer, columns_of_others=many)
    if attempt(check_writable, args.data_output_path, "--data_output_path") and can_split(args.seed, args.data_split):
        for name in args.data_path:
            attempt(_check_data, name, shares_of(name, args.data_split), args, own)
        for name in args.sft_only_data_path:
            attempt(_check_data, name, SFT_ONLY_SPLIT, args, own)
        for name in args.eval_data_path:
            attempt(_check_data, name, SFT_ONLY_SPLIT, args, own._replace(evaluates=True))
    if not problems and config is not None and os.path.isdir(args.model_name_or_path) and not args.dry_run:
        attempt(check_weights, args.model_name_or_path, config, False)  # imports the model's code, so it comes last
    if problems:
        raise UserError(join_problems(problems))


def _check_machine(args: Namespace, gpus: Gpus | None, ranks: int, attempt: Callable[..., Any]) -> list[str]:
    """Try what depends on this machine and its ranks, or on those of the plan; return what big models can't have."""
    attempt(check_local_rank, local_rank_of(args.local_rank))
    file = attempt(_check_deepspeed_file, args, ranks)
    decided = attempt(decide_dtype, args, file or {})
    attempt(check_reports, args.report_to, args.enable_tensorboard)
    attempt(_check_groups, args.sequence_parallel_size, ranks)
    if args.activation_offloading and gpus is None:
        attempt(check_activation_offloading)
    zero = merged_zero(args, file or {})
    attempt(check_quantization, args.quantize_base, zero.stage)
    problems = check_zero(args, zero) if args.deepspeed_config and file is not None else []
    return problems + check_scale(args, ranks, gpus is not None, zero, decided[0] if decided else args.dtype)


def _check_model(args: Namespace, config: PretrainedConfig, attempt: Callable[..., Any]) -> None:
    """Try what depends on the model's configuration."""
    attempt(check_length, args.max_seq_len, config)
    attempt(check_rope, config, args)
    if args.lora_dim > 0:
        attempt(_check_lora_names, config, args.lora_module_name)
    if args.quantize_base:
        attempt(check_quantized_model, config, args.dry_run)
    if args.sequence_parallel_size > 1:
        attempt(check_sequence_parallel, config, args.sequence_parallel_size)
    if args.tiled_mlp:
        own = copy.deepcopy(config)
        configure_dropout(own, model_form(args).dropout)
        attempt(check_tiled_mlp, own)


def _check_deepspeed_file(args: Namespace, ranks: int) -> dict[str, Any]:
    """Return what the file of `--deepspeed_config` sets, which DeepSpeed itself has read too."""
    settings = read_deepspeed_file(args, ranks).settings
    if args.deepspeed_config:
        check_ds_file(args, settings)
        check_monitors(settings)
    return settings


def _check_groups(size: int, ranks: int) -> None:
    if size > 1 and ranks % size:
        raise UserError(f"--sequence_parallel_size {size} must divide the number of ranks, which is {ranks}.")


def _check_resume(args: Namespace) -> None:
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    if checkpoint is not None:
        check_same_run(checkpoint, args, launched_ranks() // args.sequence_parallel_size)


def _check_lora_names(config: PretrainedConfig, module_name: str) -> None:
    check_lora_module_name(empty_model(config), module_name)


def _check_adapter_base(args: Namespace, config: PretrainedConfig, entries: int) -> None:
    """Check that PEFT takes the layers, and that the base model, used as published, has a row for every token."""
    form = model_form(args)._replace(gradient_checkpointing=False, activation_offloading=False, tiled_mlp=False)
    check_adapter(create_meta_model(copy.deepcopy(config), form, "fp32"))
    rows = config.get_text_config().vocab_size
    if rows < entries:
        raise UserError(
            f"--save_lora_adapter: the tokenizer has {entries} entries and the base model {rows} rows of embeddings. "
            "The rows that would be added are no part of an adapter: leave --add_eot_token out, or grow the base "
            "model first and train that."
        )


def _check_new_row(args: Namespace, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the row of a token which the model never saw is trained, wherever LoRA freezes weights."""
    if args.eot_token in load_hf_tokenizer(args.model_name_or_path).get_vocab():
        return
    form = model_form(args)._replace(gradient_checkpointing=False, activation_offloading=False, tiled_mlp=False)
    model = create_meta_model(copy.deepcopy(config), form, "fp32", token_rows(tokenizer))
    parts = {"input embeddings": model.get_input_embeddings(), "output layer": model.get_output_embeddings()}
    frozen = [name for name, part in parts.items() if part is not None and not part.weight.requires_grad]
    if not frozen:
        return
    flag = "--only_optimize_lora" if args.only_optimize_lora else f"--lora_module_name {args.lora_module_name}"
    row = f"its row of the {' and the '.join(frozen)}"
    if config.get_text_config().vocab_size < token_rows(tokenizer):
        raise UserError(
            f"--add_eot_token adds {args.eot_token!r}, a token the model never saw, and with {flag} {row} would stay "
            "random: leave one of the two flags out, or give --eot_token a special token that the model has."
        )
    if launched_rank() == 0:
        say(f"--add_eot_token: the model has a spare row for {args.eot_token!r}, but with {flag} {row} is not trained")


def _check_tokenizer(args: Namespace) -> PreTrainedTokenizerBase:
    """Load the tokenizer, save it and load that: what would fail after training fails now. Returns it."""
    eot_token = asked_eot_token(args)
    tokenizer = load_hf_tokenizer(args.model_name_or_path, add_special_tokens=eot_token)
    end_of_conversation_token(tokenizer, eot_token, args.model_name_or_path)
    if args.completion_only_loss and not tokenizer.is_fast:
        raise UserError(
            f"--completion_only_loss needs a fast tokenizer, which tells where each token stands in the text; "
            f"{args.model_name_or_path} has none."
        )
    check_saving(tokenizer, args.model_name_or_path)
    return tokenizer


def _check_columns(args: Namespace) -> dict[str, str]:
    columns = parse_columns(args.columns)
    names = [parse_source(name).name for name in (*args.data_path, *args.sft_only_data_path, *args.eval_data_path)]
    if columns and all(known_name(name) for name in names):
        raise UserError(f"--columns is for data of your own: the columns of {', '.join(names)} are known.")
    return columns


def _chat_format(args: Namespace, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    end_token = end_of_conversation_token(tokenizer, asked_eot_token(args), args.model_name_or_path)
    return resolve_chat_format(args.chat_template, tokenizer, end_token, args.template_date)


def _check_data(text: str, data_split: str, args: Namespace, own: OwnOptions) -> None:
    """Check that a data set is known, readable and well-formed, and gives phase 1 rows."""
    name, weight = parse_source(text)
    if args.streaming:
        raw = get_raw_dataset(name, args.data_output_path, args.seed, 1, own, streaming=True)
        raw.try_rows(args.completion_only_loss)
        return
    with cache_lock(args.data_output_path):
        raw = get_raw_dataset(name, args.data_output_path, args.seed, 1, own)
        rows = len(raw.get_train_data())
    raw.try_rows(args.completion_only_loss)
    # The published rounding can give a zero share one row; nobody who writes 0 wants to train on that.
    share = split_boundaries(data_split, rows).boundaries[1]
    if share == 0 or parse_data_split(data_split)[0] == 0:
        raise UserError(
            f"the first part of --data_split {data_split} holds none of the {rows} training rows of {name}: "
            "give it a larger share."
        )
    if round(share * weight) == 0:
        raise UserError(f"--data_path {text} leaves none of {share} training rows: give it a larger weight.")


def check_scale(args: Namespace, ranks: int, is_plan: bool, zero: Zero, dtype: str) -> list[str]:
    """List what this machine, or the GPUs of a plan, can't do of the arguments of big models.

    Args:
        zero, dtype: of flags and file together.
    """
    problems, size = [], zero.copies
    if size > 1 and ranks % size != 0:
        problems.append(
            f"--zero_hpz_partition_size {size} does not divide {ranks} rank(s): give the number of a node's devices."
        )
    if zero.eight_bits and dtype != "fp16":
        problems.append(
            f"--enable_mixed_precision_lora needs --dtype fp16, not {dtype}: DeepSpeed's 8-bit kernel reads fp16."
        )
    if is_plan:
        return problems
    if zero.eight_bits and get_accelerator().device_name() != "cuda":
        problems.append(
            f"--enable_mixed_precision_lora can't be used on {get_accelerator().device_name()}: DeepSpeed's 8-bit "
            "kernel exists for CUDA alone. Leave it out."
        )
    if args.offload == "nvme":
        for check in (check_async_io, lambda: args.nvme_path is None or check_swap_folder(args.nvme_path)):
            try:
                check()
            except UserError as err:
                problems.append(str(err))
    return problems
