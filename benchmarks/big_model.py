"""What each rank holds while a model larger than its share is loaded, trained and saved, beside the model's bytes.

    python benchmarks/big_model.py [--ranks 1 2] [--shard 500MB] [--folder DIR] [-- more arguments of main.py]

Makes a random float32 Llama of about half a billion weights in shards, trains it a few steps with ZeRO 3 and LoRA, and
samples /proc every few milliseconds. Private memory (RssAnon and RssShmem) counts above what a process holds when its
tokenizer is read; pages of files that are mapped (RssFile) stand apart, since the system takes them back at will. Freed
memory is given back at once (MALLOC_MMAP_THRESHOLD_), so that peaks are of live tensors.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.ranks import environments_of_ranks  # noqa: E402

VOCABULARY = 8192
SMALL_PAGES = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576", "OMP_NUM_THREADS": "1"}
# What rank 0 prints when a phase begins.
PHASES = {
    "Tokenizer:": "loading", "Model:": "preparing", "***** Running training": "training",
    "saving the final model": "saving", "Saved to": "ending",
}  # fmt: skip
SHOWN = ("loading", "preparing", "training", "saving", "verifying")


def make_model(folder: Path, layers: int, hidden: int, shard: str) -> int:
    """Write a random Llama with the demo's tokenizer; returns its bytes."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt")
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=8 * hidden // 3, num_hidden_layers=layers, vocab_size=VOCABULARY,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=256,
        tie_word_embeddings=False, bos_token_id=2, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def make_data(folder: Path) -> Path:
    """A handful of short records: what counts is memory, not time."""
    records = [{"prompt": f"Human: Name number {n}. Assistant:", "chosen": f" {n}, of course."} for n in range(8)]
    for name, some in (("train", records), ("eval", records[:2])):
        (folder / f"{name}.json").write_text(json.dumps(some))
    return folder


class Sampler(threading.Thread):
    """Peaks of every process by phase, in bytes: (private, mapped files)."""

    def __init__(self, pids: list[int], output: Path) -> None:
        super().__init__(daemon=True)
        self.pids, self.output, self.phase = pids, output, "starting"
        self.start_private: dict[int, int] = {}
        self.peaks: dict[tuple[int, str], tuple[int, int]] = {}

    def run(self) -> None:
        while self.phase != "ending":
            if self.phase == "saving" and (self.output / "config.json").exists():
                self.phase = "verifying"
            for rank, pid in enumerate(self.pids):
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                except OSError:
                    return
                if "RssAnon" not in status:
                    return
                anonymous, mapped, shared = (
                    int(status.split(f"{key}:")[1].split()[0]) * 1024 for key in ("RssAnon", "RssFile", "RssShmem")
                )
                private = anonymous + shared
                if self.phase == "starting":
                    self.start_private[rank] = private
                else:
                    above = (private - self.start_private[rank], mapped)
                    before = self.peaks.get((rank, self.phase), (0, 0))
                    self.peaks[rank, self.phase] = tuple(max(pair) for pair in zip(above, before, strict=True))
            time.sleep(0.01)


def measure(model: Path, output: Path, ranks: int, arguments: list[str]) -> tuple[Sampler, float]:
    """Run main.py on so many ranks; the sampler with its peaks and the seconds taken."""
    command = [
        sys.executable, str(ROOT / "main.py"), "--model_name_or_path", str(model), "--data_path",
        str(make_data(model.parent)), "--data_output_path", str(output.parent / "cache"), "--data_split", "10,0,0",
        "--max_seq_len", "64", "--max_steps", "2", "--dtype", "fp32", "--zero_stage", "3",
        "--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "8", "--output_dir", str(output),
        *arguments,
    ]  # fmt: skip
    environment = {**SMALL_PAGES, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    began, processes = time.time(), []
    log = (output.parent / "other_ranks.log").open("w")
    for rank, own in enumerate(environments_of_ranks(ranks, environment)):
        output_of_rank = subprocess.PIPE if rank == 0 else log
        processes.append(subprocess.Popen(command, text=True, env=own, stdout=output_of_rank, stderr=subprocess.STDOUT))
    sampler = Sampler([process.pid for process in processes], output)
    sampler.start()
    said = []
    for line in processes[0].stdout:
        said.append(line)
        sampler.phase = next((name for words, name in PHASES.items() if line.startswith(words)), sampler.phase)
    if any(process.wait() for process in processes):
        raise RuntimeError("".join(said[-30:]) + Path(log.name).read_text()[-3000:])
    return sampler, time.time() - began


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--shard", default="500MB", help="of the model that is read and of the one that is written")
    parser.add_argument(
        "--folder", type=Path, help="where the model and what is saved go, and stay; a temporary folder"
    )
    return parser


def main() -> None:
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    args, more = build_parser().parse_args(argv[:cut]), argv[cut + 1 :]
    more = more or ["--lora_dim", "8", "--lora_module_name", "auto", "--only_optimize_lora"]
    folder = args.folder or Path(tempfile.mkdtemp(prefix="big_model_"))
    model = folder / f"llama-{args.layers}-{args.hidden}-{args.shard}"
    if not (model / "config.json").exists():
        make_model(model, args.layers, args.hidden, args.shard)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    print(f"{size / 1e9:.2f} GB of weights in shards of {args.shard}; {' '.join(more)}\n")
    print("| ranks | rank | " + " | ".join(SHOWN) + " | mapped files, most |")
    print("| --- | --- | " + " | ".join("---" for _ in SHOWN) + " | --- |")
    for ranks in args.ranks:
        output = folder / "saved"
        shutil.rmtree(output, ignore_errors=True)
        sampler, seconds = measure(model, output, ranks, [*more, "--max_shard_size", args.shard])
        for rank in range(ranks):
            peaks = [sampler.peaks.get((rank, phase), (0, 0)) for phase in SHOWN]
            cells = [f"{private / 1e6:.0f} MB ({private / size:.2f})" for private, _ in peaks]
            print(f"| {ranks} | {rank} | {' | '.join(cells)} | {max(mapped for _, mapped in peaks) / 1e6:.0f} MB |")
        print(f"<!-- {ranks} ranks: {seconds:.0f} s -->", flush=True)
    if args.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
