"""Write a trained model as a plain Hugging Face folder, under any ZeRO stage, with or without LoRA.

Weights are gathered (ZeRO 3), merged (LoRA, in float32) and written one safetensors shard at a time, so rank 0 never
holds more than one shard beside its own part. A folder is complete or absent: everything is written into a sub-folder
first, then moved, `config.json` last, and no loader accepts a folder without it.
"""

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from utils.distributed.meeting import meet
from utils.distributed.ranks import is_rank_0
from utils.distributed.zero3 import gather, has_partitioned, whole_numel
from utils.errors import UserError
from utils.files import INCOMPLETE, move_files
from utils.module.lora import LinearLayer_LoRA
from utils.notation import parse_size

WORK_FOLDER = INCOMPLETE + "model"
DEFAULT_SHARD_SIZE = "5GB"


class SavedTensor(NamedTuple):
    """One tensor of the saved model and the live parameters it is computed from."""

    name: str
    source: torch.Tensor
    lora: LinearLayer_LoRA | None
    size: int  # bytes


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


def saved_tensors(model: torch.nn.Module) -> list[SavedTensor]:
    """List the tensors a plain copy of `model` has, in order; tied ones once, under their first name."""
    lora_modules = {name: module for name, module in model.named_modules() if isinstance(module, LinearLayer_LoRA)}
    tensors, seen = [], set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner, _, leaf = name.rpartition(".")
        if id(tensor) in seen or (owner in lora_modules and leaf.startswith("lora_")):
            continue
        seen.add(id(tensor))
        lora = lora_modules.get(owner) if leaf == "weight" else None
        tensors.append(SavedTensor(name, tensor, lora, whole_numel(tensor) * tensor.element_size()))
    return tensors


def plan_shards(tensors: list[SavedTensor], max_bytes: int) -> list[list[SavedTensor]]:
    """Cut the tensors, in order, into shards of at most `max_bytes` (a larger tensor stands alone)."""
    shards: list[list[SavedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size
    return shards


def _gathered(entry: SavedTensor) -> torch.Tensor | None:
    """Return the whole tensor on the CPU, merged where LoRA wraps it; None but on rank 0. A collective in ZeRO 3."""
    sources = [entry.source]
    if entry.lora is not None:
        sources += [entry.lora.lora_right_weight, entry.lora.lora_left_weight]
    with gather(sources):
        if not is_rank_0():
            return None
        if entry.lora is None:
            return entry.source.detach().to("cpu", copy=True).contiguous()
        merged = entry.source.detach().float() + entry.lora.delta_weight()
        return merged.to(entry.source.dtype).cpu().contiguous()


def write_tensors(content: dict[str, torch.Tensor], path: str) -> None:
    """Write one safetensors file, readable as the umask allows: the library alone would make it for its owner only."""
    save_file(content, path, metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def write_weights(
    model: torch.nn.Module, folder: str, is_writer: bool, max_shard_size: str = DEFAULT_SHARD_SIZE
) -> None:
    """Write `model.safetensors`, or numbered shards with an index, into `folder`. Every rank must call it.

    Rank 0 holds one shard and the tensor it gathers; the others, under ZeRO 3, that tensor alone.
    """
    shards = plan_shards(saved_tensors(model), parse_size(max_shard_size))
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        content = {entry.name: _gathered(entry) for entry in shard}
        index.update(dict.fromkeys(content, name))
        if is_writer:
            write_tensors(content, os.path.join(folder, name))
        del content  # or it would be there until the next shard is gathered
    if is_writer and len(shards) > 1:
        total = sum(entry.size for shard in shards for entry in shard)
        with open(os.path.join(folder, "model.safetensors.index.json"), "w", encoding="utf-8") as file:
            json.dump({"metadata": {"total_size": total}, "weight_map": index}, file, indent=2)


def save_model_folder(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str,
    describe: Callable[[str], None] | None = None,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    with_weights: bool = True,
) -> None:
    """Save everything `from_pretrained(folder)` needs; complete or absent. Every rank must call it.

    `describe` adds what else is to be in the folder it is given (`utils.export.model_card`), on the rank that writes.
    """

    def write(work: str, is_writer: bool) -> None:
        if is_writer:
            tokenizer.save_pretrained(work)
            _save_configs(model, work)
            if describe is not None:
                describe(work)
        if with_weights:
            write_weights(model, work, is_writer, max_shard_size)

    write_folder(folder, "the model", "config.json", write)


def write_folder(folder: str, what: str, config: str, write: Callable[[str, bool], None]) -> None:
    """Write `folder` aside, then move its files into place: complete or absent. Every rank must call it.

    Args:
        what: what is written, for messages.
        config: the file without which no loader takes the folder; it is moved last.
        write: fills the folder it is given; its second argument is True on the rank that writes files.

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
            move_files(work, folder, config, _is_weights)
    except BaseException as err:
        if is_rank_0():
            shutil.rmtree(work, ignore_errors=True)
            with suppress(OSError):
                os.rmdir(folder)  # only if it is empty
        if not _is_writing_failure(err):
            raise
        raise UserError(f"{what} can't be saved to {folder}: {err}. Nothing half-written was left there.") from err


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))


def _is_writing_failure(err: BaseException) -> bool:
    """Whether writing failed: OSError, safetensors' own error, or the bare Exception that tokenizers raises."""
    return isinstance(err, (OSError, SafetensorError)) or type(err) is Exception


def _save_configs(model: torch.nn.Module, folder: str) -> None:
    """Write config.json and generation_config.json, with the dtype of the saved weights."""
    config = model.config
    config.dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def publish_model(source: str, folder: str, leave_out: tuple[str, ...] = ()) -> None:
    """Put the complete model folder `source` into `folder`; linked where the file system can, else copied."""
    work = os.path.join(folder, WORK_FOLDER)
    shutil.rmtree(work, ignore_errors=True)
    try:
        shutil.copytree(source, work, ignore=shutil.ignore_patterns(*leave_out), copy_function=_link_or_copy)
        move_files(work, folder, "config.json", _is_weights)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


# ----------------------------------------------------------------------------------------- verification


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
        save_model_folder(unwrap(model), tokenizer, folder, describe, with_weights=False)
    return folder


def save_zero_three_model(model_ema: torch.nn.Module, global_rank: int, save_dir: str, zero_stage: int = 0) -> None:
    """Write the weights alone, as safetensors, into `save_dir`; under ZeRO 3 every rank must call it.

    `zero_stage` is kept for callers of the original; how a parameter is partitioned is read off itself.
    """
    if has_partitioned(model_ema):
        meet("save_zero_three_model")
    if global_rank == 0:
        os.makedirs(save_dir, exist_ok=True)
    write_weights(settled(model_ema), save_dir, is_writer=global_rank == 0)
