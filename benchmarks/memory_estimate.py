"""Compare the memory estimate with what training takes: peak resident memory above the start, on this CPU.

    python benchmarks/memory_estimate.py [--only NAME;...]

Every setting trains a randomly initialised model for a few steps in processes of its own, one a rank, with the
project's own optimizer, engine, layouts and loss. A process first imports everything and starts its process group; what
its peak resident memory grows by from there is compared with the estimate. Freed memory is given back at once
(MALLOC_MMAP_THRESHOLD_), so that the peak is of live tensors.
"""

import argparse
import json
import os
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.ranks import results_of_ranks  # noqa: E402

STEPS = 3  # the last is measured
VOCABULARY = 50272
SMALL_PAGES = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576", "OMP_NUM_THREADS": "1"}
# What differs from 4 samples of 64 to 256 tokens, width 512, 12 layers, ZeRO 0, one rank, fp32.
SETTINGS: dict[str, dict[str, Any]] = {
    "opt 25m": {"hidden": 384, "layers": 6},
    "opt 25m, 16 samples": {"hidden": 384, "layers": 6, "micro": 16},
    "opt 63m": {},
    "opt 63m, 2 samples": {"micro": 2},
    "opt 63m, max_length": {"padding": "max_length"},
    "opt 63m, checkpointing": {"checkpointing": True},
    "opt 63m, LoRA 16": {"lora": 16},
    "opt 63m, LoRA 16 alone": {"lora": 16, "alone": True},
    "opt 63m, LoRA 16 alone, checkpointing": {"lora": 16, "alone": True, "checkpointing": True},
    "opt 63m, ZeRO 1": {"stage": 1},
    "opt 63m, ZeRO 2": {"stage": 2},
    "opt 63m, ZeRO 3": {"stage": 3},
    "opt 63m, ZeRO 2, offload": {"stage": 2, "offload": True},
    "opt 63m, ZeRO 3, offload": {"stage": 3, "offload": True},
    "opt 63m, 2 ranks, ZeRO 0": {"ranks": 2},
    "opt 63m, 2 ranks, ZeRO 1": {"stage": 1, "ranks": 2},
    "opt 63m, 2 ranks, ZeRO 2": {"stage": 2, "ranks": 2},
    "opt 63m, 2 ranks, ZeRO 3": {"stage": 3, "ranks": 2},
    "opt 63m, 2 ranks, ZeRO 3, LoRA 16 alone": {"stage": 3, "ranks": 2, "lora": 16, "alone": True},
    "opt 125m": {"hidden": 768, "layers": 12},
    "llama 60m": {"family": "llama", "hidden": 512, "layers": 12},
    "llama 60m, ZeRO 2, checkpointing": {
        "family": "llama", "hidden": 512, "layers": 12, "stage": 2, "checkpointing": True,
    },
    "llama 60m, longest": {"family": "llama", "hidden": 512, "layers": 12, "padding": "longest"},
    "opt 63m, bf16": {"dtype": "bf16"},
    "opt 63m, bf16, 16 samples": {"dtype": "bf16", "micro": 16},
    "opt 63m, bf16, max_length": {"dtype": "bf16", "padding": "max_length"},
    "opt 63m, bf16, checkpointing": {"dtype": "bf16", "checkpointing": True},
    "opt 63m, bf16, LoRA 16 alone": {"dtype": "bf16", "lora": 16, "alone": True},
    "opt 63m, bf16, ZeRO 2": {"dtype": "bf16", "stage": 2},
    "opt 63m, bf16, ZeRO 3": {"dtype": "bf16", "stage": 3},
    "opt 63m, 2 ranks, bf16, ZeRO 2": {"dtype": "bf16", "stage": 2, "ranks": 2},
    "opt 63m, 2 ranks, bf16, ZeRO 3": {"dtype": "bf16", "stage": 3, "ranks": 2},
    "opt 125m, bf16": {"dtype": "bf16", "hidden": 768, "layers": 12},
    "llama 60m, bf16": {"dtype": "bf16", "family": "llama", "hidden": 512, "layers": 12},
}  # fmt: skip


