"""Saved models: what plain transformers loads is what was trained, complete or absent, and live weights stay."""

import json
import re
import resource
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import make_json_data, make_tiny_opt
from fork_runs import finished_run
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from tools.tiny_families import tiny_config, tiny_model
from utils.errors import UserError
from utils.export.hf_model import save_hf_format, save_model_folder, save_zero_three_model, write_weights
from utils.export.merged import compare_merged
from utils.export.verify import live_logits, verify_saved_model
from utils.model.model_utils import create_hf_model
from utils.model.tokenizer import load_hf_tokenizer
from utils.module.lora import LinearLayer_LoRA, convert_linear_layer_to_lora

IDS = torch.arange(5, 40)[None]


@pytest.fixture
def tokenizer(tiny_opt):
    return load_hf_tokenizer(str(tiny_opt))


@pytest.fixture
def model(tiny_opt, tokenizer):
    return create_hf_model(AutoModelForCausalLM, str(tiny_opt), tokenizer)


def with_lora(model: nn.Module, name: str = "decoder.layers.") -> nn.Module:
    """The model with LoRA that adds something."""
    convert_linear_layer_to_lora(model, name, 4, lora_scaling=2)
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, LinearLayer_LoRA):
            nn.init.normal_(module.lora_left_weight, std=0.5)
    return model


def untied_llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=1816, tie_word_embeddings=False,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def small_files():
    """Lets no file grow beyond so many bytes, as on a full disk; the returned function sets the limit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ------------------------------------------------------------------------------------------- contents


@pytest.mark.parametrize("make", ["tied", "untied", "lora"])
def test_sharded_is_the_same_as_in_one_file(make, model, tmp_path):
    model = {"tied": lambda: model, "untied": untied_llama, "lora": lambda: with_lora(model)}[make]()
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    limit = 100_000
    for folder, size in ((whole, "1GB"), (sharded, "100KB")):
        folder.mkdir()
        model.config.save_pretrained(folder)
        write_weights(model, folder, is_writer=True, max_shard_size=size)
    assert [file.name for file in whole.glob("model*")] == ["model.safetensors"]
    one = load_file(whole / "model.safetensors")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    shards = {file.name: load_file(file) for file in sharded.glob("*.safetensors")}
    assert len(shards) > 2 and set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    assert {name: file for file, tensors in shards.items() for name in tensors} == index["weight_map"]
    assert all(torch.equal(shards[file][name], one[name]) for name, file in index["weight_map"].items())
    for tensors in shards.values():
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
    assert ("lm_head.weight" in one) == (make == "untied")
    assert not any("lora" in name for name in one)
    for folder in (whole, sharded):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(live_logits(loaded, IDS), live_logits(model, IDS), rtol=1e-4, atol=1e-4)
        assert loaded.config.tie_word_embeddings == (make != "untied")


def test_the_folder_has_all_that_plain_transformers_needs(model, tokenizer, tmp_path):
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    args = Namespace(output_dir=str(tmp_path))
    for _ in range(2):  # the second replaces the first, with a folder of templates in it
        folder = save_hf_format(model, tokenizer, args)
    assert folder == str(tmp_path)
    assert save_hf_format(model, tokenizer, args, "sub") == str(tmp_path / "sub")
    for place in (tmp_path, tmp_path / "sub"):
        names = {file.name for file in place.iterdir()}
        assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
        again = AutoTokenizer.from_pretrained(place)
        assert again("Human: x</s>")["input_ids"] == tokenizer("Human: x</s>")["input_ids"]
        assert (again.pad_token, again.eos_token, again.chat_template) == ("<pad>", "</s>", tokenizer.chat_template)
        loaded = AutoModelForCausalLM.from_pretrained(place)
        assert (loaded.generation_config.eos_token_id, loaded.generation_config.pad_token_id) == (2, 1)
        assert loaded.dtype == torch.float32
        assert (place / "model.safetensors").stat().st_mode & 0o777 == (place / "config.json").stat().st_mode & 0o777


def test_weights_alone(model, tmp_path):
    save_zero_three_model(with_lora(model), 0, str(tmp_path / "new"), zero_stage=3)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["model.safetensors"]
    weights = load_file(tmp_path / "new" / "model.safetensors")
    assert not any("lora" in name for name in weights)
    plain = AutoModelForCausalLM.from_config(model.config)
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    torch.testing.assert_close(live_logits(plain, IDS), live_logits(model, IDS), rtol=1e-4, atol=1e-4)


def test_saving_in_mid_run_changes_no_live_weight(model, tokenizer, tmp_path):
    model = with_lora(model).train().to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model_folder(model, tokenizer, str(tmp_path))
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert model.training
    assert not any(module.fuse_lora for module in model.modules() if isinstance(module, LinearLayer_LoRA))


def test_lora_is_merged_in_float32(model, tokenizer, tmp_path):
    """A bf16 model's merged weight is the bf16 number nearest to the exact sum, not a sum of rounded parts."""
    model = with_lora(model).to(torch.bfloat16)
    save_model_folder(model, tokenizer, str(tmp_path))
    saved = load_file(tmp_path / "model.safetensors")
    exact_is_needed = 0
    for name, module in model.named_modules():
        if isinstance(module, LinearLayer_LoRA):
            right, left = module.lora_right_weight.detach(), module.lora_left_weight.detach()
            exact = module.weight.double() + (right.double() @ left.double()).t() * module.lora_scaling
            assert (saved[f"{name}.weight"] != exact.to(torch.bfloat16)).float().mean() < 1e-3
            rounded = module.weight + (right @ left).t() * module.lora_scaling
            exact_is_needed += (rounded != exact.to(torch.bfloat16)).sum().item()
    assert exact_is_needed > 1000
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert verify_saved_model(str(tmp_path), IDS, live_logits(model, IDS)) < 0.05


