"""Training speed and memory of every layout, interleaved in one run, against this machine's matrix rate.

    python benchmarks/throughput/throughput.py --tokenizer FOLDER --data_path .../Dahoas/rm-static

A randomly initialised OPT of the 125m shape (`--hidden`, `--layers` for others) trains under DeepSpeed exactly
as main.py trains it: same batches, same loss, same optimizer. A run goes by turns (`turns.py`): in each
the machine's matrix rate is measured and every layout trains on the same documents, packed in one optimizer step, the
others in several. So noise of the machine falls on all alike, and all have documents of the same lengths. The peak
memory of a layout is that of a process of its own, which takes the two steps of most tokens, the same documents for all
that take samples: in a shared process it depends on what other layouts left on the heap. `--peer trl`
(`trl_peer.py`) adds TRL's SFTTrainer on the same model and token ids to every turn, where trl is installed.
`--profile` says after the turns what their time goes to.
"""

import argparse
import contextlib
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import deepspeed  # noqa: E402
import torch  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402
from torch.profiler import record_function  # noqa: E402

from benchmarks.throughput import profile_step as throughput_profile  # noqa: E402
from benchmarks.throughput import trl_peer as throughput_trl  # noqa: E402
from benchmarks.throughput.random_model import make_model  # noqa: E402
from benchmarks.throughput.turns import Measured, Turn, make_turns, peak_memory_gb, total  # noqa: E402
from utils.data.batching.batches import TrainBatch, collate_for, train_batches  # noqa: E402
from utils.data.data_utils import PromptDataset, create_prompt_dataset  # noqa: E402
from utils.distributed.process_group import start_process_group  # noqa: E402
from utils.ds_utils import get_train_ds_config  # noqa: E402
from utils.engine.engine import create_optimizer  # noqa: E402
from utils.machine.cpu_allocator import give_back_freed_memory, keep_freed_memory  # noqa: E402
from utils.machine.device import to_device  # noqa: E402
from utils.machine.precision import DTYPES, resolve_dtype  # noqa: E402
from utils.model.tokenizer import load_hf_tokenizer  # noqa: E402
from utils.module.attention import use_document_attention  # noqa: E402
from utils.module.fused_loss import install_loss, summed_loss  # noqa: E402
from utils.perf import ModelShape, flops_per_token, model_shape  # noqa: E402
from utils.run_config import BatchCut  # noqa: E402
from utils.train.plan import cpu_micro_batch  # noqa: E402

LAYOUTS = ("max_length", "longest", "free", "packed")
WITHOUT_PADDING = ("free", "packed")
Batches = list[list[list[TrainBatch]]]  # of each turn its optimizer steps, of each step its micro batches


