"""A saved folder by what llama.cpp's converter and vLLM read of it: names, types, tokenizer, configuration.

gguf is the library of llama.cpp's converter: its table of tensor names and its reader of a tokenizer's files are what
the converter uses. The converter itself and vLLM are not installed here, so no model is converted or served.
"""

import json
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from fork_runs import finished_run
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, Qwen3Config

from tests.data.test_chat_format import CHATML

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "vocab_size": 1816, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 128, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
FAMILIES = {
    # Qwen 3 with an output layer of its own, and GPT-NeoX, whose names in memory are not the published ones.
    "qwen3": (
        Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False),
        gguf.MODEL_ARCH.QWEN3,
    ),
    "gpt_neox": (GPTNeoXConfig(**SIZES, tie_word_embeddings=False), gguf.MODEL_ARCH.GPTNEOX),
}
# What vLLM's loader takes from a folder, by its documentation of supported models and of --dtype auto.
SERVED_TYPES = {"bfloat16", "float16", "float32"}


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, json_data, cache_folder, tmp_path_factory) -> tuple[Path, gguf.MODEL_ARCH]:
    """A model of random weights with a chat template, trained two steps with LoRA and saved in shards."""
    config, arch = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "base")
    finished_run(
        [
            "--model_name_or_path", folder / "base", "--data_path", json_data, "--data_split", "10,0,0",
            "--data_output_path", cache_folder, "--max_seq_len", "64", "--dtype", "bf16", "--max_steps", "2",
            "--lora_dim", "2", "--lora_module_name", "auto", "--max_shard_size", "200KB",
            "--output_dir", folder / "out",
        ]
    )  # fmt: skip
    return folder / "out", arch


def tensors_of(folder: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and type of every tensor in the folder's safetensors, by name."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                assert name not in found
                found[name] = part.get_shape(), part.get_dtype()
    return found


def test_llama_cpp_knows_every_tensor(saved):
    """By the table of its converter; all that the family needs is there."""
    folder, arch = saved
    names = gguf.get_tensor_name_map(arch, 2)
    mapped = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in tensors_of(folder)}
    assert not [name for name, known in mapped.items() if known is None]
    assert len(set(mapped.values())) == len(mapped)
    wanted = {
        "token_embd.weight",
        "output.weight",
        "output_norm.weight",
        "blk.0.ffn_down.weight",
        "blk.1.attn_norm.weight",
    }
    assert wanted <= set(mapped.values())
    assert names.get_name("model.layers.0.lora_left_weight", try_suffixes=(".weight",)) is None  # the table can say no


def test_llama_cpp_reads_the_tokenizer(saved):
    folder, _ = saved
    config = json.loads((folder / "config.json").read_text())
    vocab = gguf.SpecialVocab(folder, load_merges=True, n_vocab=config["vocab_size"])
    assert vocab.special_token_ids["eos"] == 2 and vocab.special_token_ids["pad"] == 1
    assert len(vocab.merges) > 100 and vocab.chat_template == CHATML


def test_vllm_finds_what_its_loader_asks_for(saved):
    """One architecture by a class's name, a type it serves, weights in safetensors alone, and the tokens that end."""
    folder, _ = saved
    config = json.loads((folder / "config.json").read_text())
    (architecture,) = config["architectures"]
    assert getattr(transformers, architecture).config_class.model_type == config["model_type"]
    assert (config.get("dtype") or config.get("torch_dtype")) in SERVED_TYPES and "auto_map" not in config
    assert not list(folder.glob("*.bin")) and not (folder / "adapter_config.json").exists()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = tensors_of(folder)
    assert len(set(index["weight_map"].values())) > 1 and set(index["weight_map"]) == set(tensors)
    assert all((folder / file).is_file() for file in index["weight_map"].values())
    assert {dtype for _, dtype in tensors.values()} == {"BF16"} and config["dtype"] == "bfloat16"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"] == 2
    assert (
        AutoTokenizer.from_pretrained(folder)
        .apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
        .endswith("assistant\n")
    )
    embeddings = next(shape for name, (shape, _) in tensors.items() if "embed_tokens" in name or "embed_in" in name)
    assert embeddings[0] == config["vocab_size"] >= len(AutoTokenizer.from_pretrained(folder))
