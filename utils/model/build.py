"""Build the model a run trains: loaded, with random weights, or without weights on the meta device."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from deepspeed.accelerator import get_accelerator
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from utils.distributed.ranks import print_rank_0
from utils.machine.precision import DTYPES
from utils.model.model_utils import (
    configure_dropout,
    create_hf_model,
    describe_parameters,
    enable_checkpointing,
    grow_embeddings,
    load_model_config,
    training_dtype,
)
from utils.model.special_tokens import token_rows
from utils.module.empty_model import empty_model
from utils.module.experts import describe_joined_experts
from utils.module.lora import (
    convert_linear_layer_to_lora,
    describe_lora,
    make_model_gradient_checkpointing_compatible,
    only_optimize_lora_parameters,
)
from utils.module.lora_names import describe_unreached
from utils.module.quantized import describe_quantized, quantize_layers
from utils.module.tiled_mlp import tile_mlps


class ModelForm(NamedTuple):
    """What is done to a model before it trains; the defaults leave it as it is."""

    dropout: float | None = None  # of every dropout layer; None: as the model is configured
    lora_dim: int = 0
    lora_module_name: str = "auto"
    lora_alpha: float = 1.0
    lora_rslora: bool = False
    lora_dropout: float = 0.0
    quantize_base: str | None = None  # "nf4": the layers' weights are in 4 bits
    only_optimize_lora: bool = False
    gradient_checkpointing: bool = False
    activation_offloading: bool = False
    tiled_mlp: bool = False


def model_form(args: Namespace, gradient_checkpointing: bool | None = None) -> ModelForm:
    """Read the form of the model off main.py's arguments; `gradient_checkpointing`, if given, in place of theirs."""
    fields = {name: getattr(args, name) for name in ModelForm._fields if name != "dropout"}
    form = ModelForm(dropout=0.0 if args.disable_dropout else args.dropout, **fields)
    return form if gradient_checkpointing is None else form._replace(gradient_checkpointing=gradient_checkpointing)


def create_model(
    name: str,
    form: ModelForm,
    tokenizer: PreTrainedTokenizerBase,
    ds_config: dict[str, Any],
    untrained: bool = False,
) -> transformers.PreTrainedModel:
    """Build the model that a run trains, loaded from `name`, and print what was done to it.

    Args:
        name: a folder, or a name on the hub.
        untrained: make random weights from the configuration alone.
    """
    model = create_hf_model(
        transformers.AutoModelForCausalLM, name, tokenizer, None if untrained else ds_config, rlhf_training=untrained,
        dropout=form.dropout, quantize_base=form.quantize_base,
    )  # fmt: skip
    if form.quantize_base:
        if untrained:
            quantize_layers(model, training_dtype(ds_config), get_accelerator().current_device_name())
        print_rank_0(f"Base model: {describe_quantized(model)}")
    model = _shape(model, form, print_rank_0)
    print_rank_0(f"Model: {describe_parameters(model)}")
    if form.lora_dim > 0:
        describe_untrained_rows(load_model_config(name), model, tokenizer)
    return model


def describe_untrained_rows(
    stored: PretrainedConfig, model: transformers.PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Print how many tokens keep random weights, since LoRA froze the rows that the embedding has grown by.

    Args:
        stored: the configuration of the files.
    """
    new = token_rows(tokenizer) - stored.get_text_config().vocab_size
    parts = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    frozen = [name for name, part in parts.items() if part is not None and not part.weight.requires_grad]
    if new > 0 and frozen:
        print_rank_0(
            f"LoRA: the {' and the '.join(frozen)} do not train, so the rows of {new} tokens of the tokenizer that the "
            "model never saw stay random: texts must not hold these tokens (for padding alone they do no harm)"
        )


def create_meta_model(
    config: PretrainedConfig, form: ModelForm, dtype: str, entries: int | None = None
) -> transformers.PreTrainedModel:
    """Build the same model on the meta device: all its tensors and none of their memory.

    Args:
        config: the model's configuration; its dropout is set.
        dtype: "bf16", "fp16" or "fp32".
        entries: of the tokenizer, for which the embeddings may grow.
    """
    configure_dropout(config, form.dropout)
    model = empty_model(config, dtype=DTYPES[dtype])
    with torch.device("meta"):
        if entries is not None:
            grow_embeddings(model, entries)
        model = _shape(model, form, lambda line: None)
        # LoRA makes its weights in float32; DeepSpeed casts them when it takes the model.
        return model.to(DTYPES[dtype]) if form.lora_dim > 0 else model


def _shape(
    model: transformers.PreTrainedModel, form: ModelForm, say: Callable[[str], None]
) -> transformers.PreTrainedModel:
    """Tile MLPs, wrap layers in LoRA and turn checkpointing on, as `form` asks; `say` gets a line on each."""
    if form.tiled_mlp:
        say(f"Tiled MLP: {tile_mlps(model)}")
    if form.lora_dim > 0:
        unreached = describe_unreached(model, form.lora_module_name)
        model = convert_linear_layer_to_lora(
            model, form.lora_module_name, form.lora_dim, form.lora_alpha, form.lora_dropout, form.lora_rslora
        )
        say(f"LoRA: {describe_lora(model)}")
        if unreached:
            say(f"LoRA: {unreached}")
        if form.only_optimize_lora:
            model = only_optimize_lora_parameters(model)
            model = make_model_gradient_checkpointing_compatible(model)
        if experts := describe_joined_experts(model):
            say(f"LoRA: {experts}")
    if form.gradient_checkpointing:
        enable_checkpointing(model, form.activation_offloading)
        if form.activation_offloading:
            say("Activation offloading: the inputs of all blocks wait in CPU memory for the backward")
    return model
