"""Checks of the command line's values alone: no file, model or device is looked at."""

import argparse
from argparse import Namespace
from contextlib import suppress

from utils.data.formats.roles import parse_columns
from utils.data.mixture import KNOWN_SPLIT, shares_of
from utils.ds_file.read import Zero, merged_zero
from utils.errors import UserError
from utils.notation import (
    check_evaluation_source,
    is_date,
    parse_data_split,
    parse_fit,
    parse_gpus,
    parse_size,
    parse_source,
    parse_steps,
)

MAX_SEED = 2**32  # numpy's


def check_values(args: argparse.Namespace) -> list[str]:
    """List what is wrong with the arguments' values."""
    problems = []
    at_least = {
        "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
        "num_train_epochs": 1, "num_warmup_steps": 0, "max_seq_len": 2, "lora_dim": 0, "ddp_timeout": 1, "seed": 0,
        "max_steps": 1, "eval_steps": 1, "save_steps": 1, "save_total_limit": 0, "early_stopping_patience": 1,
        "max_bad_steps": 1, "logging_steps": 1, "preprocessing_num_workers": 1, "zero_hpz_partition_size": 1,
        "streaming": 1,
    }  # fmt: skip
    for name, least in at_least.items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            problems.append(f"--{name} must be at least {least}, not {getattr(args, name)}.")
    problems += _check_empty_names(args)
    if args.seed >= MAX_SEED:
        problems.append(f"--seed must be below 2**32, not {args.seed}.")
    for name in ("learning_rate", "lora_learning_rate", "weight_decay"):
        if not 0 <= getattr(args, name) < float("inf"):
            problems.append(f"--{name} must be a finite number of at least 0, not {getattr(args, name)}.")
    if args.neftune_noise_alpha is not None and not 0 <= args.neftune_noise_alpha < float("inf"):
        problems.append(f"--neftune_noise_alpha must be a finite number of at least 0, not {args.neftune_noise_alpha}.")
    if args.packing and args.padding != "free":
        problems.append(f"--packing puts samples end to end and needs --padding free, not {args.padding}.")
    if args.dropout is not None and not 0 <= args.dropout < 1:
        problems.append(f"--dropout must be at least 0 and below 1, not {args.dropout}.")
    if args.dropout and args.disable_dropout:
        problems.append("--disable_dropout and --dropout contradict each other: give one of them.")
    if not 0 < args.lora_alpha < float("inf"):
        problems.append(f"--lora_alpha must be a finite number above 0, not {args.lora_alpha}.")
    if not 0 < args.lora_plus_ratio < float("inf"):
        problems.append(f"--lora_plus_ratio must be a finite number above 0, not {args.lora_plus_ratio}.")
    if args.lora_dim == 0 and (args.lora_rslora or args.lora_plus_ratio != 1):
        problems.append("--lora_rslora and --lora_plus_ratio need --lora_dim above 0: without LoRA they do nothing.")
    if not 0 <= args.lora_dropout < 1:
        problems.append(f"--lora_dropout must be at least 0 and below 1, not {args.lora_dropout}.")
    if args.quantize_base and not (args.lora_dim > 0 and args.only_optimize_lora):
        problems.append(
            "--quantize_base needs --lora_dim above 0 and --only_optimize_lora: weights in 4 bits can't train, and the "
            "rest of the model stays as it is, for LoRA to train alone."
        )
    if args.save_lora_adapter:
        problems += _check_adapter_arguments(args)
    if args.only_optimize_lora and args.lora_dim == 0:
        problems.append("--only_optimize_lora needs --lora_dim above 0: without LoRA nothing would train.")
    if not args.data_path and not args.sft_only_data_path:
        problems.append("--data_path is empty: name at least one data set.")
    if args.add_eot_token and not args.eot_token:
        problems.append("--eot_token is empty: name the token, or leave --add_eot_token out.")
    checks = [(parse_data_split, args.data_split)] if args.data_split is not None else []
    checks += [(parse_columns, args.columns), (parse_gpus, args.dry_run), (parse_steps, args.profile_steps)]
    checks += [(parse_fit, args.fit)]
    checks += [(parse_source, name) for name in (*args.data_path, *args.sft_only_data_path)]
    checks += [(check_evaluation_source, name) for name in args.eval_data_path]
    for check, value in checks:
        try:
            check(value)
        except UserError as err:
            problems.append(str(err))
    if args.template_date is not None and not is_date(args.template_date):
        problems.append(f"--template_date {args.template_date}: write a date as YYYY-MM-DD.")
    if args.deepscale_config is not None:
        problems.append("--deepscale_config is an older name, which is not read: give --deepspeed_config.")
    if args.profile_steps is not None and args.output_dir is None:
        problems.append("--profile_steps needs --output_dir: trace and table are written to its folder profile.")
    if args.sample_prompts is not None and args.output_dir is None:
        problems.append("--sample_prompts needs --output_dir: the answers are written to its file samples.jsonl.")
    if args.train_turns != "all" and not args.completion_only_loss:
        problems.append("--train_turns says what --completion_only_loss labels: give that flag too.")
    problems += _check_streaming_values(args)
    return problems + _check_checkpoint_values(args) + _check_long_context_values(args) + check_scale_values(args)


