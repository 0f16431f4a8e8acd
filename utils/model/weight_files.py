"""The files of weights of a model: their paths, names, shapes and dtypes, and single values."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from utils.errors import UserError
from utils.model.other_formats import weights_of_another_kind

# In the order in which transformers looks for them: one file, or the index of several.
WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
# Names of dtypes in a safetensors file; others, such as 8-bit floats, can't be trained.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "BOOL": torch.bool,
}  # fmt: skip


def stored_weights(name: str) -> dict[str, torch.Tensor]:
    """Return the weights in the files of `name`: their names, shapes and dtypes, as tensors without memory.

    Raises:
        UserError: there are no such files, or one can't be read.
    """
    stored: dict[str, torch.Tensor] = {}
    for path in weight_paths(name):
        try:
            stored.update(_read_safetensors(path) if path.endswith(".safetensors") else load_bin(path, "meta"))
        except UnpicklingError as err:
            raise UserError(
                f"{path} is no file of weights, or holds more than weights (a whole pickled model, say), which can run "
                "any code and is not loaded: save the weights with model.save_pretrained(FOLDER) where it was made."
            ) from err
        except (OSError, ValueError, RuntimeError, SafetensorError, KeyError, EOFError) as err:
            reason = " ".join(str(err).split())[:200]
            raise UserError(f"the weights in {path} can't be loaded ({reason}): is the file complete?") from err
    return stored


def weight_paths(name: str) -> list[str]:
    """Return the paths of the files that transformers would load, of a folder or of a name on the hub.

    Raises:
        UserError: there are none, or some that the index names are missing.
    """
    for file in WEIGHT_FILES:
        path = path_of(name, file)
        if path is None:
            continue
        if not file.endswith(".index.json"):
            return [path]
        try:
            with open(path, encoding="utf-8") as opened:
                shards = sorted(set(json.load(opened)["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as err:
            raise UserError(f"{path} can't be read as an index of weights: {err}") from err
        paths = {shard: path_of(name, shard) for shard in shards}
        missing = [shard for shard, found in paths.items() if found is None]
        if missing:
            raise UserError(f"{name} lacks {len(missing)} of the {len(shards)} files of weights that {file} names: "
                            f"{', '.join(missing[:3])}.")  # fmt: skip
        return [path for path in paths.values() if path is not None]
    found = weights_of_another_kind(name) if os.path.isdir(name) else ""
    raise UserError(f"no weights in {name}: none of {', '.join(WEIGHT_FILES)} is there{found.replace(':', ';', 1)}.")


def path_of(name: str, file: str) -> str | None:
    """Return the path of a file of a model, fetched from the hub if need be; None where it has no such file."""
    if os.path.isdir(name):
        path = os.path.join(name, file)
        return path if os.path.isfile(path) else None
    try:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as err:
        raise UserError(f"{file} of {name} can't be fetched from the hub: {' '.join(str(err).split())[:200]}") from err


def _read_safetensors(path: str) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
        return {
            key: torch.empty(part.get_shape(), dtype=DTYPES.get(part.get_dtype(), torch.uint8), device="meta")
            for key, part in slices.items()
        }


def load_bin(path: str, place: str) -> dict[str, torch.Tensor]:
    """Return the weights of a .bin file on the device `place`, mapped from the file where its format allows it.

    Raises:
        ValueError: it holds no dictionary, or the weights in one of its entries.
    """
    try:
        content: Any = torch.load(path, map_location=place, weights_only=True, mmap=True)
    except RuntimeError:  # an older format that can't be mapped
        content = torch.load(path, map_location=place, weights_only=True)
    if not isinstance(content, dict):
        raise ValueError("it holds no dictionary of weights")
    inner = [
        key for key, value in content.items() if isinstance(value, dict) and any(map(torch.is_tensor, value.values()))
    ]
    if inner and not any(map(torch.is_tensor, content.values())):
        raise ValueError(
            f"its weights lie in its entry {inner[0]!r}, as in a trainer's checkpoint: save that entry alone, with "
            f"torch.save(torch.load(FILE)[{inner[0]!r}], FILE)"
        )
    return {key: value for key, value in content.items() if torch.is_tensor(value)}


@contextmanager
def open_values(name: str) -> Iterator[Callable[[str], torch.Tensor]]:
    """Open the files of `name`; yields a function that reads one weight, without loading the others."""
    readers: dict[str, Callable[[str], torch.Tensor]] = {}
    for path in weight_paths(name):
        if path.endswith(".safetensors"):
            file = safe_open(path, framework="pt")
            readers |= dict.fromkeys(file.keys(), file.get_tensor)
        else:
            content = load_bin(path, "cpu")
            readers |= dict.fromkeys(content, content.__getitem__)
    yield lambda key: readers[key](key)


def places_in_files(names: Iterable[str], stored: Container[str], prefix: str) -> dict[str, str]:
    """Return the name in the files of each weight that has one there: with or without the name of the model's body."""
    places = {}
    for key in names:
        for place in (key, key.removeprefix(f"{prefix}."), f"{prefix}.{key}"):
            if place in stored:
                places[key] = place
                break
    return places
