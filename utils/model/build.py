"""Build the model a run trains: dropout, vocabulary, LoRA, checkpointing."""

from argparse import Namespace

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from utils.distributed.ranks import print_rank_0
from utils.model.model_utils import create_hf_model, describe_parameters, enable_checkpointing
from utils.module.lora import (
    convert_linear_layer_to_lora,
    describe_lora,
    make_model_gradient_checkpointing_compatible,
    only_optimize_lora_parameters,
)
from utils.module.tiled_mlp import tile_mlps


def create_model(
    args: Namespace, tokenizer: PreTrainedTokenizerBase, ds_config: dict, untrained: bool = False
) -> torch.nn.Module:
    """The model as it will train: loaded (`untrained`: random weights), LoRA wrapped, checkpointing on."""
    model = create_hf_model(
        AutoModelForCausalLM, args.model_name_or_path, tokenizer, None if untrained else ds_config,
        rlhf_training=untrained, disable_dropout=args.disable_dropout, dropout=args.dropout,
    )  # fmt: skip
    if args.add_eot_token:
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(args.eot_token)
    if args.tiled_mlp:
        print_rank_0(f"Tiled MLP: {tile_mlps(model)}")
    if args.lora_dim > 0:
        model = convert_linear_layer_to_lora(
            model, args.lora_module_name, args.lora_dim, args.lora_alpha, args.lora_dropout
        )
        print_rank_0(f"LoRA: {describe_lora(model)}")
        if args.only_optimize_lora:
            model = only_optimize_lora_parameters(model)
            model = make_model_gradient_checkpointing_compatible(model)
    if args.gradient_checkpointing:
        enable_checkpointing(model, args.activation_offloading)
    print_rank_0(f"Model: {describe_parameters(model)}")
    return model