def run_arguments(name: str) -> Namespace:
    """A setting as main.py's arguments, as far as they matter here."""
    given = SETTINGS[name]
    return Namespace(
        family=given.get("family", "opt"), hidden=given.get("hidden", 512), layers=given.get("layers", 12),
        micro=given.get("micro", 4), ranks=given.get("ranks", 1), padding=given.get("padding", "free"),
        zero_stage=given.get("stage", 0), offload=given.get("offload", False), lora_dim=given.get("lora", 0),
        only_optimize_lora=given.get("alone", False), gradient_checkpointing=given.get("checkpointing", False),
        lora_module_name="auto", lora_alpha=1.0, lora_dropout=0.0, dropout=None, disable_dropout=False,
        learning_rate=1e-5, lora_learning_rate=1e-5, weight_decay=0.0, max_seq_len=256,
        dtype=given.get("dtype", "fp32"),
    )  # fmt: skip


def model_config(args: Namespace) -> Any:
    from transformers import LlamaConfig, OPTConfig

    heads = args.hidden // 64
    if args.family == "llama":
        return LlamaConfig(
            hidden_size=args.hidden, intermediate_size=8 * args.hidden // 3 // 64 * 64, num_hidden_layers=args.layers,
            num_attention_heads=heads, num_key_value_heads=heads // 2, vocab_size=32000, max_position_embeddings=2048,
        )  # fmt: skip
    return OPTConfig(
        hidden_size=args.hidden, word_embed_proj_dim=args.hidden, ffn_dim=4 * args.hidden, vocab_size=VOCABULARY,
        num_hidden_layers=args.layers, num_attention_heads=heads, max_position_embeddings=2048,
    )  # fmt: skip


