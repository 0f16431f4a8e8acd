"""What a model's files hold, found before a weight is loaded or data are prepared.

A checkpoint that is not what it seems must not train: transformers gives every weight it does not find random values
and leaves out what it has no place for, both with a warning alone. Here the names, shapes and dtypes in the files go
through transformers' own loading as tensors without memory, conversions of names included, and what does not fit
is an error: the same on every rank and under every ZeRO stage.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import transformers
from transformers import PretrainedConfig
from transformers.utils import logging

from utils.distributed.ranks import print_rank_0
from utils.errors import UserError
from utils.logging.console import say
from utils.model.loading_report import Report, check_report
from utils.model.tied_head import has_own_head, untie
from utils.model.weight_files import DTYPES, path_of, places_in_files, stored_weights, weight_paths
from utils.module.empty_model import empty_model
from utils.module.remote_code import is_trusted


def check_is_causal(name: str, config: PretrainedConfig) -> None:
    """Check by the configuration that this is a plain causal language model.

    Raises:
        UserError: it is quantized, an encoder and decoder, or no causal language model at all.
    """
    found = (getattr(config, key, None) for key in ("quantization_config", "compression_config"))
    quantization = next((value for value in found if value is not None), None)
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
    found right are not compared again. `tell`: print what is left out. A head of its own that `config` ties to the
    embedding is untied in it.

    Raises:
        UserError: weights are missing, have no place in the model or other shapes, or a file can't be read.
    """
    stamps = _stamps(name, config)
    found = _found_right.get(name)
    if found is None or found.stamps != stamps:
        found = _found_right[name] = _compare(name, config, stamps)
    if found.has_own_head:
        untie(config)
    if tell:
        for line in found.lines:
            print_rank_0(line)
    return found.stored


class FoundRight(NamedTuple):
    """A checkpoint whose weights fit its model."""

    stamps: tuple
    stored: dict[str, torch.Tensor]
    lines: list[str]  # on what is left out, and what the configuration says otherwise
    has_own_head: bool  # which the configuration ties to the embedding


_found_right: dict[str, FoundRight] = {}  # by name: a run checks before the data are prepared, and when it loads


def _stamps(name: str, config: PretrainedConfig) -> tuple:
    """Return what changes when the files or the kind of model do."""
    states = [(path, os.stat(path)) for path in (*weight_paths(name), path_of(name, "config.json")) if path]
    return (type(config), *((path, state.st_size, state.st_mtime_ns) for path, state in states))


def _compare(name: str, config: PretrainedConfig, stamps: tuple) -> FoundRight:
    """Compare names, shapes and dtypes in the files with the model's; UserError where they do not fit."""
    stored = stored_weights(name)
    model = empty_model(config)
    report = _loading_report(model, stored)
    lines = [] if report is None else check_report(name, model, report, stored)
    _check_dtypes(name, model, stored, [] if report is None else report.unexpected)
    named, kind = config.architectures or [], type(model).__name__
    if named and kind not in named:
        lines.append(f"Checkpoint: config.json names {', '.join(map(str, named))}; it is loaded as {kind}")
    own_head = has_own_head(name, model, stored)
    if own_head:
        lines.append(
            "Checkpoint: config.json ties the head to the input embedding (tie_word_embeddings), and the files hold "
            "two weights that differ: they stay two, and the saved configuration says so"
        )
    return FoundRight(stamps, stored, lines, own_head)


def _check_dtypes(
    name: str, model: transformers.PreTrainedModel, stored: dict[str, torch.Tensor], left_out: list[str]
) -> None:
    """Refuse weights in 8 bits or in whole numbers, whose scales nobody knows: they would be read as plain numbers.

    Args:
        left_out: weights in the files that are not read, such as old masks.
    """
    places = set(places_in_files(dict(model.named_parameters()), stored, model.base_model_prefix).values())
    small = [key for key, weight in stored.items() if weight.dtype not in DTYPES.values() and key not in left_out]
    whole = [key for key in places if not stored[key].is_floating_point() and key not in small]
    for keys, kind in ((small, "in 8 bits"), (sorted(whole), "as whole numbers")):
        if keys:
            raise UserError(
                f"{len(keys)} weights of {name} are stored {kind} ({_first(keys)}), without a quantization_config "
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


def _first(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
