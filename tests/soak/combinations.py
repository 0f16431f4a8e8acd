"""Every flag with every ZeRO stage, with and without LoRA, on one rank and two: right, refused, or wrong?

    OMP_NUM_THREADS=1 python tests/soak/combinations.py --folder /tmp/combinations [--only PART,...]

Each cell is a run of main.py from its arguments to the saved and reloaded model: a tiny OPT (tiled MLPs: a tiny
Llama), 77 samples, two epochs, steps of 8 samples on any number of ranks, dropout off. A run is right when it ends with
status 0 and the loss of every step and every perplexity are those of a reference within 1e-4 relative (in bf16 1e-2):
one rank without ZeRO, and without the flag too where that changes no mathematics. It is refused when it ends with
status 2 and a message; everything else is wrong. What was run is kept in FOLDER/cells.json and not run again.
"""

import argparse
import json
import os
import re
import shutil
import signal
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

STAGES, KINDS, RANKS = (0, 1, 2, 3), ("full", "LoRA"), (1, 2)
GLOBAL_BATCH = 8
LORA = ["--lora_dim", "4", "--lora_module_name", "auto", "--only_optimize_lora", "--lora_learning_rate", "1e-3"]
# Flags that change no mathematics are held against the plain run, the others against themselves.
SAME: dict[str, list[str]] = {
    "(none)": [],
    "--gradient_checkpointing": ["--gradient_checkpointing"],
    "--gradient_accumulation_steps 2": ["--gradient_accumulation_steps", "2"],
    "--padding longest": ["--padding", "longest"],
    "--padding max_length": ["--padding", "max_length"],
    "--offload": ["--offload"],
    "--offload nvme": ["--offload", "nvme", "--nvme_path", "{folder}/nvme"],
    "--activation_offloading": ["--gradient_checkpointing", "--activation_offloading"],
    "--tiled_mlp": ["--tiled_mlp"],
    "--sequence_parallel_size 2": ["--sequence_parallel_size", "2"],
    "--zero_hpz_partition_size 2": ["--zero_hpz_partition_size", "2"],
    "--max_shard_size 200KB": ["--max_shard_size", "200KB"],
    "--save_steps 4": ["--save_steps", "4"],
    "--save_steps 4 --save_only_model": ["--save_steps", "4", "--save_only_model"],
    "--resume_from_checkpoint": ["--save_steps", "4", "--resume_from_checkpoint"],  # run_cell interrupts it once
    "--load_best_model_at_end": ["--load_best_model_at_end"],
    "--save_lora_adapter": ["--save_lora_adapter"],
    "--deepspeed_config (overlap_comm off)": ["--deepspeed_config", "{folder}/no_overlap.json"],
}
OWN: dict[str, list[str]] = {
    "--packing": ["--packing"],
    "--completion_only_loss": ["--completion_only_loss"],
    "--streaming 24": ["--streaming", "24", "--max_steps", "20"],
    "--lora_dim without --only_optimize_lora": ["--lora_dim", "4", "--lora_module_name", "auto"],
    "--enable_mixed_precision_lora": ["--enable_mixed_precision_lora"],
    "--dtype bf16": ["--dtype", "bf16"],
    "--dtype fp16": ["--dtype", "fp16"],
}
FLAGS = {**SAME, **OWN}
TOLERANCE = {"--dtype bf16": 1e-2}


def arguments_of(flag: str, stage: int, kind: str, ranks: int, place: dict[str, Path]) -> list[str]:
    """The command line of one cell, without its output folder."""
    words = [word.format(folder=place["folder"]) for word in FLAGS[flag]]
    micro = GLOBAL_BATCH // ranks
    if flag == "--gradient_accumulation_steps 2":
        micro //= 2
    if flag == "--sequence_parallel_size 2":
        micro = GLOBAL_BATCH // max(1, ranks // 2)
    family = "llama" if flag == "--tiled_mlp" else "opt"
    return [
        "--model_name_or_path", str(place[family]), "--data_path", str(place["data"]), "--data_split", "10,0,0",
        "--data_output_path", str(place["folder"] / "cache"), "--max_seq_len", "64", "--dtype", "fp32",
        "--disable_dropout", "--num_train_epochs", "2", "--print_loss", "--learning_rate", "1e-3",
        "--per_device_train_batch_size", str(micro), "--zero_stage", str(stage),
        *(LORA if kind == "LoRA" else []), *words,
    ]  # fmt: skip


