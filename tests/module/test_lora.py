"""LoRA: the layers, which ones are wrapped, what trains, and the optimizer's parameter groups."""

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
    MistralConfig,
    OPTConfig,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

from utils.engine.engine import get_optimizer_grouped_parameters
from utils.errors import UserError
from utils.module.lora import (
    LinearLayer_LoRA,
    check_lora_module_name,
    convert_linear_layer_to_lora,
    convert_lora_to_linear_layer,
    only_optimize_lora_parameters,
)

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
    "mistral": MistralConfig(**GATED),
}
LORA_NAMES = {
    "opt": "decoder.layers.", "gpt2": "transformer.h.", "bloom": "transformer.h.", "neox": "gpt_neox.layers.",
    "llama": "model.layers.", "qwen3": "model.layers.", "gemma2": "model.layers.", "mistral": "model.layers.",
}  # fmt: skip


def make(family: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32).eval()


def train_lora(model: nn.Module) -> None:
    """Give every LoRA layer a random left weight, so that it adds something."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, LinearLayer_LoRA):
            nn.init.normal_(module.lora_left_weight, std=0.2)


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 20)[None]).logits


@pytest.fixture(params=["linear", "conv1d"])
def layer(request) -> LinearLayer_LoRA:
    torch.manual_seed(0)
    flipped = request.param == "conv1d"
    base = Conv1D(12, 24) if flipped else nn.Linear(24, 12)
    nn.init.normal_(base.bias)
    return LinearLayer_LoRA(base.weight, 4, lora_scaling=8, lora_droppout=0.5, bias=base.bias, fan_in_fan_out=flipped)


def weight_of(layer: LinearLayer_LoRA) -> torch.Tensor:
    """The wrapped weight as [out, in]."""
    return layer.weight.t() if layer.fan_in_fan_out else layer.weight


def test_layer_shapes_and_start(layer):
    assert layer.lora_right_weight.shape == (24, 4) and layer.lora_left_weight.shape == (4, 12)
    assert layer.lora_scaling == 8 / 4
    assert not layer.weight.requires_grad and layer.bias.requires_grad
    assert layer.lora_left_weight.count_nonzero() == 0
    # Kaiming-uniform with a = sqrt(5) on [in, r] takes r for the inputs: uniform within 1 / sqrt(r).
    bound = 4**-0.5
    assert 0.9 * bound < layer.lora_right_weight.abs().max() <= bound
    assert layer.lora_right_weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)
    x = torch.randn(3, 5, 24)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight_of(layer), layer.bias))
    with pytest.raises(ValueError):
        LinearLayer_LoRA(layer.weight, lora_dim=0)


@pytest.mark.parametrize(("inputs", "rank"), [(64, 128), (768, 8)])
def test_first_weights_are_the_published_draw(inputs, rank):
    """The very numbers of kaiming_uniform_ on an [in, r] tensor, whose range the rank alone decides."""
    base = nn.Linear(inputs, 16)
    torch.manual_seed(5)
    drawn = LinearLayer_LoRA(base.weight, rank).lora_right_weight
    torch.manual_seed(5)
    published = nn.init.kaiming_uniform_(torch.empty(inputs, rank), a=5**0.5)
    assert drawn.equal(published)
    torch.manual_seed(5)
    torch.testing.assert_close(drawn.detach(), torch.empty(inputs, rank).uniform_(-(rank**-0.5), rank**-0.5))
    assert drawn.abs().max().item() == pytest.approx(rank**-0.5, rel=0.01)


def test_layer_computes_what_it_says(layer):
    nn.init.normal_(layer.lora_left_weight)
    layer.eval()
    x = torch.randn(7, 24)
    product = layer.lora_right_weight @ layer.lora_left_weight
    by_hand = x @ weight_of(layer).t() + layer.bias + x @ product * 2
    torch.testing.assert_close(layer(x), by_hand)
    torch.testing.assert_close(layer(x.view(7, 1, 24)), by_hand.view(7, 1, 12))
    layer.bias = None
    by_hand = x @ weight_of(layer).t() + x @ product * 2
    torch.testing.assert_close(layer(x), by_hand)
    layer(x).square().sum().backward()
    gradient = 2 * (x @ layer.lora_right_weight).t() @ (2 * by_hand)
    torch.testing.assert_close(layer.lora_left_weight.grad, gradient)
    assert layer.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_addition_rounds_no_more_than_its_formula(dtype):
    """Against float64; and it is one matrix product into the base's output, of which autograd makes no copy."""
    torch.manual_seed(0)
    layer = LinearLayer_LoRA(nn.Parameter(torch.randn(48, 32)), 8, 4, 0, nn.Parameter(torch.randn(48)))
    nn.init.normal_(layer.lora_left_weight)
    layer.to(dtype)
    inputs = torch.randn(3, 50, 32).to(dtype)
    weight, bias, right, left = (
        tensor.detach() for tensor in (layer.weight, layer.bias, layer.lora_right_weight, layer.lora_left_weight)
    )
    formula = nn.functional.linear(inputs, weight, bias) + (inputs @ right @ left) * 0.5
    exact = inputs.double() @ (weight.double().t() + right.double() @ left.double() * 0.5) + bias.double()
    output = layer(inputs)
    assert (output.double() - exact).norm() <= 1.01 * (formula.double() - exact).norm()
    assert output.grad_fn.next_functions[0][0].name() == "AddmmBackward0"
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer.float()(inputs.float())
    torch.testing.assert_close(mixed.double(), exact, rtol=0.05, atol=0.3)


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
    kinds = {name: type(module) for name, module in linears_of(model).items()}
    linears = {name for name in kinds if ".0." in name}
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
    assert {name: type(module) for name, module in linears_of(model).items()} == kinds


