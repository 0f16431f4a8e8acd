"""A run of main.py in this process, after which its peak device memory and its memory estimate are printed.

    python benchmarks/gpu/watched_run.py [OWN_FLAGS] -- MAIN_ARGUMENTS

`--untrained` makes random weights in bf16 on the device instead of reading them: writing and reading a model of 13b
would take longer than the measurement. `--profile_at N` records three micro batches from the Nth on, `--terminate_at N`
sends this process SIGTERM in the Nth, `--out_of_memory_at N` asks for more memory than the device has in the Nth,
`--masters` compares ZeRO 3's master weights with the checkpoint before the first, `--no_kernel` makes DeepSpeed's AdamW
fail to build. The last line is `WATCHED` and a JSON object.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
PROFILED = 3  # micro batches

import main as program  # noqa: E402

# isort: split
import torch  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import utils.arguments.preflight  # noqa: E402
import utils.engine.engine  # noqa: E402
import utils.model.model_utils  # noqa: E402
from utils.dry_run.dry_run import largest_micro_batch  # noqa: E402
from utils.dry_run.memory import estimate_memory  # noqa: E402
from utils.model.build import model_form  # noqa: E402
from utils.train.step_profile import shares_by_kind, times_by_name  # noqa: E402


def estimate_before_training(seen: dict[str, Any]) -> None:
    """Make main.py's `train` note the estimate of the run in `seen` before it trains."""
    train = program.train

    def noting(engine: Any, data: Any, config: Any, run: Any, checkpointer: Any) -> None:
        try:
            with torch.random.fork_rng():  # the estimate builds a model, which must not change the run's dropout
                estimate = estimate_memory(
                    config.args.model_name_or_path, model_form(config.args), engine.config,
                    largest_micro_batch(config, data.train), len(checkpointer.tokenizer),
                    fused=config.layout != "max_length",
                ).total  # fmt: skip
            seen.update(estimate=estimate.peak, moments=estimate.moments)
        except Exception as err:  # a fault of the estimate must not end the run that is measured
            seen.update(estimate_error=f"{type(err).__name__}: {err}")
        train(engine, data, config, run, checkpointer)
        seen["finished"] = True

    program.train = noting


def no_kernel(*args: Any, **options: Any) -> None:
    raise RuntimeError("error: not built, as this check asks")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--untrained", action="store_true")
    parser.add_argument("--no_kernel", action="store_true")
    parser.add_argument("--profile_at", type=int)
    parser.add_argument("--terminate_at", type=int)
    parser.add_argument("--out_of_memory_at", type=int)
    parser.add_argument("--masters", action="store_true")
    return parser


def make_weights_on_device() -> None:
    """Make main.py's `create_model` build random weights in bf16 on the device."""
    create = program.create_model

    def untrained(*args: Any) -> torch.nn.Module:
        with torch.device(get_accelerator().current_device_name()):
            return create(*args, untrained=True)

    program.create_model = untrained
    utils.arguments.preflight.check_weights = lambda *args: None  # there are none to read
    program.restore_stored_masters = lambda *args: 0
    utils.model.model_utils._loading_dtype = lambda ds_config, stored: torch.bfloat16


def compare_masters(seen: dict[str, Any]) -> None:
    """Make main.py note in `seen` how many masters it restores, and how far they are from the checkpoint's values."""
    restore = program.restore_stored_masters

    def comparing(engine: Any, name: str) -> int:
        restored, stored = restore(engine, name), load_file(Path(name) / "model.safetensors")
        worst = 0.0
        for key, parameter in engine.module.named_parameters():
            master = safe_get_full_fp32_param(parameter)
            if key in stored:  # an embedding may have more rows
                worst = max(worst, (master[: len(stored[key])].cpu() - stored[key]).abs().max().item())
        seen["masters"] = {"restored": restored, "largest difference": worst}
        return restored

    program.restore_stored_masters = comparing


def run_out_of_memory() -> None:
    """Ask a GPU for more memory than there is; on a CPU, which torch names another error for, raise the GPU's."""
    if torch.cuda.is_available():
        torch.empty(2**44, dtype=torch.uint8, device="cuda")
    raise torch.OutOfMemoryError("out of memory, as this check asks")


def at_micro_batch(seen: dict[str, Any], own: argparse.Namespace) -> None:
    """Make main.py's micro step record a profile into `seen`, or end the run, at these micro batches (from 1)."""
    step, state, profile_at = program.micro_step, {"number": 0, "profiler": None}, own.profile_at

    def watched(*args: Any) -> torch.Tensor:
        state["number"] += 1
        if state["number"] == profile_at:
            state["profiler"] = torch.profiler.profile()
            synchronize()
            state["begun"] = time.perf_counter()
            state["profiler"].__enter__()
        if state["number"] == own.terminate_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if state["number"] == own.out_of_memory_at:
            run_out_of_memory()
        loss = step(*args)
        if state["profiler"] is not None and state["number"] == profile_at + PROFILED - 1:
            synchronize()
            wall = time.perf_counter() - state["begun"]
            state["profiler"].__exit__(None, None, None)
            seen["profile"] = profile_figures(state["profiler"], wall)
            state["profiler"] = None
        return loss

    program.micro_step = watched


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def profile_figures(profiler: Any, wall: float) -> dict[str, Any]:
    """Return what bounds `wall` seconds: how busy the device is, the share of each kind of kernel, the longest ones."""
    events = profiler.key_averages()
    longest = sorted(times_by_name(events), key=lambda one: -one[1])
    busy = sum(time for _, time, _ in longest) / 1e6 / wall
    shares = [*((kind, share * busy) for kind, share in shares_by_kind(events)), ("no kernel", max(1 - busy, 0.0))]
    top = [f"{name[:60]} {time / 1e6 / wall:.1%} x{count}" for name, time, count in longest[:12]]
    return {
        "busy": f"{busy:.0%}", "profile of": f"{PROFILED} micro batches, {wall * 1000:.0f} ms",
        "most time in": max(shares, key=lambda one: one[1])[0],
        "kinds": ", ".join(f"{kind} {share:.0%}" for kind, share in shares), "top": top,
    }  # fmt: skip


def main() -> None:
    split = sys.argv.index("--")
    own, given = build_parser().parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    seen: dict[str, Any] = {}
    estimate_before_training(seen)
    at_micro_batch(seen, own)
    if own.masters:
        compare_masters(seen)
    if own.untrained:
        make_weights_on_device()
    if own.no_kernel:
        utils.engine.engine.FusedAdam = no_kernel
    try:
        program.run(given)
    finally:
        accelerator = get_accelerator()
        if accelerator.device_name() != "cpu":
            seen.update(
                allocated=accelerator.max_memory_allocated(), reserved=torch.cuda.max_memory_reserved(),
                total=accelerator.total_memory(),
            )  # fmt: skip
        print("WATCHED " + json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
