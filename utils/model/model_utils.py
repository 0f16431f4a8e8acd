"""Load a causal language model for training: dtype, dropout, vocabulary, special ids."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import transformers
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from utils.distributed.ranks import print_rank_0, world_size
from utils.distributed.zero3 import whole_numel, whole_shape
from utils.errors import UserError
from utils.machine.precision import DTYPES
from utils.model.checkpoint import (
    check_is_causal,
    check_weights,
    remote_code_error,
)
from utils.model.config_values import DROPOUT, OTHER_RANDOMNESS, is_probability, set_dropouts
from utils.model.loading_report import Report, check_report
from utils.model.model_folder import adapter_error, adapter_on_hub, check_files
from utils.model.special_tokens import end_ids, stop_at, token_rows
from utils.module.empty_model import empty_model
from utils.module.quantized import quantized_loading, settle_quantized
from utils.module.remote_code import is_trusted

EMBEDDING_MULTIPLE = 8


def load_model_config(model_name_or_path: str) -> PretrainedConfig:
    """Load the configuration of a causal language model.

    Raises:
        UserError: there is none, its family is unknown, or it is not a model that can be trained here: an adapter,
            quantized weights, an encoder and decoder, code of its own without `--trust_remote_code`.
    """
    check_files(model_name_or_path)
    try:
        config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=is_trusted())
    except Exception as err:  # transformers raises many kinds, on values and on content
        if "trust_remote_code" in str(err):
            raise remote_code_error(model_name_or_path) from err
        adapter = None if os.path.isdir(model_name_or_path) else adapter_on_hub(model_name_or_path)
        if adapter is not None:
            raise adapter_error(model_name_or_path, adapter) from err
        kind = "" if isinstance(err, (OSError, ValueError)) else f"{type(err).__name__}: "
        reason = kind + " ".join(str(err).split())[:300]
        raise UserError(
            f"no usable model configuration at {model_name_or_path} ({reason}). "
            "Give a folder with config.json, or a hub name while the hub can be reached."
        ) from err
    check_is_causal(model_name_or_path, config)
    return config


def configure_dropout(config: PretrainedConfig, dropout: float | None) -> None:
    """Set every dropout the configuration has; None leaves them. 0 also turns whole-layer dropping and noise off."""
    if dropout is not None:
        set_dropouts(config, dropout)


def set_module_dropouts(model: nn.Module, dropout: float | None) -> None:
    """Set every dropout of a model's modules, also those no configuration names; None leaves them."""
    if dropout is None:
        return
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = dropout
        for name, value in list(vars(module).items()):
            if is_probability(value) and OTHER_RANDOMNESS.search(name):
                setattr(module, name, 0.0 if dropout == 0 else value)
            elif is_probability(value) and DROPOUT.search(name):
                setattr(module, name, dropout)


def training_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """Return the dtype that a DeepSpeed configuration turns on."""
    return DTYPES[next((name for name in ("bf16", "fp16") if ds_config.get(name, {}).get("enabled")), "fp32")]


def _loading_dtype(ds_config: dict[str, Any] | None, stored: dict[str, torch.Tensor]) -> torch.dtype:
    """Return the dtype to load in: float32, unless all weights are stored in the training dtype already.

    DeepSpeed's master weights then begin as what is stored (`utils.engine.master_weights`), and a checkpoint of 16
    bits takes 2 bytes a weight in memory and not 4. Under ZeRO 3 the weights are partitioned while they load and must
    have the training dtype.

    Args:
        stored: the weights in the checkpoint's files; empty where there are none.
    """
    if ds_config is None:
        return torch.float32
    training = training_dtype(ds_config)
    kinds = {weight.dtype for weight in stored.values() if weight.is_floating_point()}
    return training if ds_config["zero_optimization"]["stage"] == 3 or kinds == {training} else torch.float32


def create_hf_model(
    model_class: type,
    model_name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    ds_config: dict[str, Any] | None = None,
    rlhf_training: bool = False,
    disable_dropout: bool | float | None = False,
    dropout: float | None = None,
    quantize_base: str | None = None,
) -> transformers.PreTrainedModel:
    """Load `model_name_or_path` for training.

    Args:
        model_class: an Auto class, e.g. AutoModelForCausalLM.
        tokenizer: sets the end and pad ids, and the smallest vocabulary the model must have.
        ds_config: DeepSpeed configuration; with stage 3 weights are partitioned while they load.
        rlhf_training: build the architecture only, the weights come from elsewhere.
        disable_dropout: turn every dropout off. A number or None in its place is `dropout`, which has been the sixth
            argument since 2024.
        dropout: set every dropout to this value (None: as the model has it).
        quantize_base: "nf4": each Linear layer's weight becomes 4 bits as soon as it is read, from the training dtype.

    The embedding grows to a multiple of 8 that holds the tokenizer's entries; it never shrinks.
    """
    if not isinstance(disable_dropout, bool):
        disable_dropout, dropout = False, disable_dropout if dropout is None else dropout
    config = load_model_config(model_name_or_path)
    dropout = 0.0 if disable_dropout else dropout
    configure_dropout(config, dropout)
    stored = {} if rlhf_training else check_weights(model_name_or_path, config)
    dtype = training_dtype(ds_config) if quantize_base and ds_config else _loading_dtype(ds_config, stored)
    keep_alive = None
    if ds_config is not None and ds_config["zero_optimization"]["stage"] == 3:
        if needs_swap_buffers(ds_config):
            size_swap_buffers(ds_config, largest_weight(config, token_rows(tokenizer)), world_size())
        # transformers keeps a weak reference: the object has to live as long as the model is being built.
        from transformers.integrations import HfDeepSpeedConfig  # imports what a run without ZeRO 3 does without

        keep_alive = HfDeepSpeedConfig(ds_config)
    try:
        if rlhf_training:
            model = model_class.from_config(config, dtype=dtype, trust_remote_code=is_trusted())
        else:
            model, info = model_class.from_pretrained(
                model_name_or_path, config=config, dtype=dtype, trust_remote_code=is_trusted(),
                output_loading_info=True, **(quantized_loading(quantize_base, dtype) if quantize_base else {}),
            )  # fmt: skip
            if quantize_base:
                settle_quantized(model)
            check_report(model_name_or_path, model, Report.of(info), stored)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as err:
        reason = " ".join(str(err).split())[:300]
        raise UserError(f"the model at {model_name_or_path} can't be loaded: {reason}") from err

    set_module_dropouts(model, dropout)
    model.config.end_token_id = tokenizer.eos_token_id
    stop_at(model, end_ids(tokenizer, model))
    for settings in (model.config, model.generation_config):
        settings.pad_token_id = tokenizer.pad_token_id
    grow_for(model, tokenizer)
    # While the model was built transformers had to know of ZeRO 3. From here on it must not, or rank 0 could not load
    # a model by itself.
    del keep_alive
    return model