@pytest.mark.parametrize("family", LORA_NAMES)
def test_auto_is_the_linear_layers_of_the_blocks(family):
    model = make(family)
    assert check_lora_module_name(model, "auto") == [
        name for name in linears_of(model) if ".0." in name or ".1." in name
    ]
    # Nothing of it depends on the depth, or on a vocabulary that outweighs the blocks.
    assert not any("head" in name or "embed" in name for name in check_lora_module_name(model, "auto"))


def test_auto_takes_the_largest_list_and_all_of_a_block():
    """Lists inside a block belong to it, smaller ones beside it do not, and without a list there is an error."""
    model = nn.Module()
    model.heads = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
    model.blocks = nn.ModuleList(nn.Module() for _ in range(2))
    for block in model.blocks:
        block.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        block.gate = nn.Linear(8, 3)
    names = check_lora_module_name(model, "auto")
    assert len(names) == 8 and all(name.startswith("blocks.") for name in names)
    del model.blocks, model.heads
    model.only = nn.Linear(4, 4)
    with pytest.raises(UserError, match=r"'auto' matches no .* one of: only"):
        check_lora_module_name(model, "auto")


def test_several_names():
    model = make("llama")
    wanted = [name for name in linears_of(model) if "q_proj" in name or "layers.1.mlp.up_proj" in name]
    assert len(wanted) == 3
    assert check_lora_module_name(model, "layers.1.mlp.up, q_proj") == wanted
    assert check_lora_module_name(model, "auto,lm_head") == list(linears_of(model))
    with pytest.raises(UserError, match=r"'qproj' matches no .*model\.layers\."):
        check_lora_module_name(model, "up_proj,qproj")
    with pytest.raises(UserError, match="empty part"):
        check_lora_module_name(model, "up_proj,")


@pytest.mark.parametrize("family", LORA_NAMES)
def test_a_name_that_matches_nothing_lists_what_could(family):
    model = make(family)
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(UserError) as raised:
        convert_linear_layer_to_lora(model, "no.such.layer.", 4)
    assert type(model).__name__ in str(raised.value)
    assert LORA_NAMES[family] in str(raised.value)
    assert [name for name, _ in model.named_parameters()] == before


def test_a_tied_head_is_not_wrapped():
    """LoRA merged into a tied head would be lost on saving or change the embedding; an untied head is wrapped."""
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