def _check_empty_names(args: argparse.Namespace) -> list[str]:
    """List the files and folders whose name is empty, as a shell leaves them where a variable is not set."""
    names = (
        "model_name_or_path", "output_dir", "data_output_path", "tensorboard_path", "nvme_path", "deepspeed_config",
        "resume_from_checkpoint", "chat_template", "sample_prompts",
    )  # fmt: skip
    empty = [name for name in names if isinstance(value := getattr(args, name), str) and not value.strip()]
    lists = ("data_path", "sft_only_data_path", "eval_data_path")
    empty += [name for name in lists if any(not value.strip() for value in getattr(args, name))]
    return [f"--{name} is empty: give a name (is a script's variable not set?), or leave it out." for name in empty]


def can_split(seed: int, data_split: str | None) -> bool:
    """Whether rows can be drawn with this seed and these shares."""
    try:
        parse_data_split(data_split or KNOWN_SPLIT)
    except UserError:
        return False
    return 0 <= seed < MAX_SEED


def _check_streaming_values(args: argparse.Namespace) -> list[str]:
    """List what a stream can't do: it has no length, no parts, and is tokenized while it is read."""
    if args.streaming is None:
        return []
    problems = []
    if args.max_steps is None:
        problems.append("--streaming needs --max_steps N: how long a stream is, nobody knows before its end.")
    with suppress(UserError):  # a split that is none is refused by itself
        divided = [
            shares for name in args.data_path if any(parse_data_split(shares := shares_of(name, args.data_split))[1:])
        ]
        if divided:
            problems.append(
                f"--streaming gives all rows to this phase, since a stream can't be cut as --data_split {divided[0]} "
                f"{'says' if args.data_split else '(the default of known data sets) says'}: give --data_split 10,0,0."
            )
    if args.preprocessing_num_workers is not None:
        problems.append(
            "--preprocessing_num_workers is for data that is prepared before the run: with --streaming each rank "
            "tokenizes in one process. Leave it out."
        )
    if args.save_strategy == "epoch":
        problems.append("--save_strategy epoch: with --streaming there are no epochs; give --save_steps N.")
    return problems


def _check_checkpoint_values(args: argparse.Namespace) -> list[str]:
    problems = []
    if args.save_strategy == "steps" and args.save_steps is None:
        problems.append("--save_strategy steps needs --save_steps N.")
    if args.save_strategy != "steps" and args.save_steps is not None:
        problems.append(
            f"--save_steps {args.save_steps} and --save_strategy {args.save_strategy} contradict each other."
        )
    if args.save_in_background and (args.save_strategy == "no" or args.save_only_model):
        problems.append("--save_in_background is for checkpoints: give --save_steps N, and not --save_only_model.")
    if args.save_strategy == "no" and args.save_only_model:
        problems.append("--save_only_model needs --save_steps N or --save_strategy epoch.")
    wanting = {
        f"--save_strategy {args.save_strategy}": args.save_strategy != "no",
        "--resume_from_checkpoint": args.resume_from_checkpoint == "latest",
        "--load_best_model_at_end": args.load_best_model_at_end,
    }  # fmt: skip
    if args.output_dir is None:
        problems += [f"{flag} needs --output_dir." for flag, wants in wanting.items() if wants]
    return problems


