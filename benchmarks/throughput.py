"""Training speed and memory of every layout, interleaved in one run, against this machine's matrix rate.

    python benchmarks/throughput.py --tokenizer FOLDER --data_path .../Dahoas/rm-static

A randomly initialised OPT of the 125m shape (`--hidden`, `--layers` for others) trains under DeepSpeed exactly
as main.py trains it: same batches, same loss, same optimizer. Each round takes one optimizer step of every
layout, so noise of the machine falls on all alike. `--peer trl` (`throughput_trl.py`) adds TRL's SFTTrainer on the
same model and token ids to every round, where trl is installed. `--profile` says afterwards what the time goes to.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import deepspeed  # noqa: E402
import throughput_profile  # noqa: E402
import throughput_trl  # noqa: E402
import torch  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402
from torch.profiler import record_function  # noqa: E402
from transformers import OPTConfig, OPTForCausalLM  # noqa: E402

from utils.attention import NAME as DOCUMENTS  # noqa: E402
from utils.data.batches import collate_for, train_batches  # noqa: E402
from utils.data.data_utils import PromptDataset, create_prompt_dataset  # noqa: E402
from utils.data.sampler import epoch_units  # noqa: E402
from utils.ds_utils import get_train_ds_config, start_process_group  # noqa: E402
from utils.host_memory import give_back_freed_memory, keep_freed_memory  # noqa: E402
from utils.loss import install_loss, summed_loss  # noqa: E402
from utils.optimizer import create_optimizer  # noqa: E402
from utils.perf import ModelShape, flops_per_token, model_shape  # noqa: E402
from utils.precision import DTYPES, resolve_dtype  # noqa: E402
from utils.utils import load_hf_tokenizer, to_device  # noqa: E402

LAYOUTS = ("max_length", "longest", "free", "packed")


class Measured(NamedTuple):
    """One optimizer step, or the sum of several."""

    seconds: float
    tokens: int  # real ones
    samples: int
    cells: int  # with padding
    peak: float  # GB


def parse_arguments() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder of OPT's tokenizer (vocabulary 50,272)")
    parser.add_argument("--data_path", required=True, help="a folder whose path contains a known data set name")
    parser.add_argument("--dtype", default="auto", help="as in main.py")
    parser.add_argument("--micro_batch", type=int, default=8, help="samples (rows when packed) per forward")
    parser.add_argument("--rounds", type=int, default=3, help="measured optimizer steps of each layout, after one more")
    parser.add_argument("--max_seq_len", type=int, default=512, help="as in main.py")
    parser.add_argument("--hidden", type=int, default=768, help="width; 768 is OPT-125m")
    parser.add_argument("--layers", type=int, default=12, help="12 is OPT-125m")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="which to run")
    parser.add_argument("--peer", choices=["trl"], default=None, help="also run TRL's SFTTrainer")
    parser.add_argument(
        "--peer_ways", default=",".join(throughput_trl.WAYS),
        help="which ways of TRL: each is a process, and all share this machine's memory",
    )  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="then as many steps of each layout under torch.profiler")
    return parser.parse_args()


def make_model(args: Namespace) -> OPTForCausalLM:
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=args.hidden, word_embed_proj_dim=args.hidden, ffn_dim=4 * args.hidden, vocab_size=50272,
        num_hidden_layers=args.layers, num_attention_heads=max(args.hidden // 64, 1), max_position_embeddings=2048,
        dropout=0.1,
    )  # fmt: skip
    return OPTForCausalLM(config)


def matrix_rate(dtype: torch.dtype, device: torch.device, hidden: int) -> float:
    """FLOP/s of the model's own matrix products, the better of both directions: the ceiling of any training step."""
    rows, best = 2048, 0.0
    activations = torch.randn(rows, hidden, dtype=dtype, device=device)
    weight = torch.randn(4 * hidden, hidden, dtype=dtype, device=device)
    for _ in range(5):
        get_accelerator().synchronize()
        start = time.perf_counter()
        for _ in range(4):
            activations @ weight.t()
        get_accelerator().synchronize()
        best = max(best, 4 * 2 * rows * hidden * 4 * hidden / (time.perf_counter() - start))
    return best


def reset_peak_memory() -> None:
    """Start a new peak: the device's own, or on a CPU the process's resident memory, freed memory given back."""
    if get_accelerator().device_name() == "cpu":
        give_back_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")
    else:
        get_accelerator().reset_peak_memory_stats()


def peak_memory_gb() -> float:
    if get_accelerator().device_name() == "cpu":
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20
    return get_accelerator().max_memory_allocated() / 2**30


def endless_batches(data: PromptDataset, layout: str, args: Namespace, pad: int, on_cpu: bool) -> Any:
    collate = collate_for("free" if layout in ("free", "packed") else layout, pad, args.max_seq_len)
    epoch = 0
    while True:
        epoch += 1
        row_length = args.max_seq_len if layout == "packed" else None
        units = epoch_units(data.lengths(), data.label_counts(), 1234, epoch, row_length)
        yield from train_batches(data, units, collate, args.micro_batch, 1, 1, 0, on_cpu)