# ------------------------------------------------------------------------------------------ verification


def test_verification_rejects_other_weights(model, tokenizer, tmp_path):
    folder = str(tmp_path)
    save_model_folder(model, tokenizer, folder)
    expected = live_logits(model, IDS)
    assert verify_saved_model(folder, IDS, expected) < 1e-5
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight *= 2
    changed = live_logits(model, IDS)
    for wrong in (changed, expected[..., :-8], torch.full_like(expected, torch.nan)):
        with pytest.raises(UserError, match="not the trained one"):
            verify_saved_model(folder, IDS, wrong)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="does not load"):
        verify_saved_model(folder, IDS, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["opt", "gpt2", "hrm_text"])
def test_merged_weights_are_compared_with_the_layers_own_forward(family, dtype, tokenizer, tmp_path):
    """Linear, Conv1D, and a family that is published with q, k and v in one tensor: any other merging is found."""
    model = with_lora(tiny_model(tiny_config(family)), "auto").to(dtype)
    layers = [module for module in model.modules() if isinstance(module, LinearLayer_LoRA)]
    written = save_model_folder(model, tokenizer, str(tmp_path))
    assert compare_merged(model, str(tmp_path), written) == len(layers)
    scale = layers[0].lora_scaling
    layers[0].lora_scaling = scale * (1.01 if dtype == torch.float32 else 1.1)
    with pytest.raises(UserError, match=r"1 merged weights are not what the layers with LoRA compute \(.*weight by "):
        compare_merged(model, str(tmp_path), written)
    layers[0].lora_scaling = scale
    with torch.no_grad():
        layers[-1].lora_left_weight[1, 2] += 0.2  # one number of one layer
    with pytest.raises(UserError, match="1 merged weights"):
        compare_merged(model, str(tmp_path), written)


# ----------------------------------------------------------------------------------------------- failure


@pytest.mark.parametrize("limit", [50_000, 200_000], ids=["while the tokenizer", "while the weights"])
@pytest.mark.parametrize("earlier", [True, False], ids=["over an earlier model", "new"])
def test_a_full_disk_leaves_the_earlier_model_or_nothing(limit, earlier, model, tokenizer, small_files, tmp_path):
    folder = tmp_path / "model"
    if earlier:
        save_model_folder(model, tokenizer, str(folder))
    before = contents(tmp_path)
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight *= 2
    small_files(limit)
    with pytest.raises(UserError, match="can't be saved"):
        save_model_folder(model, tokenizer, str(folder))
    assert contents(tmp_path) == before and folder.exists() == earlier
    small_files(resource.RLIM_INFINITY)
    save_model_folder(model, tokenizer, str(folder))
    assert verify_saved_model(str(folder), IDS, live_logits(model, IDS)) < 1e-5


