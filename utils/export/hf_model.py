"""Write a trained model as a plain Hugging Face folder, under any ZeRO stage, with or without LoRA.

A folder is complete or absent: everything is written into a sub-folder first, then moved, `config.json` last, and no
loader accepts a folder without it. Only files that a run wrote make way (`utils.export.owned_files`).
"""

import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from utils.distributed.meeting import meet
from utils.distributed.ranks import is_rank_0
from utils.distributed.zero3 import has_partitioned
from utils.errors import UserError
from utils.export.owned_files import LIST, place_files, place_over
from utils.export.weights import DEFAULT_SHARD_SIZE, INDEX, WrittenTensor, write_weights
from utils.files import INCOMPLETE

WORK_FOLDER = INCOMPLETE + "model"


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """Return the bare model inside a DeepSpeed engine (or anything with `.module`)."""
    return getattr(model, "module", model)


def settled(engine: torch.nn.Module) -> torch.nn.Module:
    """Return the bare model with no gathering under way. Every rank must call it before tensors are gathered.

    After a forward without a backward, as in an evaluation, ZeRO 3 is still fetching what the backward would need, and
    DeepSpeed refuses to gather a weight it is fetching. Small models never show it: ZeRO keeps them whole.
    """
    if hasattr(engine, "empty_partition_cache"):
        engine.empty_partition_cache()
    return unwrap(engine)


def save_model_folder(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str,
    describe: Callable[[str], None] | None = None,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    add: Callable[[str, bool], None] | None = None,
) -> dict[str, WrittenTensor]:
    """Save everything `from_pretrained(folder)` needs; complete or absent. Every rank must call it.

    Args:
        describe: adds what else is to be in the folder (`utils.export.model_card`), on the rank that writes.
        add: fills sub-folders; every rank calls it, and its second argument is True on the rank that writes.

    Returns:
        the written weights by name; empty on ranks that write nothing.
    """
    written: dict[str, WrittenTensor] = {}

    def write(work: str, is_writer: bool) -> None:
        if is_writer:
            write_all_but_weights(model, tokenizer, work, describe)
        written.update(write_weights(model, work, is_writer, max_shard_size))
        if add is not None:
            add(work, is_writer)

    write_folder(folder, "the model", "config.json", write)
    return written


def write_all_but_weights(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str,
    describe: Callable[[str], None] | None = None,
) -> None:
    """Write tokenizer, configurations, the model's own code if it has some, and what `describe` adds."""
    tokenizer.save_pretrained(folder)
    config = model.config
    config.dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    config.architectures = [type(model).__name__]
    if getattr(model, "is_remote_code", lambda: False)():
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if describe is not None:
        describe(folder)


def write_folder(
    folder: str,
    what: str,
    config: str,
    write: Callable[[str, bool], None],
    place: Callable[[str, str, str], None] = place_files,
) -> None:
    """Write `folder` aside, then move its files into place: complete or absent. Every rank must call it.

    Args:
        what: what is written, for messages.
        config: the file without which no loader takes the folder; it is moved last.
        write: fills the folder it is given; its second argument is True on the rank that writes files.
        place: moves the files (`utils.export.owned_files`).

    Raises:
        UserError: the files can't be written; what was there before still is.
    """
    work = os.path.join(folder, WORK_FOLDER)
    try:
        if is_rank_0():
            shutil.rmtree(work, ignore_errors=True)
            os.makedirs(work)
        write(work, is_rank_0())
        if is_rank_0():
            place(work, folder, config)
    except BaseException as err:
        if is_rank_0():
            shutil.rmtree(work, ignore_errors=True)
            with suppress(OSError):
                os.rmdir(folder)  # only if it is empty
        if not _is_writing_failure(err):
            raise
        raise UserError(f"{what} can't be saved to {folder}: {err}. Nothing half-written was left there.") from err


def _is_writing_failure(err: BaseException) -> bool:
    """Whether writing failed: OSError, safetensors' own error, or the bare Exception that tokenizers raises."""
    return isinstance(err, (OSError, SafetensorError)) or type(err) is Exception


def publish_model(source: str, folder: str, leave_out: tuple[str, ...] = ()) -> None:
    """Put the complete model folder `source` into `folder`; linked where the file system can, else copied."""
    work = os.path.join(folder, WORK_FOLDER)
    shutil.rmtree(work, ignore_errors=True)
    try:
        ignored = shutil.ignore_patterns(LIST, *leave_out)
        shutil.copytree(source, work, ignore=ignored, copy_function=_link_or_copy)
        place_files(work, folder, "config.json")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def save_hf_format(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    args: Namespace,
    sub_folder: str = "",
    describe: Callable[[str], None] | None = None,
) -> str:
    """Save model, configuration, generation configuration and tokenizer so that plain transformers loads them.

    LoRA is merged on the way out; live weights stay untouched. `describe` adds what else is to be there. Returns the
    folder, `args.output_dir` / `sub_folder`.

    Up to ZeRO 2 rank 0 may call it alone. Under ZeRO 3 every rank must, or every rank must call
    `save_zero_three_model` after it, as DeepSpeed-Chat does: then it saves all but the weights.

    Raises:
        UserError: under ZeRO 3, the other ranks do neither; or the files can't be written.
    """
    folder = os.path.join(args.output_dir, sub_folder) if sub_folder else args.output_dir
    shard_size = getattr(args, "max_shard_size", DEFAULT_SHARD_SIZE)  # callers of the original have no such argument
    if not has_partitioned(model) or meet("save_hf_format", elsewhere="save_zero_three_model"):
        save_model_folder(settled(model), tokenizer, folder, describe, shard_size)
    else:
        bare = unwrap(model)

        def write(work: str, is_writer: bool) -> None:
            if is_writer:
                write_all_but_weights(bare, tokenizer, work, describe)

        write_folder(folder, "the model", "config.json", write)
    return folder


def save_zero_three_model(model_ema: torch.nn.Module, global_rank: int, save_dir: str, zero_stage: int = 0) -> None:
    """Write the weights alone, as safetensors, into `save_dir`; under ZeRO 3 every rank must call it.

    `zero_stage` is kept for callers of the original; how a parameter is partitioned is read off itself. What else is
    in the folder stays.
    """
    if has_partitioned(model_ema):
        meet("save_zero_three_model")
    bare = settled(model_ema)
    write_folder(
        save_dir, "the weights", INDEX, lambda work, is_writer: write_weights(bare, work, is_writer), place_over
    )
