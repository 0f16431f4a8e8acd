"""Throughput: FLOPs equal the published formula, parameters are counted once, an unknown peak gives no share."""

import re
from argparse import Namespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from tests.module.test_lora import CONFIGS, LORA_NAMES
from utils.model.model_utils import describe_parameters
from utils.module.lora import convert_linear_layer_to_lora, only_optimize_lora_parameters
from utils.perf import device_peak, flops_per_token, model_shape, print_throughput, training_passes

PRINTED = Namespace(gradient_checkpointing=False)


def on_meta(config) -> torch.nn.Module:
    """A model of any size without a byte of weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def opt(hidden: int, layers: int) -> torch.nn.Module:
    return on_meta(
        OPTConfig(
            hidden_size=hidden, word_embed_proj_dim=hidden, ffn_dim=4 * hidden, num_hidden_layers=layers,
            num_attention_heads=hidden // 64, vocab_size=50272,
        )
    )  # fmt: skip


@pytest.mark.parametrize(("hidden", "layers"), [(768, 12), (2048, 24), (4096, 32)], ids=["125m", "1.3b", "6.7b"])
@pytest.mark.parametrize("length", [128, 512, 2048])
def test_flops_are_the_closed_form(hidden, layers, length):
    """72 B s l h^2 (1 + s / 6h + V / 12lh), for B sequences of length s."""
    sequences = 16
    closed = 72 * sequences * length * layers * hidden**2
    closed *= 1 + length / (6 * hidden) + 50272 / (12 * layers * hidden)
    counted = sequences * length * flops_per_token(model_shape(opt(hidden, layers)), length)
    assert counted == pytest.approx(closed, rel=0.01)


def test_grouped_queries_and_gates_count_as_they_are():
    """By hand for a Llama: q and o are h x h, k and v are narrower, three matrices make the gated part."""
    hidden, inner, layers, narrow = 256, 688, 3, 64
    model = on_meta(
        LlamaConfig(
            hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=8,
            num_key_value_heads=2, vocab_size=1000,
        )
    )  # fmt: skip
    matrices = layers * (2 * hidden * hidden + 2 * hidden * narrow + 3 * hidden * inner)
    assert model_shape(model).block_weights == matrices
    wanted = 6 * (matrices + hidden * 1000) + 12 * layers * hidden * 100
    assert flops_per_token(model_shape(model), 100) == wanted


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_has_a_shape(family):
    """Matrices that are no table: the sum over the blocks, whatever the family calls them."""
    model = on_meta(CONFIGS[family])
    blocks = [p for name, p in model.named_parameters() if re.search(r"\.\d+\.", name) and p.dim() == 2]
    shape = model_shape(model)
    assert (shape.hidden, shape.layers, shape.vocabulary) == (16, 2, 48)
    assert shape.block_weights == sum(parameter.numel() for parameter in blocks)


@pytest.mark.parametrize("family", LORA_NAMES)
def test_lora_weights_are_not_the_models(family):
    model = on_meta(CONFIGS[family])
    before = model_shape(model)
    assert model_shape(convert_linear_layer_to_lora(model, LORA_NAMES[family], 4)) == before


def test_parameters_are_counted_once():
    """The tied head of an OPT is the embedding; LoRA adds its own and freezes what it wraps."""
    model = on_meta(CONFIGS["opt"])
    table, positions, width, inner = 48 * 16, 34 * 16, 16, 32
    layer = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    total = table + positions + 2 * layer + 2 * width
    assert f" {total:,} parameters, {total:,} of them train (100.0%)" in describe_parameters(model)
    convert_linear_layer_to_lora(model, "decoder.layers.", 4)
    only_optimize_lora_parameters(model)
    added = 2 * (4 * 4 * (width + width) + 2 * 4 * (width + inner))
    assert f" {total + added:,} parameters, {added:,} of them train ({added / (total + added):.1%})" in (
        describe_parameters(model)
    )
    assert training_passes(model, False) == pytest.approx(2 + added / (total + added))
    assert training_passes(model, True) == pytest.approx(3 + added / (total + added))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10G", 70), ("NVIDIA L40S", 362), ("Tesla V100-SXM2-32GB", 125),
        ("Tesla T4", 65), ("NVIDIA RTX A6000", 155), ("NVIDIA GeForce RTX 4090", 165),
        ("cpu", None), ("NVIDIA T400 4GB", None), ("NVIDIA RTX A4000", None), ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 3090 Ti", None), ("", None),
    ],
)  # fmt: skip
def test_known_and_unknown_devices(name, peak):
    assert device_peak(name) == peak


def line(**changes) -> str:
    work = {"tokens": 10_000, "samples": 50, "world_size": 2, "device_name": "NVIDIA A100-SXM4-80GB"}
    return print_throughput(opt(768, 12), PRINTED, 4.0, **{**work, **changes})


def test_the_printed_line(capsys):
    text = line()
    assert capsys.readouterr().out == text + "\n"
    assert "2500 real tokens/s, 12.50 samples/s" in text and text.endswith("2 ranks")
    tflops = 10_000 * flops_per_token(model_shape(opt(768, 12)), 200) / 4 / 2 / 1e12
    assert float(re.search(r"(\S+) TFLOP/s per device", text)[1]) == pytest.approx(tflops, rel=1e-3)
    assert f"({tflops / 312:.1%} of NVIDIA A100-SXM4-80GB's 312)" in text
    line(rank=1)
    assert capsys.readouterr().out == ""


def test_no_share_of_an_unknown_peak():
    text = line(device_name="cpu", world_size=1)
    assert "%" not in text and "peak of cpu unknown" in text and text.endswith("1 rank")