def test_a_file_where_the_folder_should_be(model, tokenizer, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="can't be saved"):
        save_model_folder(model, tokenizer, str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


def test_fewer_shards_than_before_leave_no_old_ones(model, tokenizer, tmp_path):
    save_model_folder(model, tokenizer, str(tmp_path), max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    save_model_folder(model, tokenizer, str(tmp_path))
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert not (tmp_path / "model.safetensors.index.json").exists()


# ------------------------------------------------------------------------------------------------ ZeRO 3


def save_twice(argv: list[str]) -> None:
    """main.py that saves in mid-run too, and says what that changed; the last argument is a folder."""
    import deepspeed
    import torch.distributed as dist

    import main

    def whole(module):
        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    publish = main.save_final_model

    def save(engine, tokenizer, *rest):
        before = whole(engine.module)
        # The embedding is whole on both ranks and the same, the new rows included.
        rows = before["model.decoder.embed_tokens.weight"]
        both = [torch.empty_like(rows) for _ in range(2)]
        dist.all_gather(both, rows)
        save_model_folder(engine.module, tokenizer, argv[-1] + "/mid-run")
        after = whole(engine.module)
        kept = all(torch.equal(before[name], after[name]) for name in before)
        if dist.get_rank() == 0:
            print("ROWS", len(rows), torch.equal(*both), "KEPT", kept, flush=True)
        publish(engine, tokenizer, *rest)

    main.save_final_model = save
    main.run(argv[:-1])


def test_zero_3_on_two_ranks_with_lora_and_new_rows(tmp_path):
    """Grown to a multiple of 8 with the same rows everywhere; a save in mid-run touches no weight; reloaded equal."""
    base = make_tiny_opt(tmp_path / "base", vocab_size=1800)  # the tokenizer has 1809 entries
    data = make_json_data(tmp_path, 12, 5)
    out = tmp_path / "out"
    printed = finished_run(
        [
            "--model_name_or_path", base, "--data_path", data, "--data_split", "10,0,0", "--data_output_path",
            tmp_path / "cache", "--max_seq_len", "64", "--dtype", "fp32", "--zero_stage", "3", "--lora_dim", "4",
            "--lora_learning_rate", "1e-1", "--per_device_train_batch_size", "2", "--output_dir", out, tmp_path,
        ],
        ranks=2,
        program=save_twice,
    )  # fmt: skip
    assert "ROWS 1816 True KEPT True" in printed
    assert re.search(r"verified: reloaded logits differ by (\S+) of", printed)
    final, mid_run = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "mid-run"))
    assert final.keys() == mid_run.keys() and all(torch.equal(final[name], mid_run[name]) for name in final)
    before = load_file(base / "model.safetensors")
    assert final.keys() == before.keys(), "LoRA is merged"
    merged = final["model.decoder.layers.0.fc1.weight"] - before["model.decoder.layers.0.fc1.weight"]
    assert torch.linalg.matrix_rank(merged, rtol=1e-3) in range(1, 5)
    assert final["model.decoder.embed_tokens.weight"].shape[0] == 1816
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == 1816
    # New rows are neither zero nor copies of each other.
    new = model.get_input_embeddings().weight[1800:]
    assert new.norm(dim=1).min() > 0 and len(new.unique(dim=0)) == 16


def test_copied_folder_loads_elsewhere(model, tokenizer, tmp_path):
    """Nothing in the folder points back to where it came from."""
    save_model_folder(model, tokenizer, str(tmp_path / "a"))
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert verify_saved_model(str(tmp_path / "b"), IDS, live_logits(model, IDS)) < 1e-5
    assert str(tmp_path) not in (tmp_path / "b" / "config.json").read_text()
