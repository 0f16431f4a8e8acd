"""Time and peak memory of verifying a saved model: the whole model reloaded and run, or checksums, names and tokenizer.

    python benchmarks/verification.py --layers 24 --hidden 1024

Makes a random Llama, saves it, and starts each way in a process of its own, whose peak memory is its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WAYS = ("imports", "checksums", "names", "forward")


def save(folder: str, layers: int, hidden: int) -> dict[str, float]:
    """Save a random model; returns its parameters, bytes, and the seconds of writing with and without checksums."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from utils.export import merged, weights
    from utils.export.hf_model import write_all_but_weights
    from utils.module.lora import convert_linear_layer_to_lora

    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64, intermediate_size=4 * hidden,
        vocab_size=32000, eos_token_id=2, pad_token_id=1, bos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    write_all_but_weights(model, AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt"), folder)
    start = time.perf_counter()
    written = weights.write_weights(model, folder, True)
    seconds = time.perf_counter() - start
    record = {name: [entry.file, str(entry.dtype), entry.shape, entry.checksum] for name, entry in written.items()}
    Path(folder, "written.json").write_text(json.dumps(record))
    start = time.perf_counter()
    for parameter in model.parameters():
        weights.tensor_checksum(parameter.detach())
    size = sum(parameter.nbytes for parameter in model.parameters())
    checksums = time.perf_counter() - start
    convert_linear_layer_to_lora(model, "auto", 64)
    start = time.perf_counter()
    merged.compare_merged(model, folder, written)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()), "bytes": size,
        "seconds": round(seconds, 2), "of_them_checksums": round(checksums, 2),
        "merged_compared": round(time.perf_counter() - start, 2),
    }  # fmt: skip


def verify(way: str, folder: str) -> None:
    """Do one way of verification."""
    import torch
    from transformers import AutoModelForCausalLM

    from utils.export.verify import check_names, compare_tensors, live_logits
    from utils.export.weights import WrittenTensor

    record = json.loads(Path(folder, "written.json").read_text())
    written = {
        name: WrittenTensor(file, getattr(torch, dtype.removeprefix("torch.")), tuple(shape), value)
        for name, (file, dtype, shape, value) in record.items()
    }
    held, done = [_memory("RssAnon")], threading.Event()

    def sample() -> None:
        while not done.wait(0.01):
            held.append(_memory("RssAnon"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    if way == "checksums":
        compare_tensors(folder, written)
    if way == "names":
        check_names(folder)
    if way == "forward":
        live_logits(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), torch.arange(64)[None])
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    figures = {
        "seconds": round(seconds, 2),
        "held_gb": round(max(held) / 1e9, 3),
        "with_file_pages_gb": round(_memory("VmHWM") / 1e9, 3),
    }
    print(json.dumps({"way": way, **figures}))


def _memory(field: str) -> int:
    """Return a figure of this process's memory in bytes."""
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(f"{field}:")) * 1024


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=24, help="decoder layers of the random model")
    parser.add_argument("--hidden", type=int, default=1024, help="its hidden size; the MLP has four times as much")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Save once, verify in each way, print one JSON line each."""
    args = build_parser().parse_args()
    if args.one:
        verify(*args.one)
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"saved": save(folder, args.layers, args.hidden)}), flush=True)
        for way in WAYS:
            command = [sys.executable, __file__, "--one", way, folder]
            subprocess.run(command, check=True, cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ})


if __name__ == "__main__":
    main()