def parse_arguments() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder of OPT's tokenizer (vocabulary 50,272)")
    parser.add_argument("--data_path", required=True, help="a folder whose path contains a known data set name")
    parser.add_argument("--dtype", default="auto", help="as in main.py")
    parser.add_argument("--micro_batch", type=int, default=8, help="samples (rows when packed) per step, about")
    parser.add_argument("--rounds", type=int, default=3, help="measured turns, after one more")
    parser.add_argument("--max_seq_len", type=int, default=512, help="as in main.py")
    parser.add_argument("--hidden", type=int, default=768, help="width; 768 is OPT-125m")
    parser.add_argument("--layers", type=int, default=12, help="12 is OPT-125m")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="which to run")
    parser.add_argument("--peer", choices=["trl"], default=None, help="also run TRL's SFTTrainer")
    parser.add_argument(
        "--peer_ways", default=",".join(throughput_trl.WAYS),
        help="which ways of TRL: each is a process, and all share this machine's memory",
    )  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="then as many turns of each layout under torch.profiler")
    parser.add_argument("--worker", nargs=2, metavar=("LAYOUT", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


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


def layout_batches(
    args: Namespace, data: PromptDataset, turns: list[Turn], layout: str, pad: int, on_cpu: bool
) -> Batches:
    """Of each turn the steps of `layout`, laid out, weighed and cut into micro batches as main.py does it."""
    collate = collate_for("free" if layout in WITHOUT_PADDING else layout, pad, args.max_seq_len)
    parts = 1
    if on_cpu and layout in WITHOUT_PADDING:
        tokens = args.max_seq_len if layout == "packed" else float(data.lengths().mean())
        parts = args.micro_batch // cpu_micro_batch(args.micro_batch, tokens)
    steps = [[turn.rows] if layout == "packed" else turn.steps for turn in turns]
    return [
        [
            list(train_batches(data, units, collate, BatchCut(-(-len(units.tokens) // parts), parts, on_cpu=on_cpu)))
            for units in turn
        ]
        for turn in steps
    ]


def take_step(engine: Any, batches: list[TrainBatch], device: torch.device) -> Measured:
    """One optimizer step over its micro batches, as in main.py; the engine shared by all knows no accumulation."""
    start = time.perf_counter()
    with record_function(throughput_profile.STEP):
        for batch in batches:
            engine.set_gradient_accumulation_boundary(batch.is_last)
            loss = summed_loss(engine, to_device(batch.tensors, device))
            engine.backward(loss * (batch.weight / len(batches)))
            with record_function(throughput_profile.OPTIMIZER):
                engine.step()
        get_accelerator().synchronize()
    seconds = time.perf_counter() - start
    step = batches[0].step
    return Measured(seconds, step.tokens, step.samples, sum(batch.tensors["input_ids"].numel() for batch in batches))


def set_layout(engine: Any, layout: str) -> None:
    if layout in WITHOUT_PADDING:
        use_document_attention(engine.module)
    else:
        engine.module.set_attn_implementation("sdpa")
    install_loss(engine.module, fused=layout != "max_length")


def our_turn(engine: Any, layout: str, batches: Batches, device: torch.device, number: int) -> Measured:
    """Turn `number` in the given layout, on the one engine all layouts share."""
    set_layout(engine, layout)
    return total([take_step(engine, step, device) for step in batches[number]])


def make_engine(args: Namespace) -> Any:
    config = get_train_ds_config(False, 0, args.dtype)
    config["train_micro_batch_size_per_gpu"] = config["train_batch_size"] = args.micro_batch
    model = make_model(args)
    engine, *_ = deepspeed.initialize(model=model, optimizer=create_optimizer(model, 1e-5), config=config)
    engine.train()
    keep_freed_memory()
    return engine


def interleaved(
    ways: dict[str, Callable[[int], Measured]], rounds: int, rate: Callable[[], float]
) -> tuple[dict[str, Measured], list[float]]:
    """Of every way the sum over `rounds` turns, and each turn's matrix rate; one turn before does not count."""
    found: dict[str, list[Measured]] = {name: [] for name in ways}
    rates = []
    for number in range(rounds + 1):
        rates.append(rate())
        print(f"turn {number}: matrix rate {rates[-1] / 1e9:.0f} GFLOP/s", flush=True)
        for name, way in ways.items():
            measured = way(number)
            print(f"turn {number} of {name}: {measured.seconds:.1f} s, {measured.tokens} tokens", flush=True)
            found[name].append(measured)
    # In the first turn kernels warm up and memory is touched for the first time.
    return {name: total(turns[1:]) for name, turns in found.items()}, rates[1:]


def timed(
    args: Namespace, batches: dict[str, Batches], peers: dict[str, throughput_trl.Peer], device: torch.device
) -> tuple[dict[str, Measured], list[float], ModelShape]:
    """The turns of all ways and the matrix rates; the engine ends with this function."""
    engine = make_engine(args)
    ours = {layout: partial(our_turn, engine, layout, batches[layout], device) for layout in batches}
    with contextlib.ExitStack() as stack:
        theirs = {name: stack.enter_context(peer).turn for name, peer in peers.items()}
        rate = partial(matrix_rate, DTYPES[args.dtype], device, args.hidden)
        found, rates = interleaved({**ours, **theirs}, args.rounds, rate)
    if args.profile:
        throughput_profile.print_shares(ours, args.rounds)
    return found, rates, model_shape(engine.module)


def two_steps(args: Namespace, layout: str, batches: Batches, device: torch.device) -> tuple[float, int]:
    """Peak memory of this process in GB over the layout's two steps of most real tokens, and the tokens of the larger.

    The larger comes second: Adam's moments are there from the end of the first step on.
    """
    engine = make_engine(args)
    set_layout(engine, layout)
    largest = sorted((step for turn in batches for step in turn), key=lambda step: step[0].step.tokens)[-2:]
    for step in largest:
        take_step(engine, step, device)
    return peak_memory_gb(), largest[-1][0].step.tokens


def peak_alone(layout: str, folder: str) -> float:
    """`two_steps` of the layout in a process of its own: GB."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", layout, folder]
    environment = throughput_trl.own_environment()
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    peak, tokens = json.loads(output.splitlines()[-1])
    print(f"{layout} alone: {peak:.2f} GB, largest step {tokens} tokens", flush=True)
    return peak


def print_table(found: dict[str, Measured], peaks: dict[str, float], shape: ModelShape, rate: float) -> None:
    print("\n| layout | real tokens/s | x first | padding | peak memory GB | share of matrix rate |")
    print("| --- | --- | --- | --- | --- | --- |")
    first = next(iter(found.values()))
    for name, sums in found.items():
        speed = sums.tokens / sums.seconds
        share = speed * flops_per_token(shape, sums.tokens / sums.samples) / rate
        print(
            f"| {name} | {speed:.0f} | {speed / (first.tokens / first.seconds):.2f} | "
            f"{1 - sums.tokens / sums.cells:.0%} | {peaks[name]:.2f} | {share:.0%} |"
        )


def measure(
    args: Namespace, batches: dict[str, Batches], peers: dict[str, throughput_trl.Peer],
    device: torch.device, folder: str,
) -> None:  # fmt: skip
    found, rates, shape = timed(args, batches, peers, device)
    gc.collect()  # an engine refers to itself
    give_back_freed_memory()
    get_accelerator().empty_cache()
    peaks = {name: peer.peak for name, peer in peers.items()}
    peaks |= {layout: peak_alone(layout, folder) for layout in batches}
    rate, least, most = (value / 1e9 for value in (statistics.median(rates), min(rates), max(rates)))
    where = f"{args.dtype}, {device.type}, {torch.get_num_threads()} threads"
    print(f"\nmatrix rate {rate:.0f} GFLOP/s, {least:.0f} to {most:.0f} ({where})")
    print(f"turns: {args.rounds}; rows or about as many samples a step: {args.micro_batch} of up to {args.max_seq_len}")
    print_table(found, peaks, shape, rate * 1e9)


def main() -> None:
    args = parse_arguments()
    args.dtype, reason = resolve_dtype(args.dtype)
    device = start_process_group(0, 600)
    commit = subprocess.getoutput("git rev-parse --short HEAD")
    print(f"dtype {args.dtype} ({reason}); {commit}; torch {torch.__version__}")
    tokenizer = load_hf_tokenizer(args.tokenizer)
    with contextlib.nullcontext(args.worker[1]) if args.worker else tempfile.TemporaryDirectory() as folder:
        data, _ = create_prompt_dataset(
            0, [args.data_path], "10,0,0", folder, 1, 1234, tokenizer, args.max_seq_len, tokenizer.eos_token
        )
        turns = make_turns(data, args.micro_batch, args.max_seq_len, args.rounds + 1)
        layouts = args.worker[:1] if args.worker else args.layouts.split(",")
        on_cpu = device.type == "cpu"
        batches = {
            layout: layout_batches(args, data, turns, layout, tokenizer.pad_token_id, on_cpu) for layout in layouts
        }
        if args.worker:
            print(json.dumps(two_steps(args, layouts[0], batches[layouts[0]], device)))
        else:
            peers = throughput_trl.peers(args, data, turns, folder) if args.peer else {}
            measure(args, batches, peers, device, folder)


if __name__ == "__main__":
    main()
