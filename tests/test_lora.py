"""LoRA layers, what they wrap, what trains, and how parameters are grouped for the optimizer."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Qwen3Config,
)

from utils.errors import UserError
from utils.module.lora import (
    LinearLayer_LoRA,
    convert_linear_layer_to_lora,
    convert_lora_to_linear_layer,
    only_optimize_lora_parameters,
)
from utils.utils import get_optimizer_grouped_parameters

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 48}
GATED = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
CONFIGS = {
    "opt": OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=32),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=48, n_positions=32),
    "bloom": BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=48),
    "neox": GPTNeoXConfig(**SMALL, intermediate_size=32, max_position_embeddings=32),
    "llama": LlamaConfig(**GATED),
    "qwen3": Qwen3Config(**GATED),
    "gemma2": Gemma2Config(**GATED),
}
LORA_NAMES = {
    "opt": "decoder.layers.", "bloom": "transformer.h.", "neox": "gpt_neox.layers.", "llama": "model.layers.",
    "qwen3": "model.layers.", "gemma2": "model.layers.",
}  # fmt: skip


def make(family: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32).eval()


def train_lora(model: nn.Module) -> None:
    """Give every LoRA layer something to add."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, LinearLayer_LoRA):
            nn.init.normal_(module.lora_left_weight, std=0.2)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 20)[None]).logits


@pytest.fixture
def layer() -> LinearLayer_LoRA:
    torch.manual_seed(0)
    linear = nn.Linear(24, 12)
    return LinearLayer_LoRA(linear.weight, lora_dim=4, lora_scaling=8, lora_droppout=0.5, bias=linear.bias)


def test_layer_shapes_and_start(layer):
    assert layer.lora_right_weight.shape == (24, 4) and layer.lora_left_weight.shape == (4, 12)
    assert layer.lora_scaling == 8 / 4
    assert not layer.weight.requires_grad and layer.bias.requires_grad
    assert layer.lora_left_weight.count_nonzero() == 0
    # Kaiming-uniform with a = sqrt(5) is uniform within 1 / sqrt(inputs).
    bound = 24**-0.5
    assert layer.lora_right_weight.abs().max() <= bound
    assert layer.lora_right_weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)
    x = torch.randn(3, 5, 24)
    assert layer(x).equal(nn.functional.linear(x, layer.weight, layer.bias))
    with pytest.raises(ValueError):
        LinearLayer_LoRA(layer.weight, lora_dim=0)


def test_layer_computes_what_it_says(layer):
    nn.init.normal_(layer.lora_left_weight)
    layer.eval()
    x = torch.randn(7, 24)
    by_hand = x @ layer.weight.t() + layer.bias + x @ (layer.lora_right_weight @ layer.lora_left_weight) * 2
    torch.testing.assert_close(layer(x), by_hand)


def test_fused_and_unfused_agree_and_unfuse_restores(layer):
    nn.init.normal_(layer.lora_left_weight)
    layer.eval()
    x, before = torch.randn(7, 24), layer.weight.detach().clone()
    unfused = layer(x)
    layer.fuse_lora_weight()
    layer.fuse_lora_weight()  # the second does nothing
    assert (layer.weight - before).abs().max() > 0.1
    torch.testing.assert_close(layer(x), unfused, rtol=1e-4, atol=1e-5)
    layer.unfuse_lora_weight()
    layer.unfuse_lora_weight()
    torch.testing.assert_close(layer.weight.detach(), before, rtol=0, atol=1e-6)
    torch.testing.assert_close(layer(x), unfused, rtol=1e-4, atol=1e-5)


def test_train_and_eval_return_the_layer_and_switch_its_dropout(layer):
    nn.init.normal_(layer.lora_left_weight)
    x = torch.randn(4, 24)
    assert layer.train() is layer and not layer(x).equal(layer(x))
    assert layer.eval() is layer and layer(x).equal(layer(x))


@pytest.mark.parametrize("family", LORA_NAMES)
def test_every_linear_of_the_blocks_is_wrapped_and_comes_back(family):
    model = make(family)
    base = logits(model)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".0." in name}
    names = {name for name, _ in model.named_parameters()}
    convert_linear_layer_to_lora(model, LORA_NAMES[family], 4)
    wrapped = {name for name, module in model.named_modules() if isinstance(module, LinearLayer_LoRA)}
    assert {name for name in wrapped if ".0." in name} == linears and len(wrapped) == 2 * len(linears)
    torch.testing.assert_close(logits(model), base)
    train_lora(model)
    trained = logits(model)
    assert (trained - base).abs().max() > 1e-3
    convert_lora_to_linear_layer(model)
    torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-4)
    assert {name for name, _ in model.named_parameters()} == names
    assert not any(isinstance(module, LinearLayer_LoRA) for module in model.modules())


@pytest.mark.parametrize("family", [*LORA_NAMES, "gpt2"])
def test_a_name_that_matches_nothing_lists_what_could(family):
    model = make(family)
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(UserError) as raised:
        convert_linear_layer_to_lora(model, "no.such.layer.", 4)
    assert type(model).__name__ in str(raised.value)
    assert ("Conv1D" if family == "gpt2" else LORA_NAMES[family]) in str(raised.value)
    assert [name for name, _ in model.named_parameters()] == before


def test_a_tied_head_is_not_wrapped():
    """Merged, it would be lost on saving or would change the embedding too; a head of its own is another matter."""
    with pytest.raises(UserError, match="lm_head"):
        convert_linear_layer_to_lora(make("opt"), "lm_head", 4)
    untied = make("llama")
    assert isinstance(convert_linear_layer_to_lora(untied, "lm_head", 4).lm_head, LinearLayer_LoRA)


def test_only_lora_trains():
    model = convert_linear_layer_to_lora(make("opt"), "decoder.layers.", 4)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "model.decoder.embed_tokens.weight" in trains
    assert not any(name.endswith(("proj.weight", "fc1.weight", "fc2.weight")) for name in trains)
    assert only_optimize_lora_parameters(model) is model
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains and all("lora_" in name for name in trains) and len(trains) == 2 * 6 * 2


# ------------------------------------------------------------------------------------- parameter groups


@pytest.mark.parametrize("family", CONFIGS)
def test_no_decay_on_biases_and_norms_of_any_family(family):
    """By shape: matrices decay, everything with one dimension does not, and nothing is lost or doubled."""
    model = make(family)
    decayed, plain = get_optimizer_grouped_parameters(model, weight_decay=0.1)
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert {parameter.dim() for parameter in decayed["params"]} == {2}
    assert {parameter.dim() for parameter in plain["params"]} == {1}
    grouped = [id(parameter) for group in (decayed, plain) for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())


def test_lora_has_its_own_group_and_rate():
    model = convert_linear_layer_to_lora(make("opt"), "decoder.layers.", 4)
    groups = get_optimizer_grouped_parameters(model, 0.1, lora_lr=3e-3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    with_rate = [group for group in groups if "lr" in group]
    assert [group["lr"] for group in with_rate] == [3e-3]
    assert {names[id(p)] for p in with_rate[0]["params"]} == {n for n in names.values() if "lora_" in n}
    frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    assert not frozen & {id(parameter) for group in groups for parameter in group["params"]}
    # Empty groups would make the optimizer fail.
    assert len(get_optimizer_grouped_parameters(only_optimize_lora_parameters(model), 0.1)) == 1
