"""LoRA on mixtures of experts: what is wrapped, and what is said of the rest."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

from utils.module.experts import describe_joined_experts
from utils.module.lora import check_lora_module_name, convert_linear_layer_to_lora, only_optimize_lora_parameters
from utils.module.router_loss import Router, balance

EXPERTS = 4
CONFIG = MixtralConfig(
    vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, num_local_experts=EXPERTS, pad_token_id=0,
)  # fmt: skip


@pytest.fixture
def model() -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG)


def test_joined_experts_are_counted(model):
    """Two layers with two tensors each: [4, 2 x 24, 16] and [4, 16, 24]."""
    convert_linear_layer_to_lora(model, "auto", 2)
    counted = f"4 tensors of joined experts ({2 * EXPERTS * 3 * 24 * 16:,} parameters)"
    line = describe_joined_experts(model)
    assert line.startswith(counted) and "train whole" in line and "frozen" not in line
    line = describe_joined_experts(only_optimize_lora_parameters(model))
    assert line.startswith(counted) and line.endswith("stay frozen")


def test_experts_that_are_layers_are_wrapped(model):
    for layer in model.model.layers:
        layer.mlp.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(EXPERTS))
    names = check_lora_module_name(model, "auto")
    assert sum(".mlp.experts." in name for name in names) == 2 * EXPERTS
    assert describe_joined_experts(model) is None


def test_a_token_may_skip_the_experts():
    """A router like Zaya's has one logit more than there are experts, which is one more choice."""
    logits = torch.full((6, 5), -1e4)
    logits[:2, 4] = logits[2:, 1] = 0.0
    loss, tokens = balance(Router(4, 1, 0.0), (logits,), None)
    assert tokens.tolist() == [[0, 4, 0, 0, 2]] and loss.item() == pytest.approx(5 * (4 / 6 * 4 / 6 + 2 / 6 * 2 / 6))
