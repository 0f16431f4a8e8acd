"""rsLoRA and LoRA+: the scale of LoRA's product, the rate of its left weights, and both in PEFT's format."""

import json
import math

import peft
import pytest
import torch
from fork_runs import finished_run
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.arguments.parser import parse_args
from utils.arguments.values import check_values
from utils.engine.engine import create_optimizer
from utils.module.lora import LinearLayer_LoRA, convert_linear_layer_to_lora

LORA = ["--lora_dim", "4", "--lora_module_name", "auto", "--only_optimize_lora", "--lora_learning_rate", "1e-2"]


@pytest.mark.parametrize(("stabilized", "scale"), [(False, 6 / 9), (True, 6 / 3)])
def test_the_product_is_scaled_by_the_rank_or_its_root(stabilized, scale):
    layer = LinearLayer_LoRA(nn.Linear(5, 7).weight, 9, lora_scaling=6, rank_stabilized=stabilized)
    nn.init.normal_(layer.lora_left_weight)
    product = layer.lora_right_weight.double() @ layer.lora_left_weight.double() * scale
    inputs = torch.randn(3, 5)
    expected = inputs.double() @ (layer.weight.double().t() + product)
    torch.testing.assert_close(layer(inputs).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.delta_weight().double(), product.t(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_left_weights_move_at_their_own_rate(ratio):
    """Adam's first step moves every weight that has a gradient by its rate."""
    torch.manual_seed(0)
    model = convert_linear_layer_to_lora(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)), "0", 3)
    nn.init.normal_(model[0].lora_left_weight)
    optimizer = create_optimizer(model, 1e-4, lora_learning_rate=1e-3, lora_plus_ratio=ratio)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    model(torch.randn(8, 6)).square().sum().backward()
    optimizer.step()
    moved = {name: (weight - before[name]).abs().max().item() for name, weight in model.named_parameters()}
    assert moved["0.lora_right_weight"] == pytest.approx(1e-3, rel=1e-3)
    assert moved["0.lora_left_weight"] == pytest.approx(1e-3 * ratio, rel=1e-3)
    assert moved["1.weight"] == pytest.approx(1e-4, rel=1e-3) and moved["0.weight"] == 0


def test_a_run_with_both_is_what_peft_reads(tmp_path, run_arguments, tiny_opt):
    variants = ["--lora_rslora", "--lora_alpha", "3", "--lora_plus_ratio", "8", "--save_lora_adapter"]
    finished_run([*run_arguments, *LORA, *variants, "--max_steps", "4", "--output_dir", tmp_path])
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["lora_alpha"], config["r"]) == (True, 3, 4)
    base = AutoModelForCausalLM.from_pretrained(tiny_opt)
    ids = AutoTokenizer.from_pretrained(tiny_opt)("How does a telescope work?", return_tensors="pt")
    with torch.no_grad():
        before = base(**ids).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert (merged(**ids).logits - before).abs().max() > 1e-3
        torch.testing.assert_close(adapted(**ids).logits, merged(**ids).logits, rtol=1e-4, atol=1e-4)
    layers = [module for module in adapted.modules() if hasattr(module, "lora_A")]
    assert layers and all(module.scaling["default"] == pytest.approx(3 / math.sqrt(4)) for module in layers)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lora_rslora"], "need --lora_dim above 0"),
        (["--lora_plus_ratio", "4"], "need --lora_dim above 0"),
        (["--lora_dim", "4", "--lora_plus_ratio", "0"], "must be a finite number above 0"),
    ],
)
def test_what_would_do_nothing_is_refused(arguments, words):
    problems = check_values(parse_args(["--model_name_or_path", "a", *arguments]))
    assert any(words in problem for problem in problems)
