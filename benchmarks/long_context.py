"""Peak memory of one optimizer step over a long row: plain, tiled, checkpointed, and shared by two ranks.

    OMP_NUM_THREADS=1 python benchmarks/long_context.py

Every setting is a run of main.py on a random Llama; the figure is the peak resident memory its rank 0 records.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINTED, TILED, SHARED = "--gradient_checkpointing", "--tiled_mlp", "--sequence_parallel_size"
SETTINGS = {
    "documents of 512": ["--max_seq_len", "512"],
    "plain": [],
    "tiled": [TILED],
    "checkpointed": [CHECKPOINTED],
    "checkpointed, tiled": [CHECKPOINTED, TILED],
    "two ranks": [SHARED, "2"],
    "two ranks, tiled": [SHARED, "2", TILED],
    "two ranks, checkpointed, tiled": [SHARED, "2", CHECKPOINTED, TILED],
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokens", type=int, default=16384, help="of the row; 16384")
    add(
        "--documents",
        type=int,
        default=4,
        help="equal ones in the row; 4, since attention of one takes 4 times as long",
    )
    add("--width", type=int, default=256, help="of the model, whose MLPs are four times as wide; 256")
    add("--layers", type=int, default=4, help="blocks; 4")
    add("--only", nargs="*", default=list(SETTINGS), choices=list(SETTINGS), help="settings; all")
    return parser


def make_model(folder: Path, args: argparse.Namespace) -> None:
    """A random Llama with the demo's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt")
    config = LlamaConfig(
        vocab_size=8 * -(-len(tokenizer) // 8), hidden_size=args.width, intermediate_size=4 * args.width,
        num_hidden_layers=args.layers, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=args.tokens,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_data(folder: Path, args: argparse.Namespace) -> Path:
    """Documents that are cut at their length, and one short record to evaluate on."""
    data = folder / "local" / "jsonfile"
    data.mkdir(parents=True)
    record = {"prompt": "Human: Count. Assistant:", "chosen": "one two three " * args.tokens, "rejected": ""}
    (data / "train.json").write_text(json.dumps([record] * args.documents))
    (data / "eval.json").write_text(json.dumps([{**record, "chosen": "one two"}]))
    return data


def peak_gb(folder: Path, flags: list[str], model: Path, data: Path, args: argparse.Namespace) -> tuple[float, float]:
    """(peak memory of rank 0 in GB, loss of the step)."""
    out = Path(tempfile.mkdtemp(dir=folder))
    common = [
        "--model_name_or_path", model, "--data_path", data, "--data_split", "10,0,0", "--data_output_path",
        folder / "cache", "--dtype", "fp32", "--per_device_train_batch_size", args.documents, "--max_steps", "1",
        "--logging_steps", "1", "--output_dir", out, "--max_seq_len", args.tokens // args.documents, *flags,
    ]  # fmt: skip
    ranks = int(flags[flags.index(SHARED) + 1]) if SHARED in flags else 1
    start = [sys.executable]
    if ranks > 1:
        start = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks)]
    done = subprocess.run([*start, str(ROOT / "main.py"), *map(str, common)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return tuple(next(r[name] for r in records if r.get(name) is not None) for name in ("memory_gb", "loss"))


def main() -> None:
    args = build_parser().parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", args)
        data = make_data(folder, args)
        print("| setting | peak GB of rank 0 | loss |\n| --- | --- | --- |")
        for setting in args.only:
            peak, loss = peak_gb(folder, SETTINGS[setting], folder / "model", data, args)
            print(f"| {setting} | {peak:.2f} | {loss:.6f} |", flush=True)


if __name__ == "__main__":
    main()
