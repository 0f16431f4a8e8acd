"""Make the tiny OPT of the demo: random weights from a fixed seed, beside the shipped tokenizer.

    python demo/make_tiny_opt.py output/tiny_opt

The repository ships the model's config and tokenizer (`demo/tiny_opt`) but no weights: those are made here,
so that a machine without network and GPU has a model to train. The folder appears complete or not at all, and a
second run finds it complete and changes nothing. `--make_assets` rebuilds the shipped config and tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY_ROOT))

from demo.make_demo_data import BUILT_IN_QUESTIONS  # noqa: E402

ASSETS_DIR = REPOSITORY_ROOT / "demo" / "tiny_opt"
TRAIN_FILE = REPOSITORY_ROOT / "data" / "train.json"
SEED = 1234
# In id order, as in facebook/opt-*, where </s> is beginning, end and unknown token at once.
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
PAD_TOKEN, END_TOKEN = "<pad>", "</s>"
MAX_VOCAB_SIZE = 2048
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors")
# Wide and shallow: on a CPU it learns the demo data faster than a deeper model of the same size.
CONFIG = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "hidden_size": 320,
    "word_embed_proj_dim": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "ffn_dim": 1280,
    "max_position_embeddings": 512,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "layerdrop": 0.0,
    "init_std": 0.02,
    "tie_word_embeddings": True,
    "use_cache": True,
    "bos_token_id": 2,
    "pad_token_id": 1,
    "eos_token_id": 2,
}


def write_json(value: object, path: Path) -> None:
    """Write `value` as indented JSON with a line end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_texts() -> Iterator[str]:
    """Yield the texts the tokenizer learns from: the training records as the loader joins them."""
    for record in json.loads(TRAIN_FILE.read_text(encoding="utf-8")):
        yield f" {record['prompt']} {record['chosen']}"
    for question in BUILT_IN_QUESTIONS:
        yield f" Human: {question} Assistant:"


def make_assets(assets_dir: Path = ASSETS_DIR) -> None:
    """Train the tokenizer on the demo texts and write it and the model config to `assets_dir`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        # All 256 bytes, so that any text has ids.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_texts(), trainer)
    end_id = tokenizer.token_to_id(END_TOKEN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_TOKEN} $A",
        pair=f"{END_TOKEN} $A $B:1",
        special_tokens=[(END_TOKEN, end_id)],
    )
    special_tokens = {"bos_token": END_TOKEN, "eos_token": END_TOKEN, "unk_token": END_TOKEN}
    special_tokens["pad_token"] = PAD_TOKEN
    assets_dir.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONFIG["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        **special_tokens,
    ).save_pretrained(assets_dir)
    config_path = assets_dir / "tokenizer_config.json"
    tokenizer_config = json.loads(config_path.read_text(encoding="utf-8"))
    # This name reads tokenizer.json as it stands; GPT2Tokenizer, which transformers 5 takes for OPT,
    # would rebuild it from vocabulary and merges and lose the </s> in front.
    tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(tokenizer_config, config_path)
    # Readers of older transformers look here.
    write_json(special_tokens, assets_dir / "special_tokens_map.json")
    # A multiple of 8, as the trainer wants it, so that no resizing is needed.
    vocab_size = -(-tokenizer.get_vocab_size() // 8) * 8
    write_json({**CONFIG, "vocab_size": vocab_size}, assets_dir / "config.json")
    print(f"wrote {assets_dir} ({tokenizer.get_vocab_size()} tokens)")


def is_complete(output_dir: Path) -> bool:
    """Tell whether `output_dir` holds the model with the tokenizer shipped now."""
    if not all((output_dir / name).is_file() for name in (*MODEL_FILES, *TOKENIZER_FILES)):
        return False
    if any((output_dir / name).read_bytes() != (ASSETS_DIR / name).read_bytes() for name in TOKENIZER_FILES):
        return False
    shipped = json.loads((ASSETS_DIR / "config.json").read_text(encoding="utf-8"))
    made = json.loads((output_dir / "config.json").read_text(encoding="utf-8"))
    return all(made.get(key) == value for key, value in shipped.items())


def make_model(output_dir: Path) -> None:
    """Write weights, config, generation config and tokenizer to `output_dir`: all of them or nothing."""
    if is_complete(output_dir):
        print(f"{output_dir} is there and complete: nothing to do")
        return
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise SystemExit(f"{output_dir} exists but is not the tiny OPT as shipped now: please remove it first")

    import torch
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(SEED)
    model = OPTForCausalLM(OPTConfig.from_pretrained(ASSETS_DIR)).float()
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, so that the rename stays on one file system; the process id keeps two runs apart.
    partial_dir = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.partial")
    try:
        model.save_pretrained(partial_dir)
        for name in TOKENIZER_FILES:
            shutil.copyfile(ASSETS_DIR / name, partial_dir / name)
        try:
            partial_dir.rename(output_dir)
        except OSError:
            # Another run was faster, and made the very same files.
            if not is_complete(output_dir):
                raise
    finally:
        shutil.rmtree(partial_dir, ignore_errors=True)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"wrote {output_dir} ({count / 1e6:.2f} M parameters, random weights)")


def main() -> None:
    """Make the model, or with --make_assets the shipped config and tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output_dir", type=Path, nargs="?", help="folder for the model; made if absent")
    parser.add_argument(
        "--make_assets",
        action="store_true",
        help="rebuild the shipped config and tokenizer from data/train.json",
    )
    args = parser.parse_args()
    if not args.make_assets and args.output_dir is None:
        parser.error("an output folder or --make_assets is needed")
    if args.make_assets:
        make_assets()
    if args.output_dir is not None:
        # An absolute path without a slash at the end, for the sibling's name.
        make_model(args.output_dir.resolve())


if __name__ == "__main__":
    main()
