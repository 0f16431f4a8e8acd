"""A model's attention heads, as its configuration gives them, of every kind of layer."""

from __future__ import annotations

from typing import NamedTuple

import transformers


class Heads(NamedTuple):
    """The attention heads of a layer."""

    groups: int  # query heads for one key head
    size: int  # of a query and a key
    value_size: int  # differs in latent attention (DeepSeek)


def heads_of(config: transformers.PretrainedConfig) -> list[Heads]:
    """Return the different kinds of heads that the layers of a model have, nearly always one."""
    return list(dict.fromkeys(_heads(layer) for layer in _layers(config)))


def has_windows(config: transformers.PretrainedConfig) -> bool:
    """Whether attention of a layer sees a number of tokens alone."""
    return any(getattr(layer, "sliding_window", None) for layer in _layers(config))


def attention_dropout(config: transformers.PretrainedConfig) -> float:
    """Return the dropout of a model's attention weights, under any of its names; 0 where it has none."""
    found = [value for name, value in config.get_text_config().to_dict().items() if "att" in name and "drop" in name]
    return max((float(value) for value in found if isinstance(value, (int, float))), default=0.0)


def _layers(config: transformers.PretrainedConfig) -> list[transformers.PretrainedConfig]:
    """Return each layer's configuration where they differ (Gemma 4), else the model's own alone."""
    text = config.get_text_config()
    return list(text.per_layer_config) if getattr(text, "is_heterogeneous", False) else [text]


def _heads(layer: transformers.PretrainedConfig) -> Heads:
    heads = getattr(layer, "num_attention_heads", None) or 1
    if getattr(layer, "qk_nope_head_dim", None):  # latent attention: a key for each query head
        return Heads(1, layer.qk_nope_head_dim + layer.qk_rope_head_dim, layer.v_head_dim)
    size = getattr(layer, "head_dim", None) or layer.hidden_size // heads
    return Heads(heads // (getattr(layer, "num_key_value_heads", None) or heads), size, size)
