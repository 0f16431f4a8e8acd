"""What training costs as it grows: measured here on 1 and 2 ranks, and worked out for more GPUs.

    python benchmarks/scaling/scaling.py measure [--only zero|length] [--out scaling.json]
    python benchmarks/scaling/scaling.py model [--node 8] [--share_of_peak 0.4] ...

`measure` trains a small random OPT as main.py trains it: ZeRO 0 to 3 on one and two ranks, and one rank on ever longer
samples, the same number of tokens a step. Communication is counted by wrapping torch.distributed's collectives, in
steps of their own whose collectives are waited for one by one: bytes and seconds without any overlap. DeepSpeed's own
comms logger is no use here, since it stops its clock when an asynchronous collective has been started. `model` prints
tables from the arithmetic of `step_model.py` with all its assumptions.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.memory_estimate import SMALL_PAGES, _reset_peak, process_memory  # noqa: E402
from benchmarks.ranks import results_of_ranks  # noqa: E402
from benchmarks.scaling import step_model as scaling_model  # noqa: E402
from benchmarks.scaling import tables as scaling_tables  # noqa: E402

FULL = 4  # bytes of a float32
COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")
ZERO_MODEL = {"hidden": 384, "layers": 4, "lengths": [64, 128, 192, 256]}
LONG_MODEL = {"hidden": 256, "layers": 2}
LONG_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
TOKENS = 16384  # a step of every length
VOCABULARY = 8192
STEPS = 2  # with the collectives counted, and as many timed without


class Collectives:
    """Payload bytes and seconds of torch.distributed's collectives, by name, while `counting`."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.counting = False

    def install(self) -> None:
        """Wrap the functions DeepSpeed calls; before its process group starts, since it keeps some of them."""
        import torch.distributed as dist
        from torch.distributed import distributed_c10d

        for name in COLLECTIVES:
            wrapped = self._wrap(name, getattr(dist, name))
            for module in (dist, distributed_c10d):
                setattr(module, name, wrapped)

    def _wrap(self, name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if not self.counting:
                return function(*args, **kwargs)
            start = time.perf_counter()
            work = function(*args, **kwargs)
            if work is not None:
                work.wait()
            self.seconds[name] += time.perf_counter() - start
            self.bytes[name] += payload(name, [*args, *kwargs.values()])
            return work

        return counted

    @contextmanager
    def count(self) -> Iterator[None]:
        self.counting = True
        yield
        self.counting = False


def payload(name: str, arguments: list[Any]) -> int:
    """Bytes of the whole tensor: what is gathered, or what is reduced, before it is scattered."""
    import torch

    tensors = [value for value in arguments if torch.is_tensor(value)]
    lists = [value for value in arguments if isinstance(value, list) and value and torch.is_tensor(value[0])]
    if name == "all_gather":
        return sum(tensor.nbytes for tensor in lists[0])
    return max(tensor.nbytes for tensor in tensors)


def sent_bytes(moved: dict[str, int], ranks: int) -> float:
    """Bytes a rank sends for these payloads by ring algorithms, counted as in `step_model.Traffic.sent`."""
    passes = {"all_reduce": 2}
    return (ranks - 1) / ranks * sum(passes.get(name, 1) * size for name, size in moved.items())


def make_model(setting: dict[str, Any]) -> Any:
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=setting["hidden"], word_embed_proj_dim=setting["hidden"], ffn_dim=4 * setting["hidden"],
        num_hidden_layers=setting["layers"], num_attention_heads=setting["hidden"] // 64, vocab_size=VOCABULARY,
        max_position_embeddings=max(512, *setting["lengths"]), dropout=0.0,
    )  # fmt: skip
    return OPTForCausalLM(config)


