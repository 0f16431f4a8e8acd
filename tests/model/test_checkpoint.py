"""A checkpoint that is not what it seems ends with status 2 before data are prepared; a good one is not refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_tiny_opt
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MptConfig,
    T5Config,
)

import prompt_eval
from tools import merge_lora
from utils.errors import UserError
from utils.model.checkpoint import check_weights, stored_weights
from utils.model.config_values import max_positions
from utils.model.model_utils import create_hf_model, load_model_config
from utils.model.tokenizer import load_hf_tokenizer

VOCABULARY = {"vocab_size": 1816, "bos_token_id": 2, "pad_token_id": 1, "eos_token_id": 2}
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A random Llama, whose head is not tied."""
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, **VOCABULARY)
    return save(config, folder)


def save(config, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt").save_pretrained(folder)
    return folder


def changed(source: Path, folder: Path, change: Callable[[Weights], Weights]) -> Path:
    """A copy of a model folder with other weights."""
    shutil.copytree(source, folder)
    weights = change(load_file(folder / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def edited(source: Path, folder: Path, **entries) -> Path:
    """A copy of a model folder with other entries in its config.json."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))
    return folder


def with_lora(weights: Weights) -> Weights:
    torch.manual_seed(1)
    extra = {}
    for name, tensor in weights.items():
        if "mlp" in name:
            extra[name.replace("weight", "lora_right_weight")] = torch.randn(tensor.shape[1], 4)
            extra[name.replace("weight", "lora_left_weight")] = torch.randn(4, tensor.shape[0])
    return {**weights, **extra}


def refused(run: tuple[int, str, str], words: list[str]) -> None:
    """The run ended with status 2 and one message with these words, before data were prepared."""
    status, out, err = run
    assert status == 2, out + err
    assert "Traceback" not in err and "ppl" not in out and "Data:" not in out
    for word in words:
        assert word in err, err


WEIGHTS = {
    "compiled": (lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}, ["21 of", "'_orig_mod.'", "torch.compile"]),
    "wrapped": (lambda w: {f"module.{k}": v for k, v in w.items()}, ["21 weights have no place", "'module.'"]),
    "layer": (lambda w: {k: v for k, v in w.items() if "layers.1." not in k}, ["9 of", "model.layers.1.", "missing"]),
    "head": (lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"}, ["1 of", "(lm_head.weight)"]),
    "extra": (lambda w: {**w, "model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32)}, ["no place", "layers.2."]),
    "vocabulary": (
        lambda w: {k: torch.zeros(900, 32) if v.shape[0] == 1816 else v for k, v in w.items()},
        ["2 have other shapes", "lm_head.weight is [900, 32] in the files and [1816, 32] in the model"],
    ),
    "8 bits": (lambda w: {k: v.to(torch.float8_e4m3fn) for k, v in w.items()}, ["21 weights of", "stored in 8 bits"]),
    "lora": (with_lora, ["12 weights have no place", "lora_left_weight", "tools.merge_lora"]),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_do_not_fit(kind, llama, json_data, cache_folder, run_inside, tmp_path, capfd):
    change, words = WEIGHTS[kind]
    folder = changed(llama, tmp_path / "bad", change)
    arguments = ["--model_name_or_path", folder, "--data_path", json_data, "--data_output_path", cache_folder]
    stage = "3" if kind in ("compiled", "extra") else "0"
    refused(run_inside([*arguments, "--max_seq_len", "64", "--zero_stage", stage]), words)
    pair = ["--model_name_or_path_baseline", str(llama), "--model_name_or_path_finetune", str(folder)]
    with pytest.raises(SystemExit) as stop:
        prompt_eval.run(pair)
    assert stop.value.code == 2
    printed = capfd.readouterr()
    assert all(word in printed.err for word in words) and "Assistant:" not in printed.out
    # Also for scripts of their own, which call neither program.
    with pytest.raises(UserError, match=r"does not fit|in 8 bits"):
        create_hf_model(AutoModelForCausalLM, str(folder), load_hf_tokenizer(str(folder)))


def test_files_that_did_not_change_are_compared_once(llama, tmp_path, monkeypatch, capsys):
    """Between check and loading nothing is read again, but what is left out is said; a touched file is read again."""
    folder = changed(llama, tmp_path / "once", lambda weights: {**weights, "v_head.weight": torch.zeros(1, 32)})
    reads, read = [], stored_weights
    monkeypatch.setattr("utils.model.checkpoint.stored_weights", lambda name: reads.append(name) or read(name))
    config = load_model_config(str(folder))
    check_weights(str(folder), config, tell=False)
    assert "v_head" not in capsys.readouterr().out
    assert "v_head.weight" in check_weights(str(folder), config) and len(reads) == 1
    assert "the head of another task is left out: v_head.weight" in capsys.readouterr().out
    (folder / "model.safetensors").touch()
    check_weights(str(folder), config)
    assert len(reads) == 2


def test_a_bin_file_is_read_as_well(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "bin")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    config = load_model_config(str(folder))
    check_weights(str(folder), config)
    torch.save({f"module.{name}": tensor for name, tensor in weights.items()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"begin with 'module\.'"):
        check_weights(str(folder), config)
    for content in (AutoModelForCausalLM.from_pretrained(llama), None):  # a whole model, and no file of torch's
        torch.save(content, folder / "pytorch_model.bin")
        if content is None:
            (folder / "pytorch_model.bin").write_bytes(b"garbage" * 99)
        with pytest.raises(UserError, match=r"no file of weights, or holds more than weights"):
            check_weights(str(folder), config)
    (folder / "pytorch_model.bin").unlink()
    index = {"weight_map": {"a": "pytorch_model-1-of-2.bin", "b": "pytorch_model-2-of-2.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="lacks 2 of the 2 files"):
        check_weights(str(folder), config)


def pointer(folder: Path) -> Path:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    return folder


def written(base: Path, folder: Path, name: str, text: str) -> Path:
    """A copy of a model folder with this content in one of its files."""
    shutil.copytree(base, folder)
    (folder / name).write_text(text)
    return folder


def adapter(folder: Path) -> Path:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    return folder


FOLDERS = {
    "pointer": (lambda base, folder: pointer(shutil.copytree(base, folder)), ["git-lfs pointers", "git lfs pull"]),
    "adapter": (lambda base, folder: adapter(shutil.copytree(base, folder)), ["PEFT adapter of some/base", "merge"]),
    **{
        method: (
            lambda base, folder, method=method: edited(base, folder, quantization_config={"quant_method": method}),
            ["quantized", method],
        )
        for method in ("gptq", "awq", "bitsandbytes", "fp8")
    },
    "own code": (
        lambda base, folder: edited(
            base, folder, model_type="newest", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}
        ),
        ["Python code of its own", "--trust_remote_code"],
    ),
    "t5": (lambda base, folder: edited(base, folder, **T5Config(**VOCABULARY).to_dict()), ["encoder with a decoder"]),
    "bart": (lambda base, folder: edited(base, folder, **BartConfig().to_dict()), ["encoder with a decoder"]),
    "list": (lambda base, folder: written(base, folder, "config.json", "[]"), ["no usable model configuration"]),
    "text for a size": (lambda base, folder: edited(base, folder, hidden_size="32"), ["'hidden_size' expected int"]),
    "no heads": (lambda base, folder: edited(base, folder, num_attention_heads=0), ["ZeroDivisionError"]),
    "no such dtype": (lambda base, folder: edited(base, folder, dtype="float17"), ["'float17'"]),
    "activation": (lambda base, folder: edited(base, folder, hidden_act="none"), ["no llama model that can be built"]),
    "generation": (
        lambda base, folder: written(base, folder, "generation_config.json", "{x"),
        ["can't be read as JSON"],
    ),
    "greedy": (
        lambda base, folder: written(base, folder, "generation_config.json", '{"num_return_sequences": 3}'),
        ["generation_config.json can't be used (Greedy methods"],
    ),
    "clip": (lambda base, folder: edited(base, folder, model_type="vit"), ["not a causal language model"]),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_holds_something_else(kind, llama, json_data, cache_folder, run_inside, tmp_path, capfd):
    make, words = FOLDERS[kind]
    folder = make(llama, tmp_path / "other")
    arguments = ["--model_name_or_path", folder, "--data_path", json_data, "--data_output_path", cache_folder]
    refused(run_inside(arguments), words)
    with pytest.raises(SystemExit) as stop:
        prompt_eval.run(["--interactive", "--model_name_or_path_finetune", str(folder)])
    assert stop.value.code == 2
    printed = capfd.readouterr()
    assert all(word in printed.err for word in words)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class C(LlamaConfig):
    model_type = "newest"

class M(LlamaForCausalLM):
    config_class = C
"""


def test_code_of_its_own_runs_where_it_is_trusted(llama, json_data, cache_folder, run_inside, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)  # a question would be an error
    folder = edited(
        llama, tmp_path / "own", model_type="newest", architectures=["M"],
        auto_map={"AutoConfig": "own_code.C", "AutoModelForCausalLM": "own_code.M"},
    )  # fmt: skip
    (folder / "own_code.py").write_text(OWN_CODE)
    arguments = ["--model_name_or_path", folder, "--data_path", json_data, "--data_output_path", cache_folder]
    status, out, err = run_inside(
        [
            *arguments, "--trust_remote_code", "--dtype", "fp32", "--max_steps", "1", "--max_seq_len", "32",
            "--output_dir", tmp_path / "out",
        ]
    )  # fmt: skip
    assert status == 0, out + err
    assert "Model: M, " in out and "verified" in out
    assert (tmp_path / "out" / "own_code.py").read_text() == OWN_CODE, "the saved model brings its code"


def test_what_is_no_weight_of_the_model_is_left_out_with_a_line(tmp_path, capsys):
    """Masks and frequencies that old versions stored, and the head of a reward model, are no reason to refuse."""
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **VOCABULARY)
    base = save(config, tmp_path / "gpt2")
    mask = torch.ones(64, 64, dtype=torch.bool).tril()[None, None]

    def as_published(weights: Weights) -> Weights:
        old = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
        for layer in range(2):
            old |= {f"h.{layer}.attn.bias": mask.clone(), f"h.{layer}.attn.masked_bias": torch.tensor(-1e4)}
        return {**old, "v_head.weight": torch.zeros(1, 32)}

    folder = changed(base, tmp_path / "old", as_published)
    tokenizer = load_hf_tokenizer(str(folder))
    capsys.readouterr()
    old, new = (create_hf_model(AutoModelForCausalLM, str(path), tokenizer) for path in (folder, base))
    assert all(torch.equal(tensor, new.state_dict()[name]) for name, tensor in old.state_dict().items())
    assert "the head of another task is left out: v_head.weight" in capsys.readouterr().out


def test_merge_lora_gives_the_model_that_was_trained(llama, tmp_path, capsys):
    folder = changed(llama, tmp_path / "lora", with_lora)
    merge_lora.main([str(folder), str(tmp_path / "merged")])
    assert "6 layers merged" in capsys.readouterr().out
    base, merged = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (llama, tmp_path / "merged"))
    halves = load_file(folder / "model.safetensors")
    for name, tensor in base.items():
        expected = tensor
        if "mlp" in name:
            right, left = (halves[name.replace("weight", f"lora_{side}_weight")] for side in ("right", "left"))
            expected = tensor + (right @ left).t() / 4
        torch.testing.assert_close(merged[name], expected)
    with pytest.raises(UserError, match="exists"):
        merge_lora.main([str(folder), str(tmp_path / "merged")])
    with pytest.raises(UserError, match="nothing to merge"):
        merge_lora.main([str(llama), str(tmp_path / "again")])


def test_an_encoder_is_not_trained_as_a_causal_model(json_data, cache_folder, run_inside, tmp_path):
    """BERT loads as a causal model and sees what it is to predict; with is_decoder it does not, and trains.

    In bfloat16 too, where what it sees of later tokens is less than what rounding changes elsewhere.
    """
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, **VOCABULARY}
    for decoder, dtype in ((False, "fp32"), (False, "bf16"), (True, "fp32"), (True, "bf16")):
        folder = save(BertConfig(**size, is_decoder=decoder), tmp_path / str(decoder))
        status, out, err = run_inside(
            [
                "--model_name_or_path", folder, "--data_path", json_data, "--data_output_path", cache_folder,
                "--max_seq_len", "32", "--dtype", dtype, "--max_steps", "1",
            ]
        )  # fmt: skip
        assert (status == 0) == decoder, out + err
        assert ("looks ahead" in err) != decoder and "Traceback" not in err


def test_positions_and_long_rope(tiny_opt, json_data, cache_folder, run_inside, tmp_path):
    assert max_positions(MptConfig(max_seq_len=77)) == 77
    scaling = {
        "rope_type": "longrope", "rope_theta": 1e4, "long_factor": [2.0] * 4, "short_factor": [1.0] * 4,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = AutoConfig.for_model(
        "phi3", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=256, rope_parameters=scaling, original_max_position_embeddings=64, **VOCABULARY,
    )  # fmt: skip
    folder = save(config, tmp_path / "phi3")
    arguments = ["--model_name_or_path", folder, "--data_path", json_data, "--data_output_path", cache_folder]
    refused(run_inside([*arguments, "--max_seq_len", "128"]), ["above 64 tokens", "long rope", "--padding longest"])
    assert make_tiny_opt(tmp_path / "opt", max_position_embeddings=64)
