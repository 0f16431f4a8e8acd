"""Folders that hold a model in another form, or a part of one: one message that says what is there and what to do."""

import json
import shutil

import pytest
import torch
from conftest import make_tiny_opt
from safetensors.torch import load_file, save_file

from utils.arguments.places import check_model_folder
from utils.errors import UserError
from utils.model.checkpoint import check_weights
from utils.model.model_utils import load_model_config

FILES = {
    "gguf": (["model-Q4_K_M.gguf"], "(model-Q4_K_M.gguf) are llama.cpp's (GGUF), made for answering; give the model"),
    "consolidated": (["consolidated.00.pth", "params.json"], "(consolidated.00.pth) are in its publisher's own format"),
    "deepspeed": (["zero_to_fp32.py", "latest"], "(zero_to_fp32.py) are a checkpoint of DeepSpeed; `python zero_to_fp"),
    "fsdp": (["__0_0.distcp", "__1_0.distcp"], "are a sharded checkpoint of PyTorch; merge it with `accelerate merge"),
    "tensorflow": (["tf_model.h5"], "are TensorFlow's or Flax's; give the copy with safetensors"),
    "onnx": (["model.onnx"], "are ONNX's, made for answering"),
    "nothing": (["training_args.txt"], "it is not complete"),
}


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize("kind", FILES)
def test_weights_of_another_kind_are_named(kind, has_config, tiny_opt, tmp_path):
    names, words = FILES[kind]
    for name in names:
        (tmp_path / name).write_bytes(b"weights")
    if has_config:
        shutil.copy(tiny_opt / "config.json", tmp_path)
    with pytest.raises(UserError) as caught:
        check_model_folder(str(tmp_path), needs_weights=True)
    said = str(caught.value)
    assert ("no weights (*.safetensors or *.bin)" if has_config else "no config.json in the model folder") in said
    assert words in said or (kind == "nothing" and not has_config)


@pytest.mark.parametrize("below", ["checkpoint-10", "snapshots/0a1b2c", "0_Transformer"])
def test_a_folder_above_the_model_says_where_it_is(below, tiny_opt, tmp_path):
    shutil.copytree(tiny_opt, tmp_path / below)
    with pytest.raises(UserError, match=f"no config.json in the model folder .* There is one in {tmp_path}/{below}\\."):
        check_model_folder(str(tmp_path), needs_weights=True)


ADAPTERS = {
    "prefix": ({"peft_type": "PREFIX_TUNING", "base_model_name_or_path": "some/base"}, "can't be merged into weights"),
    "prompt": ({"peft_type": "PROMPT_TUNING", "base_model_name_or_path": "some/base"}, "Give the base model"),
    "moved": ({"peft_type": "LORA", "base_model_name_or_path": "/gone/base"}, "/gone/base is not there"),
    "nameless": ({"peft_type": "LORA", "base_model_name_or_path": None}, "a base model that it does not name"),
    "broken": ([], "is a PEFT adapter"),
    "usual": (
        {"peft_type": "LORA", "use_dora": True, "base_model_name_or_path": "some/base"},
        "give that. `pip install",
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_advice_for_an_adapter_is_what_its_kind_allows(kind, tmp_path):
    content, words = ADAPTERS[kind]
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        load_model_config(str(tmp_path))
    assert words in str(caught.value)
    assert ("merge_and_unload" in str(caught.value)) == (kind not in ("prefix", "prompt"))


def test_a_broken_configuration_is_reported_once(run_inside, run_arguments, tiny_opt, tmp_path):
    """The tokenizer can't be loaded without it either, which is the same mistake."""
    folder = shutil.copytree(tiny_opt, tmp_path / "broken")
    (folder / "config.json").write_text("{")
    status, _, error = run_inside([*run_arguments, "--model_name_or_path", folder])
    assert status == 2 and "problems:" not in error, error
    assert "no usable model configuration" in error and "the tokenizer of" not in error


def test_another_architecture_in_the_configuration_is_said(tmp_path, capsys):
    folder = make_tiny_opt(tmp_path / "opt")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["OPTForSequenceClassification"]}))
    check_weights(str(folder), load_model_config(str(folder)))
    said = capsys.readouterr().out
    assert "config.json names OPTForSequenceClassification; it is loaded as OPTForCausalLM" in said


def changed_names(source, folder, change):
    """A copy of a model folder whose weights have other names or dtypes."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(dict(change(name, weight) for name, weight in weights.items()), folder / "model.safetensors")
    return folder


WEIGHTS = {
    "fsdp": (
        lambda n, w: (n.replace(".fc1.", "._fsdp_wrapped_module.fc1."), w),
        "have '_fsdp_wrapped_module.' in them",
    ),
    "lora": (lambda n, w: (n.replace("q_proj.", "q_proj.base_layer."), w), "save what merge_and_unload() returns"),
    "reward": (lambda n, w: (n.replace("model.", "rwtransformer.", 1), w), "It is a reward model"),
    "gptq": (lambda n, w: (n.replace("fc1.weight", "fc1.qweight"), w), "Its weights are quantized"),
    "integers": (lambda n, w: (n, w.to(torch.int32) if "fc1.weight" in n else w), "2 weights of .* as whole numbers"),
    "int8": (lambda n, w: (n, w.to(torch.int8) if "fc1.weight" in n else w), "2 weights of .* in 8 bits"),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_advice_for_weights_that_do_not_fit(kind, tiny_opt, tmp_path):
    change, words = WEIGHTS[kind]
    folder = changed_names(tiny_opt, tmp_path / "changed", change)
    with pytest.raises(UserError, match=words.replace("()", r"\(\)")):
        check_weights(str(folder), load_model_config(str(folder)))


def test_a_model_without_a_head_is_named_as_such(tmp_path):
    """As sentence-transformers and reward models are saved, with or without an embedding that is the head too."""
    folder = make_tiny_opt(tmp_path / "opt", tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight for name, weight in weights.items() if "lm_head" not in name}, folder / "model.safetensors")
    with pytest.raises(UserError, match="What is missing is the head alone"):
        check_weights(str(folder), load_model_config(str(folder)))


@pytest.mark.parametrize("entry", ["module", "model", "state_dict"])
def test_weights_inside_an_entry_of_a_checkpoint(entry, tiny_opt, tmp_path):
    folder = shutil.copytree(tiny_opt, tmp_path / "trainer")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({entry: weights, "step": 3}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=f"its weights lie in its entry '{entry}'"):
        check_weights(str(folder), load_model_config(str(folder)))


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "weights.safetensors", "model-00001-of-00002.safetensors"])
def test_files_of_weights_under_other_names(name, tiny_opt, tmp_path):
    folder = shutil.copytree(tiny_opt, tmp_path / "named")
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(UserError, match=f"the weights there \\({name}\\) are not under the names"):
        check_weights(str(folder), load_model_config(str(folder)))
