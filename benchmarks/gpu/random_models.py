"""Models with random weights, and data, for the GPU check (`check.py`): nothing is downloaded."""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

TOKENIZER = ROOT / "demo" / "tiny_opt"
SPECIAL = {"bos_token_id": 2, "pad_token_id": 1, "eos_token_id": 2}
OPT_VOCABULARY = 50272
# Layers, width, heads of the published OPTs (Zhang et al. 2022, https://arxiv.org/abs/2205.01068, table 1).
SHAPES = {
    "125m": (12, 768, 12), "350m": (24, 1024, 16), "1.3b": (24, 2048, 32), "2.7b": (32, 2560, 32),
    "6.7b": (32, 4096, 32), "13b": (40, 5120, 40), "tiny": (2, 64, 4),
}  # fmt: skip
TRAIN_RECORDS, EVAL_RECORDS = 77, 37  # nine steps of eight samples and one of five
MEAN_TOKENS, LONGEST, SPREAD = 160, 512, 0.7  # of the dialogues' lengths, which are log-normal


def opt_config(name: str, **changes: Any) -> Any:
    """Return the configuration of an OPT shape; 350m alone has a narrower embedding and norms after a block's parts."""
    from transformers import OPTConfig

    layers, width, heads = SHAPES[name]
    settings = {
        "hidden_size": width, "word_embed_proj_dim": 512 if name == "350m" else width, "ffn_dim": 4 * width,
        "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": OPT_VOCABULARY,
        "max_position_embeddings": 2048, "do_layer_norm_before": name != "350m", "dropout": 0.1, **SPECIAL,
    }  # fmt: skip
    return OPTConfig(**{**settings, **changes})


def copy_tokenizer(folder: Path) -> None:
    """Copy the shipped tokenizer, whose ids are below the vocabulary of every model here."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in TOKENIZER.iterdir():
        if file.name != "config.json":
            (folder / file.name).write_bytes(file.read_bytes())


def make_small(folder: Path, on_cpu: bool) -> Path:
    """Save a small OPT with random weights; on a GPU its heads are 64 wide, like those of large models."""
    import torch
    from transformers import OPTForCausalLM

    width, layers = (64, 2) if on_cpu else (256, 4)
    copy_tokenizer(folder)
    torch.manual_seed(0)
    config = opt_config(
        "tiny", hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, num_hidden_layers=layers,
        vocab_size=1816, max_position_embeddings=512, init_std=0.05,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder)
    return folder


def make_small_llama(folder: Path, on_cpu: bool) -> Path:
    """Save a small Llama with random weights: its blocks have an MLP of their own, those of OPT have none."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers = (64, 2) if on_cpu else (256, 4)
    copy_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=1816, max_position_embeddings=512, initializer_range=0.05, **SPECIAL,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_shape(folder: Path, name: str) -> Path:
    """Save a model without weights: `watched_run.py --untrained` makes them on the device, where that is fast."""
    from safetensors.torch import save_file

    copy_tokenizer(folder)
    opt_config(name, architectures=["OPTForCausalLM"]).save_pretrained(folder)
    save_file({}, folder / "model.safetensors")  # a file of weights without one: its fingerprint is read
    return folder


def make_records(folder: Path) -> Path:
    """Write the first of the shipped records, every third answer longer, as a `local/jsonfile` data set."""
    data = folder / "local" / "jsonfile"
    data.mkdir(parents=True)
    for name, count in (("train", TRAIN_RECORDS), ("eval", EVAL_RECORDS)):
        records = json.loads((ROOT / "data" / f"{name}.json").read_text(encoding="utf-8"))[:count]
        for number, record in enumerate(records):
            record["chosen"] = " ".join([record["chosen"]] * (1 + 2 * (number % 3 == 0)))
        (data / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    return data


def make_dialogues(folder: Path, count: int, longest: int = LONGEST) -> Path:
    """Write texts of the shipped records' words, as long as dialogues are: 160 tokens on average, at most `longest`."""
    import numpy as np
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    records = json.loads((ROOT / "data" / "train.json").read_text(encoding="utf-8"))
    text = " ".join(f"{record['prompt']} {record['chosen']}" for record in records)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    random = np.random.default_rng(0)
    mean = np.log(MEAN_TOKENS * longest / LONGEST) - SPREAD**2 / 2
    lengths = np.clip(random.lognormal(mean, SPREAD, count).astype(int), 8, longest - 4)
    data = folder / "local" / "jsonfile"
    data.mkdir(parents=True)
    rows = []
    for length in lengths.tolist():
        start = int(random.integers(0, len(ids) - length))
        middle = start + length // 2
        halves = tokenizer.decode(ids[start:middle]), tokenizer.decode(ids[middle : start + length])
        rows.append({"prompt": halves[0], "chosen": halves[1]})
    (data / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    (data / "eval.json").write_text(json.dumps(rows[:2]), encoding="utf-8")
    return data


def read_dialogues(source: Path, folder: Path, count: int) -> Path:
    """Write rows of a parquet file, or of the first train*.parquet in a folder, with the columns prompt and chosen."""
    from data_prep import write_records

    files = [source] if source.is_file() else sorted(source.rglob("train*.parquet"))
    if not files:
        raise SystemExit(f"--data_path {source}: neither a parquet file nor a folder with train*.parquet")
    return write_records(str(files[0]), count, folder)
