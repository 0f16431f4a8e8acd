"""Heads that config.json ties to the input embedding and whose own values are in the files.

A whole fine-tuned head beside a configuration that was copied from the base, say. What transformers makes of it depends
on how it loads: apart in a plain load, tied (the stored head is lost) under ZeRO 3 and where the embedding grows. Other
programs tie. Here the head stays what is stored, and the configuration says so from then on.
"""

from __future__ import annotations

import torch
import transformers
from transformers import PretrainedConfig

from utils.model.config_values import set_value, values
from utils.model.weight_files import open_values, places_in_files

TIED = "tie_word_embeddings"


def has_own_head(name: str, model: transformers.PreTrainedModel, stored: dict[str, torch.Tensor]) -> bool:
    """Whether the files of `name` hold a head and an embedding that differ, where `model` has one weight for both.

    Args:
        model: without memory.
        stored: the weights in the files, without memory.
    """
    pairs = getattr(model, "all_tied_weights_keys", None) or {}
    embedding = model.get_input_embeddings().weight
    of_embedding = {key for key, one in model.named_parameters(remove_duplicate=False) if one is embedding}
    for pair in pairs.items():
        if not of_embedding.intersection(pair):
            continue
        places = places_in_files(pair, stored, model.base_model_prefix)
        if len(places) < 2 or len(set(places.values())) < 2:
            continue
        with open_values(name) as read:
            first, second = (read(places[key]) for key in pair)
        if not torch.equal(first, second):
            return True
    return False


def untie(config: PretrainedConfig) -> None:
    """Have the configuration, and those within it, say that the head has a weight of its own."""
    for holder, key, value in list(values(config)):
        if key == TIED and value:
            set_value(holder, key, False)