def figures(output: Path) -> tuple[dict[int, float], list[float]]:
    """Loss of every step, and all perplexities, of a run."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return (
        {line["step"]: line["loss"] for line in lines if "loss" in line},
        [line["perplexity"] for line in lines if "perplexity" in line],
    )


def run_cell(flag: str, stage: int, kind: str, ranks: int, place: dict[str, Path]) -> dict[str, Any]:
    """Run one cell; what came of it."""
    from fork_runs import start_run

    from utils.distributed.failures import EXIT_INTERRUPTED

    output = place["folder"] / "output"
    shutil.rmtree(output, ignore_errors=True)
    began = time.time()
    argv = [*arguments_of(flag, stage, kind, ranks, place), "--output_dir", str(output)]
    run = start_run(argv, ranks)
    if flag == "--resume_from_checkpoint":
        while not list(output.glob("checkpoints/step-*/complete.json")) and run.processes[0].is_alive():
            time.sleep(0.02)
        run.kill(signal.SIGTERM)
        if run.wait() == [EXIT_INTERRUPTED] * ranks:
            run = start_run(argv, ranks)
    statuses = run.wait()
    said = run.output()
    result: dict[str, Any] = {"statuses": statuses, "seconds": round(time.time() - began, 1)}
    if statuses == [0] * ranks:
        result["losses"], result["perplexities"] = figures(output)
        result["verified"] = "and verified" in said or "verified when it was kept" in said
    else:
        result["said"] = said[-1500:]
    return result


def verdict(cell: dict[str, Any], reference: dict[str, Any] | None, tolerance: float) -> str:
    """right, refused, or wrong with the reason."""
    if set(cell["statuses"]) != {0}:
        refused = 2 in cell["statuses"] and "Traceback" not in cell["said"]
        return "refused" if refused else f"wrong: status {cell['statuses']}"
    if not cell["verified"]:
        return "wrong: not verified"
    if reference is None or "losses" not in reference:
        return "right (nothing to hold it against)"
    ours = [*cell["losses"].values(), *cell["perplexities"]]
    theirs = [*reference["losses"].values(), *reference["perplexities"]]
    if len(ours) != len(theirs):
        return f"wrong: {len(cell['losses'])} steps, not {len(reference['losses'])}"
    error = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    return "right" if error < tolerance else f"wrong: differs by {error:.1e}"


def make_place(folder: Path) -> dict[str, Path]:
    """Models and data of all cells."""
    from conftest import make_json_data, make_tiny_opt
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    place = {"folder": folder, "opt": folder / "opt", "llama": folder / "llama"}
    place["data"] = folder / "data" / "local" / "jsonfile"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nvme").mkdir(exist_ok=True)
    (folder / "no_overlap.json").write_text('{"zero_optimization": {"overlap_comm": false}}')
    if not place["llama"].exists():
        make_tiny_opt(place["opt"])
        tokenizer = AutoTokenizer.from_pretrained(place["opt"])
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        LlamaForCausalLM(LlamaConfig(vocab_size=2048, num_key_value_heads=2, **shape)).save_pretrained(place["llama"])
        tokenizer.save_pretrained(place["llama"])
        make_json_data(folder / "data")
    return place


def joined(words: list[str]) -> str:
    """The verdicts of all ZeRO stages in one cell."""
    if len(set(words)) == 1:
        return words[0]
    stages = {word: [str(stage) for stage, other in zip(STAGES, words, strict=True) if other == word] for word in words}
    return "; ".join(f"ZeRO {', '.join(numbers)}: {word}" for word, numbers in stages.items())


def table(cells: dict[str, dict[str, Any]]) -> str:
    """One row a flag, one column for each number of ranks with and without LoRA; notes say why some are refused."""
    columns = list(product(RANKS, KINDS))
    heads = [f"{ranks} rank{'s' * (ranks > 1)}, {kind}" for ranks, kind in columns]
    lines = ["| flag | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    notes: dict[str, str] = {}
    for flag in FLAGS:
        if not any(key.startswith(f"{flag};") for key in cells):
            continue
        row = []
        for ranks, kind in columns:
            first = "(none)" if flag in SAME and flag != "--tiled_mlp" else flag
            reference = cells.get(f"{first};0;{kind};1")
            words = []
            for stage in STAGES:
                cell = cells.get(f"{flag};{stage};{kind};{ranks}")
                word = verdict(cell, reference, TOLERANCE.get(flag, 1e-4)) if cell else "not run"
                if word == "refused":
                    word += f" [{notes.setdefault(reason(cell['said']), str(len(notes) + 1))}]"
                words.append(word)
            row.append(joined(words))
        lines.append(f"| `{flag}` | " + " | ".join(row) + " |")
    return "\n".join([*lines, "", *(f"{number}. {words}" for words, number in notes.items())])


def reason(said: str) -> str:
    """The words a run was refused with, on one line; the stage it had is in the table."""
    words = " ".join(said.split("error: ", 1)[-1].split("\n[rank", 1)[0].split())
    return re.sub(r"(--zero_stage \d), not \d", r"\1", words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for models, data, outputs and cells.json")
    parser.add_argument("--only", default="", help="parts of flags' names, with commas; all by default")
    parser.add_argument("--again", action="store_true", help="run what is not right once more")
    args = parser.parse_args()
    place = make_place(args.folder)
    record = args.folder / "cells.json"
    cells = json.loads(record.read_text()) if record.exists() else {}
    for flag, kind, ranks, stage in product(FLAGS, KINDS, RANKS, STAGES):
        key = f"{flag};{stage};{kind};{ranks}"
        if args.only and not any(part in flag for part in args.only.split(",")):
            continue
        if key in cells and not (args.again and set(cells[key]["statuses"]) != {0}):
            continue
        cells[key] = run_cell(flag, stage, kind, ranks, place)
        record.write_text(json.dumps(cells, indent=1))
        print(key, cells[key]["statuses"], cells[key]["seconds"], flush=True)
    print(table(cells))


if __name__ == "__main__":
    main()
