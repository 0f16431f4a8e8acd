"""The main job with real texts and OPT's real tokenizer: trains, perplexity falls, the result loads and generates."""

import shutil

import pytest
import torch
from conftest import SHARED, needs_shared
from fork_runs import finished_run
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

from tests.train.test_training import perplexities_of

pytestmark = needs_shared


@pytest.fixture(scope="module")
def real_opt(tmp_path_factory):
    """A random OPT of 128 x 2 with nothing but OPT's vocabulary and merges beside it."""
    folder = tmp_path_factory.mktemp("opt")
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=128, word_embed_proj_dim=128, ffn_dim=512, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder)
    for file in ("vocab.json", "merges.txt"):
        shutil.copyfile(SHARED / "opt_tokenizer" / file, folder / file)
    return folder


@pytest.mark.parametrize(
    "more",
    [
        ["--zero_stage", "2"],
        ["--lora_dim", "8", "--only_optimize_lora", "--gradient_checkpointing", "--lora_learning_rate", "1e-2"],
    ],
    ids=["all", "lora"],
)
def test_rm_static(more, real_opt, tmp_path):
    printed = finished_run(
        [
            "--model_name_or_path", real_opt, "--data_path", SHARED / "hub" / "Dahoas" / "rm-static", "--data_split",
            "1,4,5", "--data_output_path", tmp_path / "cache", "--output_dir", tmp_path / "out", "--dtype", "fp32",
            "--max_seq_len", "128", "--per_device_train_batch_size", "8", "--seed", "1234", *more,
        ]
    )  # fmt: skip
    assert "every sample ends with '</s>'" in printed
    (before, _), (after, _) = perplexities_of(printed)
    assert after < before * (0.98 if "--only_optimize_lora" in more else 0.5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("Human: Hello Assistant:", return_tensors="pt")
    assert ids["input_ids"][0, 0] == 2  # OPT's BOS, which vocabulary and merges alone would lose
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    # The published split files, for the phases trained elsewhere.
    assert len(list((tmp_path / "cache").glob("Dahoas_rm_static_seed1234_train_1,4,5_*.npy"))) == 3
