"""Write the weights of a saved model: gathered (ZeRO 3), merged (LoRA, in float32), renamed, one shard at a time.

Rank 0 never holds more than one shard, and what is converted together, beside its own part. The checksum of every
written tensor is kept, so that the files can be read back and compared.
"""

import json
import os
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from utils.distributed.ranks import is_rank_0
from utils.distributed.zero3 import gather
from utils.export.published import Group, PublishedTensor, SavedTensor, convert, published_groups
from utils.module.quantized import plain_dtype, plain_weight
from utils.notation import parse_size

DEFAULT_SHARD_SIZE = "5GB"
INDEX = "model.safetensors.index.json"
PIECE = 1 << 26  # bytes of a tensor whose checksum is taken at once


class WrittenTensor(NamedTuple):
    """What was gathered for one tensor of the saved model."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    checksum: int


def tensor_checksum(tensor: torch.Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes, on the CPU; about a second a gigabyte."""
    value = 0
    for piece in tensor.contiguous().view(-1).view(torch.uint8).split(PIECE):
        value = zlib.crc32(piece.numpy(), value)
    return value


def saved_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of the saved weights."""
    return sum(tensor.size for group in published_groups(model) for tensor in group.published)


def plan_shards(tensors: list[PublishedTensor], max_bytes: int) -> list[list[PublishedTensor]]:
    """Cut the tensors, in order, into shards of at most `max_bytes` (a larger tensor stands alone)."""
    shards: list[list[PublishedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size
    return shards


def write_tensors(content: dict[str, torch.Tensor], path: str) -> None:
    """Write one safetensors file, readable as the umask allows: the library alone would make it for its owner only."""
    save_file(content, path, metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def write_weights(
    model: torch.nn.Module, folder: str, is_writer: bool, max_shard_size: str = DEFAULT_SHARD_SIZE
) -> dict[str, WrittenTensor]:
    """Write `model.safetensors`, or numbered shards with an index, into `folder`. Every rank must call it.

    Rank 0 holds one shard and the group it gathers; the others, under ZeRO 3, one tensor.

    Returns:
        what was written, by name; empty on ranks that write nothing.
    """
    groups = published_groups(model)
    tensors = [tensor for group in groups for tensor in group.published]
    shards = plan_shards(tensors, parse_size(max_shard_size))
    stream = _published(model, groups, is_writer)
    if not is_writer:
        for _ in stream:  # takes part in gathering
            pass
        return {}
    written: dict[str, WrittenTensor] = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        content = dict(next(stream) for _ in shard)
        for name, tensor in content.items():
            written[name] = WrittenTensor(file, tensor.dtype, tuple(tensor.shape), tensor_checksum(tensor))
        write_tensors(content, os.path.join(folder, file))
        del content  # or it would be there until the next shard is gathered
    if len(shards) > 1:
        index = {"total_size": sum(tensor.size for tensor in tensors)}
        weight_map = {name: entry.file for name, entry in written.items()}
        with open(os.path.join(folder, INDEX), "w", encoding="utf-8") as file:
            json.dump({"metadata": index, "weight_map": weight_map}, file, indent=2)
    return written


def _published(model: torch.nn.Module, groups: list[Group], is_writer: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the published tensors in the order of the plan; on ranks that write nothing, none."""
    for group in groups:
        live = [_gathered(entry) for entry in group.sources]
        if is_writer:
            tensors = convert(model, group, live)
            for planned in group.published:
                yield planned.name, tensors.pop(planned.name)


def _gathered(entry: SavedTensor) -> torch.Tensor | None:
    """Return the whole plain tensor on the CPU, merged where LoRA wraps it; None but on rank 0.

    A collective under ZeRO 3.
    """
    sources = [entry.source]
    if entry.lora is not None:
        sources += [entry.lora.lora_right_weight, entry.lora.lora_left_weight]
    with gather(sources):
        if not is_rank_0():
            return None
        if entry.lora is None:
            return plain_weight(entry.source).to("cpu", copy=True).contiguous()
        merged = plain_weight(entry.source).float() + entry.lora.delta_weight()
        return merged.to(plain_dtype(entry.source)).cpu().contiguous()
