"""Fingerprints of files too large to be read whole: sizes, and samples of their bytes.

A checkpoint holds what trains. What it leaves out, the frozen weights of the base model, is read again where the run
goes on, and must still be the same.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any

from transformers.utils import cached_file

BLOCK = 4096  # bytes of a sample
SAMPLES = 64  # of a file whose inner order is not known
MAKES_TENSORS = (".safetensors", ".bin")


def base_fingerprint(name: str) -> str | None:
    """Return a hash of the weights of a model folder, or of a hub model in the cache; None where there are none.

    Of each tensor it has name, type, shape, and the bytes at the beginning, in the middle and at the end: it is the
    same however the tensors are distributed over files.
    """
    folder = name if os.path.isdir(name) else _cached_folder(name)
    if folder is None:
        return None
    files = sorted(file.path for file in os.scandir(folder) if file.name.endswith(MAKES_TENSORS))
    safe = [file for file in files if file.endswith(".safetensors")]
    if safe:
        tensors = dict(entry for file in safe for entry in _tensor_samples(file))
        return _hash([name, *tensors[name]] for name in sorted(tensors)) if tensors else None
    return files_fingerprint(files) if files else None


def files_fingerprint(paths: Iterable[str]) -> str:
    """Return a hash of the names, sizes and sampled bytes of files, and of the files below folders."""
    files = []
    for path in paths:
        below = [os.path.join(parent, name) for parent, _, names in os.walk(path) for name in names]
        files += [path] if os.path.isfile(path) else sorted(below)
    return _hash([os.path.basename(file), os.path.getsize(file), _samples(file)] for file in files)


def _cached_folder(name: str) -> str | None:
    """Return the folder of a hub model in the local cache."""
    try:
        file = cached_file(name, "config.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return os.path.dirname(file) if file else None


def _tensor_samples(path: str) -> list[tuple[str, list[Any]]]:
    """Return (name, [type, shape, hash of sampled bytes]) of every tensor in a safetensors file."""
    found = []
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            begin, end = (8 + length + offset for offset in tensor["data_offsets"])
            places = (begin, max(begin, (begin + end) // 2), max(begin, end - BLOCK))
            sample = _read(file, places, end)
            found.append((name, [tensor["dtype"], tensor["shape"], sample]))
    return found


def _samples(path: str) -> str:
    """Return a hash of blocks at equal distances in a file, its last bytes among them."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        return _read(file, [number * max(0, size - BLOCK) // (SAMPLES - 1) for number in range(SAMPLES)], size)


def _read(file: Any, places: Iterable[int], end: int) -> str:
    digest = hashlib.sha256()
    for place in places:
        file.seek(place)
        digest.update(file.read(min(BLOCK, end - place)))
    return digest.hexdigest()


def _hash(parts: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:16]