def enable_checkpointing(model: transformers.PreTrainedModel, offload: bool) -> None:
    """Keep only the inputs of the blocks for the backward; `offload`: in pinned CPU memory, transformers' own way."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(offload=offload)
    elif offload:
        raise _no_offloading()
    else:  # the name before transformers 5.23
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def check_activation_offloading() -> None:
    """Check that this machine and this transformers can keep activations in CPU memory.

    Raises:
        UserError: the run is on a CPU, or transformers is too old.
    """
    if get_accelerator().device_name() == "cpu":
        raise UserError(
            "--activation_offloading: this run is on a CPU, where activations are in CPU memory anyway: it would "
            "save nothing. Leave it out."
        )
    if not hasattr(transformers.PreTrainedModel, "activation_checkpointing_enable"):
        raise _no_offloading()


def _no_offloading() -> UserError:
    return UserError(
        f"--activation_offloading needs transformers 5.23 or newer: {transformers.__version__} can't move activations. "
        "Install a newer one, or leave the flag out."
    )


def embedding_rows(model: transformers.PreTrainedModel) -> int:
    """Count the rows of the input embedding, also where ZeRO 3 has partitioned it."""
    weight = model.get_input_embeddings().weight
    return whole_shape(weight)[0]


def rounded_rows(entries: int) -> int:
    """Round a number of tokenizer entries up to the rows an embedding gets for them."""
    return EMBEDDING_MULTIPLE * math.ceil(entries / EMBEDDING_MULTIPLE)


def largest_weight(config: PretrainedConfig, entries: int) -> int:
    """Count the elements of the model's largest tensor, its embedding grown for a tokenizer of so many entries."""
    model = empty_model(config)
    grown = rounded_rows(entries) * model.get_input_embeddings().weight.shape[1]
    return max(grown, *(parameter.numel() for parameter in model.parameters()))


def grow_embeddings(model: transformers.PreTrainedModel, entries: int) -> bool:
    """Give the model at least `entries` embedding rows, rounded up to a multiple of 8; True if it grew.

    GPT-2's 50257 rows become 50264: a product with a vocabulary that divides by 8 is faster on a GPU.
    """
    if embedding_rows(model) >= rounded_rows(entries):
        return False
    # The same new rows on every rank, and in every run: seeded apart from what else was drawn.
    rng_state = torch.get_rng_state()
    get_accelerator().manual_seed_all(entries)
    torch.manual_seed(entries)
    model.resize_token_embeddings(rounded_rows(entries), mean_resizing=False)
    torch.set_rng_state(rng_state)
    return True


def grow_for(model: transformers.PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model a row for each entry of the tokenizer, and print it where it had too few."""
    before, entries = embedding_rows(model), token_rows(tokenizer)
    if not grow_embeddings(model, entries):
        return
    now = embedding_rows(model)
    line = f"Embedding: {before} rows become {now}, a multiple of 8 for the tokenizer's {entries} entries"
    new = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= before)
    if new:
        shown = ", ".join(repr(token) for _, token in new[:3]) + (", ..." if len(new) > 3 else "")
        line += f"; {len(new)} tokens that the model never saw begin with random weights ({shown})"
    print_rank_0(line)


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Count (all, trainable) parameters, each once, and whole where ZeRO 3 has partitioned them."""
    sizes = [(whole_numel(p), p.requires_grad) for p in model.parameters()]
    return sum(numel for numel, _ in sizes), sum(numel for numel, trains in sizes if trains)


def describe_parameters(model: torch.nn.Module) -> str:
    """Return a line with the numbers of all and of trainable parameters."""
    total, trainable = count_parameters(model)
    return f"{type(model).__name__}, {total:,} parameters, {trainable:,} of them train ({trainable / total:.1%})"


def needs_swap_buffers(ds_config: dict[str, Any]) -> bool:
    """Whether weights go to files through buffers whose size is still to be said."""
    block = ds_config["zero_optimization"].get("offload_param", {})
    return block.get("device") == "nvme" and "buffer_size" not in block


def size_swap_buffers(ds_config: dict[str, Any], largest: int, ranks: int) -> None:
    """Have buffers in `ds_config` that hold a rank's part of the model's largest weight (`largest` elements)."""
    ds_config["zero_optimization"]["offload_param"]["buffer_size"] = -(-largest // ranks) + ranks


def has_weights(folder: str) -> bool:
    """Whether the folder holds files of weights."""
    return any(file.endswith((".safetensors", ".bin", ".index.json")) for file in os.listdir(folder))
