"""What the time of a training step goes to, by kind of work: `throughput.py --profile`."""

from collections import Counter
from collections.abc import Callable
from typing import Any

STEP, OPTIMIZER = "benchmark: step", "benchmark: optimizer"
MATRIX = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
LOSS = ("_FusedLoss", "cross_entropy", "log_softmax", "LogSoftmax", "index_select", "IndexSelect")  # rows are picked
ATTENTION = ("scaled_dot_product", "flash_attention", "aten::cat", "SliceBackward")  # a row is cut into its documents
KINDS = ("matrix products", "attention", "layer norm", "elementwise", "loss", "optimizer", "other")
ELEMENTWISE = (
    "add", "add_", "mul", "mul_", "div", "div_", "sub", "relu", "clamp_min", "threshold_backward", "dropout",
    "native_dropout", "native_dropout_backward", "bernoulli_", "copy_", "sum", "fill_", "zero_", "empty_like",
)  # fmt: skip


def kind_of(names: list[str]) -> str:
    """The kind of an operation; `names` are its own and those it was called by, innermost first."""
    name = names[0]
    if OPTIMIZER in names:
        return "optimizer"
    if name in MATRIX:
        return "matrix products"
    if any(part in each for part in LOSS for each in names) and not any("embedding" in each for each in names):
        return "loss"
    if any(part in each for part in ATTENTION for each in names):
        return "attention"
    if any("layer_norm" in each for each in names):
        return "layer norm"
    return "elementwise" if name.removeprefix("aten::") in ELEMENTWISE else "other"


def seconds_by_kind(events: Any) -> tuple[Counter[str], Counter[str]]:
    """Seconds of each kind, and of each name in "other"; `events` of torch.profiler, inside `STEP` alone."""
    kinds: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for event in events:
        names, caller = [event.name], event.cpu_parent
        while caller is not None:
            names.append(caller.name)
            caller = caller.cpu_parent
        if STEP not in names:
            continue
        kind, seconds = kind_of(names), event.self_cpu_time_total / 1e6
        kinds[kind] += seconds
        if kind == "other":
            others[event.name] += seconds
    return kinds, others


def print_shares(ways: dict[str, Callable[[int], Any]], turns: int) -> None:
    """Profile turns 1 to `turns` of each way, on the CPU's clock (a GPU's kernels are not told apart by it)."""
    from torch.profiler import ProfilerActivity, profile

    rows, largest = [], []
    for name, way in ways.items():
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for number in range(1, turns + 1):
                way(number)
        kinds, others = seconds_by_kind(profiler.events())
        total = sum(kinds.values())
        rows.append(f"| {name} | {total / turns:.1f} |" + "".join(f" {kinds[kind] / total:.0%} |" for kind in KINDS))
        most = ", ".join(f"{other} {value / total:.1%}" for other, value in others.most_common(6))
        largest.append(f"other of {name}: {most}")
    print(f"\nshare of the time of {turns} turns\n")
    print("| layout | s a turn |" + "".join(f" {kind} |" for kind in KINDS))
    print("| --- " * (len(KINDS) + 2) + "|")
    print("\n".join([*rows, "", *largest]))
