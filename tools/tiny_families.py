"""Tiny random models of every causal family that transformers has, made from each family's own default configuration.

Sizes are recognised by their names and cut down; lists with an entry for each layer are left out, so that the family
makes its own for the new number of layers. What that does not give is in `OWN`.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 128
# The first pattern that matches a value's whole name decides.
SIZES = [
    (r"vocab_size.*|.*_vocab_size", VOCABULARY),
    (r"(bos|decoder_start|forced_bos)_token_id", 1),
    (r"(eos|forced_eos)_token_id", 2),
    (r"pad_token_id", 0),
    (r"(num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers)", 2),
    (r"first_k_dense_replace|moe_layer_start_index|num_dense_layers", 1),
    (r"(num_key_value_heads|num_kv_heads|.*_key_value_heads)", 2),
    (r".*attention_heads|n_heads?|num_heads|mamba_n_heads|.*_num_heads", 4),
    (r"head_dim|.*_head_dim|d_head|d_kv|attention_head_size|v_head_dim|qk_nope_head_dim", 16),
    (r"hidden_size|d_model|n_embd|dim_model|word_embed_proj_dim|embedding_size|attention_hidden_size|hidden_dim", 64),
    (r"(.*_)?intermediate_size|ffn_dim|(en|de)coder_ffn_dim|n_inner|d_ff|ffn_hidden_size|dim_ff|inner_dim|d_inner", 96),
    (r"(q|kv|o)_lora_rank|.*_lora_rank|.*_lora_dim|low_rank_dim", 16),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_experts_per_layer", 4),
    (r"n_shared_experts|num_shared_experts", 1),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|top_k|moe_top_k|num_selected_experts", 2),
    (r"n_groups?|topk_group|mamba_n_groups|num_expert_group", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|max_target_positions", 256),
    (r"sliding_window|window_size|attention_chunk_size|local_attention|attention_window_size|sliding_window_size", 32),
    (r"chunk_size|mamba_chunk_size|block_size", 16),
    (r"original_max_position_embeddings", 64),
    (r"index_topk", 16),
    (r"index_n_heads", 32),  # as published: of 2 many keys score 0, and which of equals are chosen is by chance
    (r"(mamba_)?d_state|state_size|ssm_state_size", 8),
    (r"time_step_rank|mamba_dt_rank", 4),
]  # fmt: skip
# What a family needs beside. A dictionary changes entries of the one that is there.
_MAMBA = {"mamba_d_head": 32, "mamba_n_heads": 4, "mamba_expand": 2, "mamba_d_ssm": 128}
_LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"n_group": 1, "topk_group": 1, "num_experts": 8},
    "bamba": _MAMBA,
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"layer_types": ["full_attention", "full_attention"]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": _MAMBA,
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0], **_LAYERS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": _MAMBA,
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layer_types": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 16]},
}
DROPPED = ("per_layer_config", "attention_layers")  # made by a family from its other values


def families() -> list[str]:
    """Return the model types with a causal language model, in alphabetical order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str) -> PretrainedConfig:
    """Return a configuration of the family with two layers of width 64 and 128 tokens."""
    config_class = CONFIG_MAPPING[family]
    sizes = _cut(config_class().to_dict())
    if "kv_lora_rank" in sizes:  # latent attention has as many key heads as query heads
        sizes["num_key_value_heads"] = 4
    sizes.update(copy.deepcopy(OWN.get(family, {})))
    if hasattr(config_class(), "is_decoder"):
        sizes["is_decoder"] = True  # BERT and its relatives are encoders unless told otherwise
    for key in ("is_encoder_decoder", "transformers_version", "architectures", "model_type", "dtype"):
        sizes.pop(key, None)
    return config_class(**sizes)


def _cut(values: dict[str, Any]) -> dict[str, Any]:
    depth = next(pattern for pattern, _ in SIZES if "num_hidden_layers" in pattern)
    layers = {value for name, value in values.items() if re.fullmatch(depth, str(name)) and isinstance(value, int)}
    small = {}
    for name, value in values.items():
        if name in DROPPED:
            continue
        if isinstance(value, dict):
            small[name] = _cut(value)
        elif isinstance(value, (list, tuple)) and len(value) in {*layers, *(n + 1 for n in layers)} and len(value) > 2:
            continue
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            small[name] = next((size for pattern, size in SIZES if re.fullmatch(pattern, str(name))), value)
        else:
            small[name] = value
    return small


def tiny_model(config: PretrainedConfig) -> transformers.PreTrainedModel:
    """Return a random float32 model of the configuration, the same each time."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