def sample_lengths(args: Namespace) -> list[int]:
    """Tokens of the samples of a micro batch: max_seq_len and less, down to a share of it."""
    return [args.max_seq_len * (number + 1) // args.micro for number in range(args.micro)]


# --------------------------------------------------------------------------------------------- one rank


def process_memory(key: str) -> int:
    """Bytes of this process under a name of /proc/self/status: VmRSS now, VmHWM at most since the last reset."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


def _reset_peak() -> None:
    from utils.machine.cpu_allocator import give_back_freed_memory

    give_back_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")


def train(name: str) -> None:
    """One rank of one setting; prints the peaks of its moments above the start as JSON."""
    import torch
    from transformers import AutoModelForCausalLM

    from utils.data.batching.batches import collate_for
    from utils.distributed.process_group import start_process_group
    from utils.ds_utils import get_train_ds_config
    from utils.engine.engine import create_optimizer, initialize_engine
    from utils.machine.precision import DTYPES
    from utils.model.layout_check import choose_layout
    from utils.module.fused_loss import summed_loss
    from utils.module.lora import (
        convert_linear_layer_to_lora,
        make_model_gradient_checkpointing_compatible,
        only_optimize_lora_parameters,
    )

    args = run_arguments(name)
    device = start_process_group(int(os.environ.get("LOCAL_RANK", 0)), 600)
    tiny = torch.nn.Linear(64, 64)  # what libraries load at first use is no part of training
    tiny(torch.randn(64, 64)).sum().backward()
    create_optimizer(tiny, args.learning_rate, offload=bool(args.offload)).step()
    config = get_train_ds_config(args.offload, args.zero_stage, args.dtype)
    config["train_micro_batch_size_per_gpu"] = args.micro
    del config["train_batch_size"]  # from the micro batch
    start, peaks = process_memory("VmRSS"), {}
    _reset_peak()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config(args), dtype=DTYPES[args.dtype])
    if args.lora_dim:
        model = convert_linear_layer_to_lora(model, "auto", args.lora_dim, 1.0)
        if args.only_optimize_lora:
            model = make_model_gradient_checkpointing_compatible(only_optimize_lora_parameters(model))
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = create_optimizer(model, args.learning_rate, offload=bool(args.offload))
    engine = initialize_engine(model, optimizer, config)
    peaks["start"] = process_memory("VmHWM") - start
    choose_layout(engine.module, args.padding, 32000, device)
    engine.train()
    samples = [{"input_ids": torch.randint(0, 32000, (length,))} for length in sample_lengths(args)]
    batch = collate_for(args.padding, 1, args.max_seq_len)([{**s, "labels": s["input_ids"]} for s in samples])
    for number in range(STEPS):
        for moment in ("backward", "step"):
            if number == STEPS - 1:
                _reset_peak()
            if moment == "backward":
                engine.set_gradient_accumulation_boundary(True)
                engine.backward(summed_loss(engine, batch) / 1000)
            else:
                engine.step()
            if number == STEPS - 1:
                peaks[moment] = process_memory("VmHWM") - start
                peaks[f"after {moment}"] = process_memory("VmRSS") - start
    print("RESULT " + json.dumps(peaks), flush=True)


# --------------------------------------------------------------------------------------------- all of them


def measured(name: str) -> dict[str, int]:
    """Peaks of the rank that takes most."""
    results = results_of_ranks([__file__, "--child", name], run_arguments(name).ranks, SMALL_PAGES)
    return {key: max(result[key] for result in results) for key in results[0]}


def estimated(name: str) -> Any:
    """The estimate for a setting."""
    from utils.dry_run.activation_memory import Layout, count, simulated_model
    from utils.dry_run.zero_memory import Sizes, estimate, setting_from_config
    from utils.ds_utils import get_train_ds_config
    from utils.machine.precision import DTYPES
    from utils.model.build import ModelForm

    args, lengths = run_arguments(name), sample_lengths(run_arguments(name))
    if args.padding == "free":
        layout = Layout(1, sum(lengths), sum(lengths) - len(lengths), on_cpu=True)
    else:
        layout = Layout(len(lengths), args.max_seq_len, sum(lengths) - len(lengths), on_cpu=True)
    form = ModelForm(
        lora_dim=args.lora_dim, only_optimize_lora=args.only_optimize_lora,
        gradient_checkpointing=args.gradient_checkpointing,
    )  # fmt: skip
    counts = count(simulated_model(model_config(args), form, args.dtype), layout, args.padding != "max_length")
    config = get_train_ds_config(args.offload, args.zero_stage, args.dtype)
    return estimate(Sizes(*counts), setting_from_config(config, args.ranks, DTYPES[args.dtype].itemsize, on_cpu=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="settings, separated by semicolons; all by default")
    parser.add_argument("--peaks", type=Path, help="JSON file of measured peaks: what it holds is not measured again")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--moments", action="store_true", help="also show every moment of a step")
    args = parser.parse_args()
    if args.child:
        train(args.child)
        return
    began, errors = time.time(), []
    peaks = json.loads(args.peaks.read_text()) if args.peaks and args.peaks.exists() else {}
    print("| setting | measured MB | estimate MB | error |\n| --- | --- | --- | --- |")
    for name in args.only.split(";") if args.only else SETTINGS:
        if name not in peaks:
            peaks[name] = measured(name)
            if args.peaks:
                args.peaks.write_text(json.dumps(peaks, indent=1))
        real, guess = peaks[name], estimated(name)
        peak = max(real[moment] for moment in ("start", "backward", "step"))
        errors.append(guess.peak / peak - 1)
        print(f"| {name} | {peak / 1e6:.0f} | {guess.peak / 1e6:.0f} | {errors[-1]:+.1%} |", flush=True)
        if args.moments:
            print("    measured", {key: round(value / 1e6) for key, value in real.items()})
            print("    estimate", {key: round(value / 1e6) for key, value in guess.moments.items()})
            parts = {key: round(v / 1e6) for key, v in guess._asdict().items() if isinstance(v, int)}
            print("    parts   ", parts, flush=True)
    within = sum(abs(error) <= 0.15 for error in errors)
    worst = max(errors, key=abs)
    print(f"\n{within} of {len(errors)} within 15%; largest error {worst:+.1%}; {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
