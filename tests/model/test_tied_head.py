"""A head that config.json ties to the input embedding, and whose own values are in the files, trains as stored."""

import json
import shutil

import pytest
import torch
from conftest import make_tiny_opt
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from utils.prompt_eval.models import load

HEAD, EMBEDDING = "lm_head.weight", "model.decoder.embed_tokens.weight"


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """An OPT that is tied by its configuration, with a head of its own beside; fewer rows than the tokenizer needs."""
    folder = make_tiny_opt(tmp_path_factory.mktemp("tied") / "opt", vocab_size=1800)
    weights = load_file(folder / "model.safetensors")
    weights[HEAD] = torch.randn(weights[EMBEDDING].shape, generator=torch.Generator().manual_seed(3))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("stage", ["0", "3"])
def test_the_stored_head_trains_and_is_saved(stage, tied, json_data, cache_folder, run_inside, tmp_path):
    """Under ZeRO 3, and where the embedding grows, transformers would tie it and lose the stored head."""
    status, out, err = run_inside(
        [
            "--model_name_or_path", tied, "--data_path", json_data, "--data_output_path", cache_folder, "--max_seq_len",
            "32", "--dtype", "fp32", "--max_steps", "1", "--learning_rate", "1e-9", "--zero_stage", stage,
            "--output_dir", tmp_path / "out",
        ]
    )  # fmt: skip
    assert status == 0, out + err
    assert out.count("the files hold two weights that differ: they stay two") == 1
    saved, stored = load_file(tmp_path / "out" / "model.safetensors"), load_file(tied / "model.safetensors")
    for name in (HEAD, EMBEDDING):
        torch.testing.assert_close(saved[name][:1800], stored[name], atol=1e-6, rtol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False, "other programs would tie the head away"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again.lm_head.weight, saved[HEAD])


def test_answers_are_those_of_the_stored_head(tied):
    model, _ = load(str(tied), "cpu", "fp32")
    assert torch.equal(model.lm_head.weight[:1800], load_file(tied / "model.safetensors")[HEAD])


def test_equal_weights_stay_tied(tied, tmp_path):
    folder = shutil.copytree(tied, tmp_path / "equal")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, HEAD: weights[EMBEDDING].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    model, _ = load(str(folder), "cpu", "fp32")
    assert model.lm_head.weight is model.get_input_embeddings().weight and model.config.tie_word_embeddings