def run_steps(setting: dict[str, Any], collectives: Collectives, device: Any) -> dict[str, Any]:
    """Train some steps of one setting in this process, which is one rank; a process group stands.

    Returns:
        parameters; tokens of this rank's step; seconds of a step; counted_seconds of a step whose collectives are
        waited for one by one; bytes and communication_seconds of its collectives.
    """
    import torch
    import torch.distributed as dist

    from utils.data.batching.batches import collate_for
    from utils.ds_utils import get_train_ds_config
    from utils.engine.engine import create_optimizer, initialize_engine
    from utils.model.layout_check import choose_layout
    from utils.model.model_utils import count_parameters
    from utils.module.fused_loss import summed_loss

    lengths = setting["lengths"]
    config = get_train_ds_config(False, setting["stage"], "fp32")
    config["zero_optimization"].update(setting.get("zero", {}))
    config["train_micro_batch_size_per_gpu"] = len(lengths)
    del config["train_batch_size"]  # from the micro batch
    model = make_model(setting)
    engine = initialize_engine(model, create_optimizer(model, 1e-5), config)
    choose_layout(engine.module, "free", VOCABULARY, device)
    engine.train()
    samples = [{"input_ids": torch.randint(4, VOCABULARY, (length,))} for length in lengths]
    batch = collate_for("free", 1, max(lengths))([{**s, "labels": s["input_ids"]} for s in samples])

    def timed(steps: int) -> float:
        dist.barrier()
        start = time.perf_counter()
        for _ in range(steps):
            engine.set_gradient_accumulation_boundary(True)
            engine.backward(summed_loss(engine, batch) / sum(lengths))
            engine.step()
        return (time.perf_counter() - start) / max(steps, 1)

    steps = setting.get("steps", STEPS)
    timed(1)  # the first step of ZeRO 3 learns in which order weights are used
    seconds = timed(steps)
    collectives.bytes.clear()
    collectives.seconds.clear()
    counted_seconds = 0.0
    if dist.get_world_size() > 1:
        with collectives.count():
            counted_seconds = timed(steps)
    return {
        "parameters": count_parameters(engine.module)[0], "tokens": sum(lengths), "seconds": seconds,
        "counted_seconds": counted_seconds, "bytes": {k: v / steps for k, v in collectives.bytes.items()},
        "communication_seconds": sum(collectives.seconds.values()) / steps,
    }  # fmt: skip


def work(settings: list[dict[str, Any]]) -> None:
    """One rank, in a process of its own: figures of every setting in turn, and the peak memory of the first."""
    import torch

    from utils.distributed.process_group import start_process_group
    from utils.engine.engine import create_optimizer

    collectives = Collectives()
    collectives.install()
    device = start_process_group(int(os.environ.get("LOCAL_RANK", 0)), 600)
    tiny = torch.nn.Linear(64, 64)  # what libraries load at first use is no part of training
    tiny(torch.randn(64, 64)).sum().backward()
    create_optimizer(tiny, 1e-5)
    start = process_memory("VmRSS")
    _reset_peak()
    results = [run_steps(settings[0], collectives, device)]
    results[0]["memory"] = process_memory("VmHWM") - start
    results += [run_steps(setting, collectives, device) for setting in settings[1:]]
    print("RESULT " + json.dumps(results), flush=True)


