"""Every family of decoder-only models trains, evaluates, reports and saves through the command line."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_json_data, make_tiny_opt
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

RECORDS, EVALUATION = 12, 5
VOCABULARY = 1816  # the shipped tokenizer's 1809 entries, rounded up
SPECIAL = {"bos_token_id": 2, "pad_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY, **SPECIAL}
GATED = {
    **SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip
CONFIGS = {
    "opt": OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=128),
    # BLOOM's vocabulary is larger than its tokenizer's: 200 rows more, as published checkpoints have.
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY + 200, **SPECIAL),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=128, **SPECIAL),
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=64, max_position_embeddings=128),
    "llama": LlamaConfig(**GATED),
    "qwen3": Qwen3Config(**GATED),
    "gemma2": Gemma2Config(**GATED, sliding_window=16),
    "mistral": MistralConfig(**GATED, sliding_window=16),
}
LORA_NAMES = {
    "opt": "decoder.layers.", "bloom": "transformer.h.", "gpt_neox": "gpt_neox.layers.", "llama": "model.layers.",
    "qwen3": "model.layers.", "gemma2": "model.layers.", "mistral": "model.layers.", "gpt2": "transformer.h.",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_json_data(tmp_path_factory.mktemp("data"), RECORDS, EVALUATION)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A random model of each family with the shipped tokenizer."""
    base = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(base / name)
        tokenizer.save_pretrained(base / name)
    return {name: base / name for name in CONFIGS}


@pytest.fixture
def arguments(data, cache_folder, tmp_path):
    """Arguments of a run of three steps on a model folder."""

    def of(folder: Path, *more) -> list:
        return [
            "--model_name_or_path", folder, "--data_path", data, "--data_split", "10,0,0", "--data_output_path",
            cache_folder, "--max_seq_len", "64", "--dtype", "fp32", "--per_device_train_batch_size", "4",
            "--learning_rate", "5e-3", "--print_loss", "--output_dir", tmp_path / "out", *more,
        ]  # fmt: skip

    return of


def perplexities(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"^ppl: (\S+),", text, re.MULTILINE)]


def assert_trained_and_saved(run: tuple[int, str, str], saved: Path, data: Path) -> torch.nn.Module:
    status, out, err = run
    assert status == 0, out + err
    before, after = perplexities(out)
    assert after < 0.97 * before
    throughput = re.search(r"\bThroughput: (\d+) real tokens/s, (\S+) samples/s, (\S+) TFLOP/s", out, re.MULTILINE)
    assert throughput and all(float(number) > 0 for number in throughput.groups())
    assert re.search(r"verified: reloaded logits differ by (\S+) of the largest", out)
    model = AutoModelForCausalLM.from_pretrained(saved).eval()
    assert AutoTokenizer.from_pretrained(saved)("a")["input_ids"][0] == 2
    # The saved model's own perplexity, counted here from its folder, is the one the run printed last.
    assert perplexity_of(model, saved, data) == pytest.approx(after, rel=1e-3)
    return model


def perplexity_of(model: torch.nn.Module, saved: Path, data: Path) -> float:
    tokenizer = AutoTokenizer.from_pretrained(saved)
    total, labels = 0.0, 0
    for row in json.loads((data / "eval.json").read_text()):
        ids = tokenizer(f" {row['prompt']} {row['chosen']}")["input_ids"] + [2]
        ids = torch.tensor(ids[:64])[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        labels += ids.shape[1] - 1
    return torch.tensor(total / labels).exp().item()


@pytest.mark.parametrize("family", CONFIGS)
def test_full_fine_tuning(family, folders, arguments, data, run_inside, tmp_path):
    model = assert_trained_and_saved(run_inside(arguments(folders[family])), tmp_path / "out", data)
    rows = CONFIGS[family].vocab_size
    assert model.get_input_embeddings().weight.shape[0] == rows == model.config.vocab_size, "never shrunk"
    base = AutoModelForCausalLM.from_pretrained(folders[family]).state_dict()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, base[name])}
    assert changed >= {name for name, tensor in base.items() if tensor.dim() == 2 and "embed" not in name}


@pytest.mark.parametrize("family", LORA_NAMES)
def test_lora(family, folders, arguments, run_inside, tmp_path):
    """Only the blocks' linear weights change, and all of them; the printed share of what trains is small."""
    more = [
        "--lora_dim", "4", "--lora_module_name", "auto", "--only_optimize_lora", "--lora_learning_rate",
        "5e-2", "--gradient_checkpointing", "--num_train_epochs", "2",
    ]  # fmt: skip
    status, out, err = run_inside(arguments(folders[family], *more))
    assert status == 0, out + err
    assert perplexities(out)[-1] < perplexities(out)[0]
    share = float(re.search(r"of them train \((\S+)%\)", out)[1])
    assert 0 < share < 20
    base = AutoModelForCausalLM.from_pretrained(folders[family])
    linears = {name for name, module in base.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))}
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    changed = {name for name, tensor in base.state_dict().items() if not torch.equal(tensor, saved[name])}
    assert changed == {f"{name}.weight" for name in linears if re.search(r"\.\d+\.", name)}


@pytest.mark.parametrize("family", CONFIGS)
def test_a_lora_name_of_another_family(family, folders, arguments, run_inside, tmp_path):
    """No silent full fine-tuning: an error that names what could match, before anything is written."""
    status, _, err = run_inside(arguments(folders[family], "--lora_dim", "4", "--lora_module_name", "no.layers."))
    assert status == 2 and "Traceback" not in err
    assert "no.layers." in err
    assert LORA_NAMES[family] in err
    assert not (tmp_path / "out").exists()


def test_a_half_precision_checkpoint_trains_from_float32(folders, arguments, data, run_inside, tmp_path, monkeypatch):
    """An fp16 checkpoint, as OPT's are: float32 when DeepSpeed gets it, and saved in what it was trained in."""
    import deepspeed

    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(folders["opt"], dtype=torch.float16).save_pretrained(half)
    AutoTokenizer.from_pretrained(folders["opt"]).save_pretrained(half)
    assert json.loads((half / "config.json").read_text())["dtype"] == "float16"
    seen = []
    initialize = deepspeed.initialize

    def watched(*args, **kwargs):
        seen.append({parameter.dtype for parameter in kwargs["model"].parameters()})
        return initialize(*args, **kwargs)

    monkeypatch.setattr(deepspeed, "initialize", watched)
    assert_trained_and_saved(run_inside(arguments(half)), tmp_path / "out", data)
    assert seen == [{torch.float32}]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_a_vocabulary_that_is_too_small_grows(arguments, data, run_inside, tmp_path):
    small = make_tiny_opt(tmp_path / "small", vocab_size=1801)
    model = assert_trained_and_saved(run_inside(arguments(small)), tmp_path / "out", data)
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY == model.config.vocab_size