def _check_long_context_values(args: argparse.Namespace) -> list[str]:
    problems = []
    if args.sequence_parallel_size < 1:
        problems.append(f"--sequence_parallel_size must be at least 1, not {args.sequence_parallel_size}.")
    if args.sequence_parallel_size > 1 and args.padding != "free":
        problems.append(
            f"--sequence_parallel_size cuts rows of samples that lie end to end and needs --padding free, not "
            f"{args.padding}."
        )
    if args.torch_compile and not args.packing and args.padding != "max_length":
        problems.append("--torch_compile needs training batches of one size: give --packing, or --padding max_length.")
    if args.torch_compile and (args.tiled_mlp or args.sequence_parallel_size > 1):
        problems.append(
            "--torch_compile compiles whole blocks of whole rows: leave out --tiled_mlp and --sequence_parallel_size."
        )
    if args.tiled_mlp and args.lora_dropout > 0:
        problems.append(
            "--tiled_mlp computes MLPs again in the backward, where --lora_dropout would draw anew: leave one of them "
            "out."
        )
    if args.activation_offloading and not args.gradient_checkpointing:
        problems.append(
            "--activation_offloading moves what --gradient_checkpointing keeps to CPU memory: give that flag too."
        )
    return problems


def _check_adapter_arguments(args: argparse.Namespace) -> list[str]:
    """List what keeps `--save_lora_adapter` from writing an adapter that gives the trained model."""
    problems = []
    if args.lora_dim == 0:
        problems.append("--save_lora_adapter needs --lora_dim above 0: without LoRA there is no adapter.")
    elif not args.only_optimize_lora:
        problems.append(
            "--save_lora_adapter needs --only_optimize_lora: without it embeddings, norms and biases train too, which "
            "an adapter does not hold. The merged model in --output_dir always holds everything."
        )
    if args.output_dir is None:
        problems.append("--save_lora_adapter needs --output_dir: the adapter is written to its folder adapter.")
    return problems


def check_scale_values(args: Namespace) -> list[str]:
    """List what is wrong with the arguments of big models."""
    problems = []
    try:
        parse_size(args.max_shard_size)
    except UserError as err:
        problems.append(str(err))
    if args.offload == "nvme" and args.nvme_path is None:
        problems.append("--offload nvme needs --nvme_path DIR, a folder on a local disk.")
    if args.offload == "nvme" and args.save_strategy != "no" and not args.save_only_model:
        problems.append(
            "--offload nvme writes no checkpoints a run could go on from: DeepSpeed reads back only a part of what "
            "is in its swap files. Give --save_only_model, which keeps models, or --offload cpu."
        )
    if args.offload == "nvme" and args.resume_from_checkpoint is not None:
        problems.append("--resume_from_checkpoint can't be used with --offload nvme: go on with --offload cpu.")
    if args.nvme_path is not None and args.offload != "nvme":
        problems.append("--nvme_path is for --offload nvme.")
    if args.enable_mixed_precision_lora and args.lora_dim == 0:
        problems.append("--enable_mixed_precision_lora needs --lora_dim above 0: without LoRA no weight is frozen.")
    # A file decides with the flags: `utils.arguments.preflight` asks again with what it says.
    return problems if args.deepspeed_config else problems + check_zero(args, merged_zero(args, {}))


def check_zero(args: Namespace, zero: Zero) -> list[str]:
    """List what the ZeRO stage and the places that were decided can't do; `zero` is of flags and file together."""
    problems = []
    found = f"{zero.stage}, as --deepspeed_config says" if zero.by_file else zero.stage
    if args.offload == "nvme" and zero.stage != 3:
        problems.append(
            f"--offload nvme needs --zero_stage 3, not {found}: below it DeepSpeed has no files and would "
            "keep optimizer states in CPU memory, which is --offload cpu."
        )
    if args.offload == "nvme" and zero.devices != {"nvme"}:
        problems.append("--offload nvme: the file of --deepspeed_config names another device: take it out there.")
    if zero.copies > 1 and args.offload == "nvme":
        problems.append(
            "--zero_hpz_partition_size keeps a second copy of the weights in memory, which DeepSpeed can't with "
            "--offload nvme: give one of them."
        )
    if zero.copies > 1 and zero.stage != 3:
        problems.append(f"--zero_hpz_partition_size needs --zero_stage 3, not {found}.")
    if zero.eight_bits and zero.stage != 3:
        problems.append(f"--enable_mixed_precision_lora needs --zero_stage 3, not {found}.")
    if args.torch_compile and zero.stage == 3:
        problems.append("--torch_compile needs --zero_stage 0 to 2: ZeRO 3 fetches weights within the blocks.")
    if args.sequence_parallel_size > 1 and zero.stage == 3 and not zero.reduce_scatter:
        problems.append(
            f"--deepspeed_config {args.deepspeed_config}: reduce_scatter false at ZeRO 3 scales some gradients of "
            "ranks that share rows and not others. Leave it true with --sequence_parallel_size."
        )
    return problems