def measured(settings: list[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
    """Of every setting the slowest rank's seconds, and rank 0's bytes."""
    of_ranks = results_of_ranks([__file__, "work", "--setting", json.dumps(settings)], ranks, SMALL_PAGES)
    merged = []
    for results in zip(*of_ranks, strict=True):
        slowest = {key: max(result[key] for result in results) for key in ("seconds", "counted_seconds")}
        fastest = min(result["communication_seconds"] for result in results)  # the other one waited for this one
        merged.append({**results[0], **slowest, "communication_seconds": fastest})
    return merged


def agreement(result: dict[str, Any], way: "Way", ranks: int) -> float:
    """Measured bytes a rank sends, relative to the formula."""
    weights = result["parameters"]
    formula = scaling_model.traffic(way.stage, weights, weights, FULL, **way.formula)
    return sent_bytes(result["bytes"], ranks) / formula.sent(ranks, ranks)


class Way(NamedTuple):
    """A ZeRO setting, what it changes in DeepSpeed's configuration, and in the formula's arguments."""

    name: str
    stage: int
    zero: dict[str, Any]
    formula: dict[str, Any]
    psi: str  # bytes a rank sends in multiples of the weights', times (N - 1) / N


RELEASED = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}


def ways(hidden: int) -> list[Way]:
    """ZeRO 0 to 3; stage 3 with weights released after use, as in a large model, and all kept, as in a small one."""
    return [
        Way("0", 0, {}, {}, "2"),
        Way("1", 1, {}, {}, "3"),
        Way("2", 2, {}, {}, "3"),
        Way("2, reduce", 2, {"use_multi_rank_bucket_allreduce": False}, {"as_published": True}, "2"),
        Way("3, kept", 3, {}, {"live": 3e7}, "2"),
        Way("3, released", 3, RELEASED, {"tied": VOCABULARY * hidden}, "3 + 2 x tied"),
    ]


def measure_zero(rounds: int) -> list[dict[str, Any]]:
    """Every way in turn, on one rank and on two; the fastest round of each counts. Memory: `memory.py` has it."""
    tried = ways(ZERO_MODEL["hidden"])
    settings = [{**ZERO_MODEL, "stage": way.stage, "zero": way.zero} for way in tried] * rounds
    rows = {ranks: measured(settings, ranks) for ranks in (1, 2)}
    found = []
    print("| ZeRO | tokens/s, 1 rank | 2 ranks | of twice one | MB sent a step | Psi | measured / formula |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for place, way in enumerate(tried):
        best = {r: min(rows[r][place :: len(tried)], key=lambda row: row["seconds"]) for r in rows}
        speeds = {ranks: ranks * row["tokens"] / row["seconds"] for ranks, row in best.items()}
        for ranks, row in best.items():
            found.append({**row, "ranks": ranks, "way": way.name, "tokens_per_second": speeds[ranks]})
        print(
            f"| {way.name} | {speeds[1]:.0f} | {speeds[2]:.0f} | {speeds[2] / (2 * speeds[1]):.0%} | "
            f"{sent_bytes(best[2]['bytes'], 2) / 1e6:.1f} | {way.psi} | {agreement(best[2], way, 2):.4f} |",
            flush=True,
        )
    print("\n| ZeRO, 2 ranks | s a step | waited for one by one | of it communication | collectives, MB payload |")
    print("| --- | --- | --- | --- | --- |")
    for row in (row for row in found if row["ranks"] > 1):
        share = row["communication_seconds"] / row["counted_seconds"]
        parts = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in row["bytes"].items())
        print(f"| {row['way']} | {row['seconds']:.2f} | {row['counted_seconds']:.2f} | {share:.0%} | {parts} |")
    return found


def measure_lengths() -> list[dict[str, Any]]:
    """One rank, one step of 16,384 tokens in ever longer samples."""
    found = []
    print("\n| tokens a sample | tokens/s | x 512 | MB | seconds a step |\n| --- | --- | --- | --- | --- |")
    for length in LONG_LENGTHS:
        setting = {**LONG_MODEL, "lengths": [length] * (TOKENS // length), "stage": 0, "steps": 1}
        [row] = measured([setting], 1)
        found.append({**row, "length": length, "tokens_per_second": row["tokens"] / row["seconds"]})
        ratio = found[-1]["tokens_per_second"] / found[0]["tokens_per_second"]
        print(
            f"| {length} | {found[-1]['tokens_per_second']:.0f} | {ratio:.2f} | {row['memory'] / 1e6:.0f} | "
            f"{row['seconds']:.1f} |",
            flush=True,
        )
    return found


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "model", "work"])
    parser.add_argument("--only", choices=["zero", "length"], help="measure this part alone")
    parser.add_argument("--rounds", type=int, default=1, help="of the ZeRO settings, in turns")
    parser.add_argument("--out", type=Path, help="also write what was measured as JSON")
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    scaling_tables.add_arguments(parser)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.what == "work":
        work(json.loads(args.setting))
    elif args.what == "model":
        print(scaling_tables.tables(args))
    else:
        zero = measure_zero(args.rounds) if args.only != "length" else []
        lengths = measure_lengths() if args.only != "zero" else []
        if args.out:
            args.out.write_text(json.dumps({"zero": zero, "lengths": lengths}, indent=1))


if __name__ == "__main__":
    main()
