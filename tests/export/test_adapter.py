"""`--save_lora_adapter`: PEFT loads the folder on the base model and gives what was trained, whatever trained it."""

import json
import re
import resource

import peft
import pytest
import torch
from conftest import ROOT, make_json_data, make_tiny_opt
from fork_runs import finished_run
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from tests.module.test_lora import LORA_NAMES, logits, make, train_lora
from utils.errors import UserError
from utils.export.peft_adapter import save_lora_adapter
from utils.module.lora import LinearLayer_LoRA, convert_linear_layer_to_lora, convert_lora_to_linear_layer


def with_adapter(family: str, names: str, folder) -> nn.Module:
    model = convert_linear_layer_to_lora(make(family), names, 4, lora_scaling=6, lora_droppout=0.1).eval()
    train_lora(model)
    save_lora_adapter(model, "some/base", str(folder))
    return model


@pytest.mark.parametrize(
    ("family", "names"),
    [*((family, "auto") for family in LORA_NAMES), ("gpt2", "h.1.mlp,h.0.attn.c_attn"), ("llama", "q_proj,lm_head")],
)
def test_peft_loads_the_adapter(family, names, tmp_path):
    """On the base model it gives the trained model's logits, wrapping just the layers that were, and merges to them."""
    trained = with_adapter(family, names, tmp_path)
    loaded = peft.PeftModel.from_pretrained(make(family), tmp_path)
    wrapped = {name for name, module in trained.named_modules() if isinstance(module, LinearLayer_LoRA)}
    prefix = "base_model.model."
    assert {name for name, module in loaded.named_modules() if hasattr(module, "lora_A")} == {
        prefix + n for n in wrapped
    }
    difference = (logits(trained) - logits(make(family))).abs().max()
    assert difference > 1e-3
    torch.testing.assert_close(logits(loaded), logits(trained), rtol=0, atol=1e-5 * max(1, difference.item()))
    merged = loaded.merge_and_unload()
    plain = convert_lora_to_linear_layer(trained)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_adapter_config(tmp_path):
    with_adapter("gpt2", "auto", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6, 0.1)
    assert isinstance(config["lora_alpha"], int) and config["fan_in_fan_out"]
    assert config["base_model_name_or_path"] == "some/base"
    assert config["target_modules"] == ["c_attn", "c_fc", "c_proj"], "short names where they are enough"
    # Every key is one PEFT knows, with the value PEFT's own configuration keeps.
    known = peft.LoraConfig.from_pretrained(tmp_path).to_dict()
    assert {key: known[key] for key in config} == {**config, "target_modules": set(config["target_modules"])}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_full_disk_leaves_the_earlier_adapter(tmp_path):
    model = with_adapter("llama", "auto", tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    train_lora(model)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(UserError, match="adapter can't be saved"):
            save_lora_adapter(model, "another/base", str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    save_lora_adapter(model, "another/base", str(tmp_path))
    assert sorted(before) == sorted(file.name for file in tmp_path.iterdir())
    assert "another/base" in (tmp_path / "adapter_config.json").read_text()


# ------------------------------------------------------------------------------------------ whole runs


def make_model(kind: str, folder) -> None:
    if kind == "opt":
        make_tiny_opt(folder)
        return
    vocabulary = {"vocab_size": 1816, "bos_token_id": 2, "pad_token_id": 1, "eos_token_id": 2}
    config = {
        "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **vocabulary),
        "llama": lambda: LlamaConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, **vocabulary
        ),
    }[kind]()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt").save_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "stage", "names", "layers"),
    [("opt", 1, "q_proj,layers.1.fc", 4), ("llama", 2, "auto", 14), ("gpt2", 3, "auto", 8)],
)
def test_two_ranks(kind, stage, names, layers, tmp_path):
    """The adapter on the base model gives the merged model's logits, before and after PEFT has merged it."""
    base, out = tmp_path / "base", tmp_path / "out"
    make_model(kind, base)
    # ZeRO 3 leaves parameters as small as these whole unless told otherwise.
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    printed = finished_run(
        [
            "--model_name_or_path", base, "--data_path", make_json_data(tmp_path, 12, 5), "--data_split", "10,0,0",
            "--data_output_path", tmp_path / "cache", "--max_seq_len", "64", "--dtype", "fp32", "--zero_stage", stage,
            "--lora_dim", "4", "--lora_module_name", names, "--lora_alpha", "8", "--lora_dropout", "0.1",
            "--only_optimize_lora", "--save_lora_adapter", "--lora_learning_rate", "5e-2",
            "--per_device_train_batch_size", "2", "--output_dir", out, "--deepspeed_config", config,
        ],
        ranks=2,
    )  # fmt: skip
    assert re.search(rf"LoRA: {layers} layers wrapped \(.*\), rank 4, scaling 2$", printed, re.MULTILINE)
    assert f"LoRA adapter saved to {out}/adapter" in printed
    assert sorted(file.name for file in (out / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    weights = load_file(out / "adapter" / "adapter_model.safetensors")
    assert len(weights) == 2 * layers and all(tensor.count_nonzero() for tensor in weights.values())
    before, merged = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (base, out))
    expected = logits(merged)
    assert (logits(before) - expected).abs().max() > 1e-2
    # As PEFT itself finds the base model: by the path in the adapter's configuration.
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(out / "adapter").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)
