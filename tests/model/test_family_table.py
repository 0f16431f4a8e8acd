"""`tools/family_table.py` on a handful of families, each of which was wrong in one of its columns before."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tools.family_table import HEADINGS, YES, family_row
from tools.tiny_families import tiny_config, tiny_model
from utils.engine.engine import get_optimizer_grouped_parameters
from utils.errors import UserError
from utils.export.peft_adapter import check_adapter
from utils.model.config_values import set_dropouts, values
from utils.model.layout_check import choose_layout, first_length
from utils.module.lora import convert_linear_layer_to_lora

# What is not "yes", by heading.
EXPECTED = {
    "llama": {},
    "starcoder2": {},  # residual_dropout and embedding_dropout
    "bert": {},  # hidden_dropout_prob; LayerNorm of each block
    "mpt": {"free = padded": "longest"},  # dropout in a configuration within, norm_1
    "rembert": {"free = padded": "longest"},  # a layer between the hidden states and the head
    "openai-gpt": {"free = padded": "longest"},  # norms called ln_1, embd_pdrop
    "falcon": {"free = padded": "longest"},  # a Linear with a forward of its own that is one
    "deepseek_v3": {},  # dense layers beside fused experts: PEFT took their names for the experts'
    "glm4_moe": {},
    "falcon_mamba": {
        "dropout off": "has none", "free = padded": "longest", "LoRA auto": "leaves out 2 (dt_proj)",
        "adapter in PEFT": "refused",  # PEFT wraps no out_proj
    },
    "llama4_text": {"free = padded": "longest"},  # chunks; a router that is a Linear with a forward of its own
}  # fmt: skip


@pytest.mark.parametrize("family", EXPECTED)
def test_family(family):
    row = dict(zip(HEADINGS, family_row(family), strict=True))
    del row["family"], row["names as published"]
    assert row == {name: EXPECTED[family].get(name, YES) for name in row}


def test_a_dropout_anywhere_in_the_configuration_is_set():
    config = tiny_config("mpt")
    config.attn_config.attn_pdrop = 0  # a whole number by its declaration
    config.own = [{"deep": {"my_dropout_prob": 0.3, "dropped": True}}]
    config.layerdrop, config.router_jitter_noise = 0.2, 0.01
    set_dropouts(config, 0.0)
    assert all(not value for _, name, value in values(config) if "drop" in name and value is not True)
    assert config.own[0]["deep"]["dropped"] is True and config.layerdrop == 0 and config.router_jitter_noise == 0
    set_dropouts(config, 0.25)
    assert config.own[0]["deep"]["my_dropout_prob"] == 0.25 and config.resid_pdrop == 0.25
    llama = tiny_config("llama")
    llama.attention_dropout = None  # null in the file, which the family reads as a number
    set_dropouts(llama, 0.0)
    assert llama.attention_dropout == 0
    assert config.layerdrop == 0, "whole layers are only ever switched on by the model's own configuration"


class Block(nn.Module):
    """Norms under names that no list has, and a Linear whose name sounds like a norm's."""

    def __init__(self):
        super().__init__()
        self.pre_ln, self.ln1, self.n = nn.LayerNorm(8), nn.LayerNorm(8), nn.RMSNorm(8)
        self.norm_projection = nn.Linear(8, 8)


def test_decay_follows_the_class_of_a_module():
    model = Block()
    groups = get_optimizer_grouped_parameters(model, 0.1)
    decayed = [p for group in groups if group["weight_decay"] for p in group["params"]]
    assert [id(p) for p in decayed] == [id(model.norm_projection.weight)]
    by_name = get_optimizer_grouped_parameters(model, 0.1, no_decay_name_list=["ln1"])
    undecayed = [p for group in by_name if not group["weight_decay"] for p in group["params"]]
    assert [id(p) for p in undecayed] == [id(model.ln1.weight), id(model.ln1.bias)], "a list is taken as it is"


def test_documents_of_the_check_cross_what_documents_can_reach(capsys):
    """Llama 4's chunk of 32 tokens: seen where documents may be longer, no matter where they may not."""
    config = tiny_config("llama4_text")
    assert first_length(config, 64) == 51 and first_length(config, 32) == 19 and first_length(config, 40) == 40
    layouts = {}
    for longest in (32, 64):
        layouts[longest] = choose_layout(
            tiny_model(tiny_config("llama4_text")), "free", 128, torch.device("cpu"), longest=longest
        )
    assert layouts == {32: "free", 64: "longest"}
    assert "documents in one row are not kept apart by model type 'llama4_text'" in capsys.readouterr().out


def test_a_model_that_looks_ahead_is_refused():
    config = tiny_config("bert")
    config.is_decoder = False
    with pytest.raises(UserError, match=r"model type 'bert' looks ahead"):
        choose_layout(AutoModelForCausalLM.from_config(config), "longest", 128, torch.device("cpu"))


@pytest.mark.parametrize("heads", [2, 32])
def test_padding_that_changes_a_sample_is_said(heads, capsys):
    """An indexer with 2 heads scores many keys 0; which of these are the best 16 goes by the length of the row."""
    config = tiny_config("glm_moe_dsa")
    config.index_n_heads = heads
    assert choose_layout(tiny_model(config), "longest", 128, torch.device("cpu"), longest=64) == "longest"
    said = "with model type 'glm_moe_dsa' a padded sample gets other logits than alone" in capsys.readouterr().out
    assert said == (heads == 2)


def test_adapters_are_refused_for_names_that_peft_changes_alone():
    """Laguna's rule for an older name fits the new one as well; Kimi's and Hunyuan's rules don't."""
    laguna = convert_linear_layer_to_lora(tiny_model(tiny_config("laguna")), "auto", 4)
    with pytest.raises(
        UserError, match=r"read 3 layers of a laguna model by another name \(model\.layers\.1\.mlp\.shared"
    ):
        check_adapter(laguna)
    check_adapter(convert_linear_layer_to_lora(tiny_model(tiny_config("laguna")), "self_attn,layers.0.mlp", 4))
    for family in ("kimi_linear", "hy_v3"):
        check_adapter(convert_linear_layer_to_lora(tiny_model(tiny_config(family)), "auto", 4))


def test_layers_that_peft_refuses_are_named():
    model = convert_linear_layer_to_lora(tiny_model(tiny_config("mamba")), "auto", 4)
    with pytest.raises(UserError, match=r"PEFT wraps no out_proj.*such as in_proj,x_proj"):
        check_adapter(model)
    check_adapter(convert_linear_layer_to_lora(tiny_model(tiny_config("mamba")), "in_proj,x_proj", 4))
