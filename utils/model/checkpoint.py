"""What a model's files hold, found before a weight is loaded or data are prepared.

A checkpoint that is not what it seems must not train: transformers gives every weight it does not find random values
and leaves out what it has no place for, both with a warning alone. Here the names, shapes and dtypes in the files go
through transformers' own loading as tensors without memory, conversions of names included, and what does not fit
is an error: the same on every rank and under every ZeRO stage.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig
from transformers.utils import cached_file, logging

from utils.distributed.ranks import print_rank_0
from utils.errors import UserError
from utils.logging.console import say
from utils.model.loading_report import Report, check_report
from utils.module.empty_model import empty_model
from utils.module.remote_code import is_trusted

# In the order in which transformers looks for them: one file, or the index of several.
WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
# Names of dtypes in a safetensors file; others, such as 8-bit floats, can't be trained.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "BOOL": torch.bool,
}  # fmt: skip


def check_is_causal(name: str, config: PretrainedConfig) -> None:
    """Check by the configuration that this is a plain causal language model.

    Raises:
        UserError: it is quantized, an encoder and decoder, or no causal language model at all.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        kind = quantization if isinstance(quantization, dict) else vars(quantization)
        method = getattr(kind.get("quant_method"), "value", kind.get("quant_method")) or "an unnamed method"
        raise UserError(
            f"the weights of {name} are quantized ({method}; quantization_config in config.json), and only whole "
            "weights can be trained: give the model they were made from, or a copy saved in bf16 or fp32."
        )
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{name} (model type {config.model_type!r}) is an encoder with a decoder, and this program trains "
            "decoders alone: its encoder would be left out. Give a causal language model."
        )
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        if own_code and not is_trusted():
            say(f"{name} brings code of its own, which is not run: transformers has model type {config.model_type!r}")
        return
    if not own_code:
        raise UserError(
            f"{name} (model type {config.model_type!r}) is not a causal language model that transformers knows: "
            "give a model that continues texts, such as OPT, Llama or Qwen."
        )
    if not is_trusted():
        raise remote_code_error(name)


def remote_code_error(name: str) -> UserError:
    """Return the error for a model that comes with code while code is not trusted."""
    return UserError(
        f"{name} brings Python code of its own (auto_map in config.json), which is not run unless you say so: read "
        "it, and give --trust_remote_code if you trust it."
    )


def check_weights(name: str, config: PretrainedConfig, tell: bool = True) -> dict[str, torch.Tensor]:
    """Check that the files of `name` hold every weight of the model and no other; return these, without memory.

    Files of a name on the hub that are not on this disk yet are fetched. Files that have not changed since they were
    found right are not compared again. `tell`: print what is left out.

    Raises:
        UserError: weights are missing, have no place in the model or other shapes, or a file can't be read.
    """
    stamps = _stamps(name, config)
    found = _found_right.get(name)
    if found is None or found.stamps != stamps:
        found = _found_right[name] = _compare(name, config, stamps)
    if tell:
        for line in found.lines:
            print_rank_0(line)
    return found.stored


class FoundRight(NamedTuple):
    """A checkpoint whose weights fit its model."""

    stamps: tuple
    stored: dict[str, torch.Tensor]
    lines: list[str]  # on what is left out


_found_right: dict[str, FoundRight] = {}  # by name: a run checks before the data are prepared, and when it loads


def _stamps(name: str, config: PretrainedConfig) -> tuple:
    """Return what changes when the files or the kind of model do."""
    states = [(path, os.stat(path)) for path in (*weight_paths(name), _path_of(name, "config.json")) if path]
    return (type(config), *((path, state.st_size, state.st_mtime_ns) for path, state in states))


def _compare(name: str, config: PretrainedConfig, stamps: tuple) -> FoundRight:
    """Compare names, shapes and dtypes in the files with the model's; UserError where they do not fit."""
    stored = stored_weights(name)
    model = empty_model(config)
    report = _loading_report(model, stored)
    lines = [] if report is None else check_report(name, model, report, stored)
    _check_dtypes(name, stored, [] if report is None else report.unexpected)
    return FoundRight(stamps, stored, lines)


def _check_dtypes(name: str, stored: dict[str, torch.Tensor], left_out: list[str]) -> None:
    """Refuse weights in 8 bits, whose scales nobody knows: they would be read as if they were plain numbers.

    Args:
        left_out: weights in the files that are not read, such as old masks.
    """
    small = [key for key, weight in stored.items() if weight.dtype not in DTYPES.values() and key not in left_out]
    if small:
        raise UserError(
            f"{len(small)} weights of {name} are stored in 8 bits ({_first(small)}), without a quantization_config "
            "that says how: only whole weights can be trained. Give the model they were made from."
        )


def _loading_report(model: transformers.PreTrainedModel, stored: dict[str, torch.Tensor]) -> Report | None:
    """Return what transformers' loading would find; None where it can't be tried without memory.

    The weights' own loading is then the only check.
    """
    from transformers.initialization import no_init_weights  # imports what reading a configuration does without

    try:
        with no_init_weights(), _quiet():
            _, info = type(model).from_pretrained(
                None, config=model.config, state_dict=dict(stored), dtype=torch.float32, device_map={"": "meta"},
                output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError):
        return None
    return Report.of(info)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing its own report and progress."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


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
        path = _path_of(name, file)
        if path is None:
            continue
        if not file.endswith(".index.json"):
            return [path]
        try:
            with open(path, encoding="utf-8") as opened:
                shards = sorted(set(json.load(opened)["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as err:
            raise UserError(f"{path} can't be read as an index of weights: {err}") from err
        paths = {shard: _path_of(name, shard) for shard in shards}
        missing = [shard for shard, found in paths.items() if found is None]
        if missing:
            raise UserError(f"{name} lacks {len(missing)} of the {len(shards)} files of weights that {file} names: "
                            f"{_first(missing)}.")  # fmt: skip
        return [path for path in paths.values() if path is not None]
    raise UserError(f"no weights in {name}: none of {', '.join(WEIGHT_FILES)} is there.")


def _path_of(name: str, file: str) -> str | None:
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
        ValueError: it holds no dictionary.
    """
    try:
        content: Any = torch.load(path, map_location=place, weights_only=True, mmap=True)
    except RuntimeError:  # an older format that can't be mapped
        content = torch.load(path, map_location=place, weights_only=True)
    if not isinstance(content, dict):
        raise ValueError("it holds no dictionary of weights")
    return {key: value for key, value in content.items() if torch.is_tensor(value)}


def _first(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
