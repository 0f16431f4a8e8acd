"""Layers that no text reaches: `auto` leaves them out with a line, and LoRA on names that take them in says so."""

import pytest
import torch
from torch import nn

from tools.tiny_families import tiny_config, tiny_model
from utils.module.lora import LinearLayer_LoRA, convert_linear_layer_to_lora
from utils.module.lora_names import check_lora_module_name, describe_unreached, unreached_layers

LEFT_OUT = {
    "mbart": ({"encoder_attn"}, 8, "encoder_attn.k_proj"),  # cross attention without an encoder
    "mamba": ({"dt_proj"}, 2, "mixer.dt_proj"),  # read as a weight, never called
    "deepseek_v32": ({"indexer"}, 6, "self_attn.indexer.wq_b"),  # a choice without a gradient
}


@pytest.mark.parametrize("family", LEFT_OUT)
def test_auto_leaves_out_what_no_text_reaches(family):
    """All that is wrapped gets a gradient, and nothing else in the blocks would."""
    parts, count, example = LEFT_OUT[family]
    model = tiny_model(tiny_config(family))
    line = describe_unreached(model, "auto")
    assert line.startswith(f"{count} linear layers of the blocks are left out") and f"layers.*.{example}" in line
    convert_linear_layer_to_lora(model, "auto", 4)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LinearLayer_LoRA)}
    assert not any(part in name for name in layers for part in parts)
    model(input_ids=torch.arange(3, 46)[None], use_cache=False).logits.float().pow(2).mean().backward()
    assert all(layer.lora_left_weight.grad.count_nonzero() for layer in layers.values())


def test_blocks_are_those_of_the_text():
    """The tower for pictures has more linear weights in this tiny GIT than the blocks of the decoder."""
    names = check_lora_module_name(tiny_model(tiny_config("git")), "auto")
    assert names and all(name.startswith("git.encoder.layer.") for name in names)


def test_what_only_a_longer_text_reaches_is_wrapped():
    """DeepSeek-V4 joins 128 tokens: eight of them do not reach its compressors."""
    assert unreached_layers(tiny_model(tiny_config("deepseek_v4"))) == []


def test_names_that_take_such_layers_in_are_obeyed_and_said():
    model = tiny_model(tiny_config("mamba"))
    line = describe_unreached(model, "dt_proj,in_proj")
    assert (
        line
        == "2 of the named layers get no gradient from a text and stay as they are (backbone.layers.*.mixer.dt_proj)"
    )
    assert len(check_lora_module_name(model, "dt_proj,in_proj")) == 4
    assert describe_unreached(model, "in_proj") is None


def test_a_module_of_ones_own_is_taken_whole():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(4, 4)])
    assert check_lora_module_name(model, "auto") == ["layers.0"]
