"""`--profile_steps A:B`: a trace of some optimizer steps on rank 0, and a table of where their time went."""

import os
import re
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from utils.distributed.ranks import is_rank_0
from utils.logging.console import say
from utils.notation import Steps

FOLDER = "profile"
# Kinds of work by the names of operators and kernels, the first that fits.
KINDS = {
    "communication": r"nccl|c10d|allreduce|all_reduce|allgather|all_gather|reduce_scatter|broadcast|gloo",
    "attention": r"flash|efficient_attention|scaled_dot_product|fmha|_attention",
    "matrix products": r"mm$|^aten::(mm|bmm|addmm|baddbmm|linear|matmul|mkldnn_linear)|gemm|nvjet|cutlass",
    "optimizer": r"adam|multi_tensor|lamb",
    "loss and softmax": r"softmax|cross_entropy|nll_loss|logsumexp",
    "norms": r"norm",
    "dropout": r"dropout|bernoulli|philox",
    "copies": r"copy|memcpy|memset|aten::(to|cat|stack|contiguous|clone)",
    "elementwise": r"elementwise|aten::(add|mul|sub|div|gelu|relu|silu|exp|tanh|sum|fill|zero|pow|sqrt|where)",
}
OTHER = "other"
ROWS = 40  # of the table of operators


class StepProfile:
    """Watches the optimizer steps `steps` (None: none) of rank 0, and writes what it saw to `output_dir`/profile."""

    def __init__(self, steps: Steps | None, output_dir: str | None, done: int) -> None:
        self.steps = steps if is_rank_0() else None
        self.output_dir = output_dir
        self.profiler: profile | None = None
        self.first = 0  # the first step watched
        self.follow(done)

    def follow(self, done: int) -> None:
        """Begin before the step that comes next, or end, now that `done` steps of the run are taken."""
        if self.steps is None:
            return
        if self.profiler is None and self.steps.first <= done + 1 <= self.steps.last:
            activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
            self.profiler, self.first = profile(activities=activities), done + 1
            self.profiler.start()
        elif self.profiler is not None and done >= self.steps.last:
            self.finish(done)

    def finish(self, done: int) -> None:
        """Write trace and tables, if steps are being watched; `done` is the last of them."""
        if self.profiler is None:
            return
        profiler, self.profiler, self.steps = self.profiler, None, None
        profiler.stop()
        folder = os.path.join(self.output_dir, FOLDER)
        os.makedirs(folder, exist_ok=True)
        name = f"steps_{self.first}-{done}"
        trace, tables = os.path.join(folder, f"{name}.json.gz"), os.path.join(folder, f"{name}.txt")
        profiler.export_chrome_trace(trace)
        events = profiler.key_averages()
        shares = shares_by_kind(events)
        with open(tables, "w", encoding="utf-8") as file:
            file.write(f"Steps {self.first} to {done}, with what was evaluated and saved between them\n\n")
            file.write("".join(f"{share:6.1%}  {kind}\n" for kind, share in shares))
            file.write(f"\n{events.table(sort_by=f'self_{_clock(events)}_time_total', row_limit=ROWS)}\n")
        most = ", ".join(f"{share:.0%} {kind}" for kind, share in shares[:4])
        say(f"Profile of steps {self.first} to {done}: {most}. Trace: {trace} (chrome://tracing or ui.perfetto.dev)")


def shares_by_kind(events: Any) -> list[tuple[str, float]]:
    """Return (kind of work, share of the time), the largest first: the device's own time, or a CPU's where it has none.

    Args:
        events: a profiler's averages by name.
    """
    times: dict[str, float] = {}
    for name, time, _ in times_by_name(events):
        times[kind_of(name)] = times.get(kind_of(name), 0.0) + time
    total = sum(times.values()) or 1.0
    return sorted(((kind, time / total) for kind, time in times.items() if time > 0), key=lambda pair: -pair[1])


def times_by_name(events: Any) -> list[tuple[str, float, int]]:
    """Return (name, microseconds, count) of a device's kernels, or of operators where there is no device.

    The operators that started the kernels, and annotations around these, have the kernels' time too: with them it would
    count several times.
    """
    clock = _clock(events)
    return [
        (event.key, getattr(event, f"self_{clock}_time_total"), event.count)
        for event in events
        if clock == "cpu" or (event.device_type != DeviceType.CPU and not event.is_user_annotation)
    ]


def kind_of(name: str) -> str:
    """Return the kind of work of an operator or a kernel."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, flags=re.IGNORECASE)), OTHER)


def _clock(events: Any) -> str:
    return "device" if any(event.self_device_time_total > 0 for event in events) else "cpu"