def ours(engine: Any, batches: Any, layout: str, device: torch.device, memory: bool = False) -> Measured:
    """One optimizer step in the given layout, on the one engine all layouts share; `memory` for its peak alone."""
    batch = next(batches)
    model = engine.module
    model.set_attn_implementation(DOCUMENTS if layout in ("free", "packed") else "sdpa")
    install_loss(model, fused=layout != "max_length")
    if memory:
        reset_peak_memory()
    start = time.perf_counter()
    with record_function(throughput_profile.STEP):
        loss = summed_loss(engine, to_device(batch.tensors, device))
        engine.backward(loss * batch.weight)
        with record_function(throughput_profile.OPTIMIZER):
            engine.step()
        get_accelerator().synchronize()
    seconds = time.perf_counter() - start
    cells = batch.tensors["input_ids"].numel()
    return Measured(seconds, batch.step.tokens, batch.step.samples, cells, peak_memory_gb())


def make_engine(args: Namespace, dtype: str) -> Any:
    config = get_train_ds_config(False, 0, dtype)
    config["train_micro_batch_size_per_gpu"] = config["train_batch_size"] = args.micro_batch
    model = make_model(args)
    options = Namespace(learning_rate=1e-5, lora_learning_rate=1e-5, weight_decay=0.0, offload=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=create_optimizer(model, options), config=config)
    engine.train()
    keep_freed_memory()
    return engine


def interleaved(ways: dict[str, Callable[..., Measured]], rounds: int) -> dict[str, Measured]:
    """Sums over `rounds` steps of every way in turn, after one that does not count, and the peak of one more.

    A step for the peak begins by giving freed memory back, which a step for the time would pay for.
    """
    found: dict[str, list[Measured]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, way in ways.items():
            measured = way(memory=number > rounds)
            print(f"step {number} of {name}: {measured.seconds:.1f} s, {measured.tokens} tokens", flush=True)
            if number:  # before that kernels warm up, memory is first touched
                found[name].append(measured)
    return {name: Measured(*(sum(column) for column in list(zip(*steps[:-1], strict=True))[:4]), steps[-1].peak)
            for name, steps in found.items()}  # fmt: skip


def print_table(found: dict[str, Measured], shape: ModelShape, rate: float) -> None:
    print("\n| layout | real tokens/s | x first | padding | peak memory GB | share of matrix rate |")
    print("| --- | --- | --- | --- | --- | --- |")
    first = next(iter(found.values()))
    for name, sums in found.items():
        speed = sums.tokens / sums.seconds
        share = speed * flops_per_token(shape, sums.tokens / sums.samples) / rate
        print(
            f"| {name} | {speed:.0f} | {speed / (first.tokens / first.seconds):.2f} | "
            f"{1 - sums.tokens / sums.cells:.0%} | {sums.peak:.2f} | {share:.0%} |"
        )


def measure(args: Namespace, data: PromptDataset, pad: int, dtype: str, device: torch.device, folder: str) -> None:
    engine = make_engine(args, dtype)
    shape = model_shape(engine.module)
    rate = matrix_rate(DTYPES[dtype], device, args.hidden)
    ways: dict[str, Callable[[], Measured]] = {}
    for layout in args.layouts.split(","):
        ways[layout] = partial(
            ours, engine, endless_batches(data, layout, args, pad, device.type == "cpu"), layout, device
        )
    with contextlib.ExitStack() as stack:
        peers = throughput_trl.peers(args, data, dtype, folder) if args.peer else {}
        for name, peer in peers.items():
            ways[f"TRL {name}"] = stack.enter_context(peer).step
        found = interleaved(ways, args.rounds)
    print(f"\nmatrix rate {rate / 1e9:.0f} GFLOP/s ({dtype}, {device.type}, {torch.get_num_threads()} threads)")
    print(f"{args.rounds} steps of each layout, {args.micro_batch} samples or rows, max_seq_len {args.max_seq_len}")
    print_table(found, shape, rate)
    reset_peak_memory()
    print(f"\nbetween steps {peak_memory_gb():.2f} GB stay")
    if args.profile:
        throughput_profile.print_shares({layout: ways[layout] for layout in args.layouts.split(",")}, args.rounds)


def main() -> None:
    args = parse_arguments()
    dtype, reason = resolve_dtype(args.dtype)
    device = start_process_group(0, 600)
    print(f"dtype {dtype} ({reason}); {subprocess.getoutput('git rev-parse --short HEAD')}; torch {torch.__version__}")
    tokenizer = load_hf_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory() as cache:
        data, _ = create_prompt_dataset(
            0, [args.data_path], "10,0,0", cache, 1, 1234, tokenizer, args.max_seq_len, tokenizer.eos_token
        )
        measure(args, data, tokenizer.pad_token_id, dtype, device, cache)


if __name__ == "__main__":
    main()
