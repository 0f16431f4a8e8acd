"""`--quantize_base`: LoRA on weights in 4 bits gives what it gives on the plain weights that these stand for."""

import copy
import json

import peft
import pytest
import torch
from fork_runs import copy_at_step, finished_run, outcome
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, OPTConfig

from tests.module.test_lora import logits, make, train_lora
from utils.arguments.parser import parse_args
from utils.arguments.values import check_values
from utils.distributed.zero3 import is_quantized
from utils.dry_run.activation_memory import Layout
from utils.dry_run.memory import estimate_memory
from utils.ds_utils import get_train_ds_config
from utils.errors import UserError
from utils.model.build import ModelForm
from utils.model.model_utils import count_parameters
from utils.module import quantized
from utils.module.lora import convert_linear_layer_to_lora, convert_lora_to_linear_layer, only_optimize_lora_parameters
from utils.module.quantized import QuantizedLinear, check_quantization, plain_weight, quantize_layers, quantized_names

LORA = ["--lora_dim", "4", "--lora_module_name", "auto", "--only_optimize_lora", "--lora_learning_rate", "1e-2"]
QLORA = [*LORA, "--quantize_base", "nf4"]
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 48, "pad_token_id": 0}
CONFIGS = {
    "opt": OPTConfig(**SMALL, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=32, dropout=0),
    "llama": LlamaConfig(**SMALL, intermediate_size=128, num_key_value_heads=1),
}


def with_lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    model = only_optimize_lora_parameters(convert_linear_layer_to_lora(model, "q_proj,k_proj", 4, 8))
    train_lora(model)
    return model


@pytest.mark.parametrize("family", CONFIGS)
def test_loss_and_gradients_are_those_of_the_plain_weights(family):
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32)
    plain, packed = copy.deepcopy(original), quantize_layers(copy.deepcopy(original), torch.float32, "cpu")
    layers = {name: module for name, module in packed.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(layers) == 2 * (6 if family == "opt" else 7), "every layer of the blocks, LoRA or not, and no head"
    for name, layer in layers.items():
        weight = plain.get_submodule(name).weight
        weight.data.copy_(plain_weight(layer.weight))
        error = (weight - original.get_submodule(name).weight).norm() / original.get_submodule(name).weight.norm()
        assert 0.08 < error < 0.11, "rounded to the nearest of 16 values"
    ids = torch.arange(4, 20)[None]
    models = [with_lora(packed), with_lora(plain)]
    losses = [model(input_ids=ids, labels=ids).loss for model in models]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
    for loss in losses:
        loss.backward()
    gradients = [{name: p.grad for name, p in model.named_parameters() if p.requires_grad} for model in models]
    assert len(gradients[0]) == 2 * 2 * 2 and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-7)
    assert count_parameters(packed) == count_parameters(plain)
    expected = logits(plain)
    torch.testing.assert_close(logits(packed), expected, rtol=1e-5, atol=1e-5)  # without gradients, by another kernel
    torch.testing.assert_close(logits(convert_lora_to_linear_layer(packed)), expected, rtol=1e-4, atol=1e-5)


def test_bits_and_bytes_of_a_weight():
    """The paper's 4.127 bits, which the memory estimate counts with."""
    layer = nn.Module()
    layer.all_tied_weights_keys, layer._keep_in_fp32_modules = {}, None
    layer.get_output_embeddings = lambda: None
    layer.wide, layer.head = nn.Linear(1024, 512, bias=False), nn.Linear(2, 2, bias=False)  # the last one is kept
    weight = quantize_layers(layer, torch.bfloat16, "cpu").wide.weight
    state = weight.quant_state
    size = sum(tensor.nbytes for tensor in (weight.data, state.absmax, state.state2.absmax))
    assert 8 * size / (1024 * 512) == pytest.approx(quantized.BITS) == pytest.approx(4.127, abs=1e-3)
    assert type(layer.head) is nn.Linear


def test_a_dry_run_counts_the_base_in_4_bits(tiny_opt):
    form = ModelForm(dropout=0.0, lora_dim=4, only_optimize_lora=True)
    layout, config = Layout(1, 20, 19), get_train_ds_config(False, "bf16", 2)
    plain, packed = (
        estimate_memory(str(tiny_opt), form._replace(quantize_base=kind), config, layout, 1) for kind in (None, "nf4")
    )
    names = 2 * (4 * 64 * 64 + 2 * 64 * 128)  # of two layers with attention and MLP
    assert packed.counts.quantized == names and packed.counts.parameters == plain.counts.parameters
    saved = plain.total.weights - packed.total.weights
    assert saved == pytest.approx(names * (2 - 4.127 / 8), rel=1e-3)
    # One weight at a time is turned back for its products.
    assert plain.total.moments["backward"] - packed.total.moments["backward"] == pytest.approx(saved - 2 * 64 * 128)


def test_a_run_on_two_ranks(tmp_path, run_arguments, tiny_opt):
    """Its checkpoints go on bit for bit; merged model and adapter are the trained model, on a base that PEFT loads."""
    saving = ["--save_steps", "2", "--save_lora_adapter", "--lora_alpha", "8", "--zero_stage", "2", "--max_steps", "4"]
    arguments = [*run_arguments, *QLORA, *saving, "--per_device_train_batch_size", "8"]
    printed = finished_run([*arguments, "--output_dir", tmp_path / "a"], ranks=2)
    assert "Base model: 12 weights (65,536 parameters) in NF4, 4.127 bits each" in printed
    assert "Saved to" in printed and "reloaded logits differ" in printed
    resumed = copy_at_step(tmp_path / "a", tmp_path / "b", 2)
    again = finished_run([*arguments, "--output_dir", resumed, "--resume_from_checkpoint"], ranks=2)
    assert "step 2 of 4 is done" in again
    assert outcome(tmp_path / "b") == outcome(tmp_path / "a")

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_opt, dtype=torch.float32, quantization_config=how).eval()
    for layer in base.modules():
        layer.support_avx512bf16_for_cpu = False  # with which bitsandbytes' own layer computes evaluations in bf16
    ids = AutoTokenizer.from_pretrained(tiny_opt)("How does a telescope work?", return_tensors="pt")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    assert json.loads((tmp_path / "a" / "config.json").read_text()).get("quantization_config") is None
    with torch.no_grad():
        before = base(**ids).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "a" / "adapter").eval()
        assert sum(is_quantized(weight) for weight in adapted.parameters()) == 12
        expected = merged(**ids).logits
        assert (expected - before).abs().max() > 1e-3
        torch.testing.assert_close(adapted(**ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_is_refused(run_arguments, run_inside, tmp_path, monkeypatch):
    problems = check_values(parse_args(["--model_name_or_path", "a", "--lora_dim", "4", "--quantize_base", "nf4"]))
    assert any("--quantize_base needs --lora_dim above 0 and --only_optimize_lora" in problem for problem in problems)
    settings = tmp_path / "ds.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    status, printed, error = run_inside([*run_arguments, *QLORA, "--deepspeed_config", settings])
    assert status == 2 and "--quantize_base can't be used with ZeRO 3" in error and "Model:" not in printed
    check_quantization("nf4", 2)
    with pytest.raises(UserError, match="Linear ones"):
        quantized_names(make("gpt2"))
    with pytest.raises(UserError, match="16 inputs, no multiple of 64"):
        quantized_names(make("llama"), on_cpu=True)
    assert quantized_names(make("llama"))
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    check_quantization(None, 3)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        check_quantization("nf4", 0)
