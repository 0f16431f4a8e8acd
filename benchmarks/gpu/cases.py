"""The checks of the GPU check (`check.py`): what each runs, and how its result is judged."""

import itertools
import json
import re
import shutil
import statistics
import time
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from benchmarks.gpu.processes import REFUSED, RIGHT, WRONG, Finished, Outcome, memory_figures, run_process
from benchmarks.gpu.random_models import (
    make_dialogues,
    make_records,
    make_shape,
    make_small,
    make_small_llama,
    read_dialogues,
)

REFERENCE = "reference: float32 on the CPU"
# Largest difference of a step's loss from the reference, relative to it, over twenty steps of a small model.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 5e-3}
RESUMED_TOLERANCE = 5e-3  # a resumed run may not be equal bit for bit: flash attention adds in no fixed order
ESTIMATE_TOLERANCE = 0.15
SMOKE_SECONDS = 60
LORA_ALONE = ["--lora_dim", 16, "--lora_module_name", "auto", "--only_optimize_lora"]
LORA = ["--lora_dim", 16, "--lora_module_name", "auto", "--only_optimize_lora", "--gradient_checkpointing"]


class Context:
    """What checks share: models, data, each other's results, and running main.py."""

    def __init__(
        self, device: str, folder: Path, limit: float, data_path: Path | None, results: dict,
        deadline: float = float("inf"), log: Path | None = None,
    ) -> None:  # fmt: skip
        self.device, self.folder, self.data_path, self.results = device, folder, data_path, results
        self.longest, self.deadline, self.log = limit, deadline, log

    @property
    def limit(self) -> float:
        """Return the seconds a process may take: no more than are left until the deadline (`time.monotonic`)."""
        return max(1.0, min(self.longest, self.deadline - time.monotonic()))

    def process(self, command: list[Any], device: str | None = None, limit: float | None = None) -> Finished:
        """Run a Python command on the device; a failed one leaves its whole output in the log."""
        return run_process(command, device or self.device, min(limit or self.limit, self.limit), self.log)

    @cached_property
    def small(self) -> Path:
        return make_small(self.folder / "small", self.device == "cpu")

    @cached_property
    def small_llama(self) -> Path:
        return make_small_llama(self.folder / "small_llama", self.device == "cpu")

    @cached_property
    def records(self) -> Path:
        return make_records(self.folder / "records")

    @cached_property
    def dialogues(self) -> Path:
        on_cpu = self.device == "cpu"
        if self.data_path is not None:
            return read_dialogues(self.data_path, self.folder / "dialogues", 64 if on_cpu else 2000)
        return make_dialogues(self.folder / "dialogues", 24 if on_cpu else 2000, 64 if on_cpu else 512)

    @cache  # noqa: B019 - a process has one context
    def shape(self, name: str) -> Path:
        return make_shape(self.folder / name, name)

    def run(self, *flags: Any, watch: Sequence[str] = (), device: str | None = None) -> Finished:
        """Run main.py with these arguments by `watched_run.py`, with the flags `watch` of its own."""
        places = ["--data_split", "10,0,0", "--data_output_path", self.folder / "cache"]
        return self.process(["benchmarks/gpu/watched_run.py", *watch, "--", *places, *flags], device)

    def train_small(self, *flags: Any, watch: Sequence[str] = (), device: str | None = None) -> Finished:
        """Run twenty steps of eight short samples, as `tests/reference_run.py` does, unless flags change that."""
        settings = [
            "--model_name_or_path", self.small, "--data_path", self.records, "--max_seq_len", 64, "--print_loss",
            "--per_device_train_batch_size", 8, "--num_train_epochs", 2, "--learning_rate", 1e-3,
        ]  # fmt: skip
        return self.run(*settings, *flags, watch=watch, device=device)

    def reference(self) -> dict[str, list[float]]:
        """Return the losses of the reference, which is run now unless a check has run it."""
        if self.results.get(REFERENCE, {}).get("verdict") != RIGHT:
            self.results[REFERENCE] = {**vars(reference(self)), "seconds": 0.0}
        return self.results[REFERENCE]["figures"]


def reference(context: Context) -> Outcome:
    """Run the reference: plain torch and transformers, one document at a time, none of the code under test."""
    done = context.process(["tests/reference_run.py", context.small, context.records], "cpu")
    if done.failure():
        return done.failure()
    figures = json.loads(done.output[done.output.index("{") : done.output.rindex("}") + 1])
    return Outcome(RIGHT, f"{len(figures['losses'])} steps, loss {falls(figures['losses'])}", figures)


def falls(losses: list[float]) -> str:
    return f"{losses[0]:.3f} to {losses[-1]:.3f}"


def largest_difference(losses: list[float], expected: list[float]) -> float:
    """Return the largest relative difference; infinite where the number of steps differs or a loss is NaN."""
    if len(losses) != len(expected):
        return float("inf")
    differences = [abs(loss - right) / right for loss, right in zip(losses, expected, strict=True)]
    return max(differences) if all(value == value for value in differences) else float("inf")


def smoke(context: Context) -> Outcome:
    """Run `smoke.py`: imports, the compiler, a step in bf16, and a collective of one rank, within a minute."""
    done = context.process(["benchmarks/gpu/smoke.py", context.device], limit=SMOKE_SECONDS)
    seen = dict(re.findall(r"^SMOKE (\w+): (.*)$", done.output, re.MULTILINE))
    return done.failure() or Outcome(RIGHT, "", seen)


def curve(
    context: Context, dtype: str, flags: Sequence[Any] = (), optimizer: str = "FusedAdam", watch: Sequence[str] = (),
    said: str = "",
) -> Outcome:  # fmt: skip
    """Check that training and evaluation losses are within the precision's tolerance of the float32 reference.

    said: begins a line that the run must print.
    """
    done = context.train_small("--dtype", dtype, "--disable_dropout", *flags, watch=watch)
    if done.failure():
        return done.failure()
    expected = context.reference()
    differences = [
        largest_difference(done.losses(), expected["losses"]),
        largest_difference(done.evaluations(), expected["eval_losses"]),
    ]
    figures = {
        "largest difference": f"{max(differences):.2e} (at most {TOLERANCE[dtype]:.0e})",
        "loss": falls(done.losses()), "optimizer": done.found("Optimizer: (.*)"), "losses": done.losses(),
    }  # fmt: skip
    kernel_missing = not str(figures["optimizer"]).startswith(optimizer)
    faults = [f"{optimizer} is not what ran"] if kernel_missing else []
    faults += [] if done.found(f"({said})") is not None else [f"no line {said!r}"]
    right = max(differences) < TOLERANCE[dtype] and not faults
    return Outcome(RIGHT if right else WRONG, "; ".join(faults), figures)


def overflow(context: Context) -> Outcome:
    """Check fp16 from a loss scale too large for gradients: steps are skipped, the scale falls and rises again."""
    config = context.folder / "overflow.json"
    scaling = {"enabled": True, "initial_scale_power": 32, "loss_scale_window": 3, "hysteresis": 1}
    config.write_text(json.dumps({"fp16": scaling}), encoding="utf-8")
    flags = ["--dtype", "fp16", "--deepspeed_config", config, "--num_train_epochs", 8, "--max_bad_steps", 1]
    done = context.train_small("--disable_dropout", *flags)
    if done.failure():
        return done.failure()
    pattern = r"^Step (\d+) skipped: gradients overflowed fp16, the loss scale is now (\S+) \((\d+) such"
    skipped = [(int(step), float(scale), int(count)) for step, scale, count in re.findall(pattern, done.output, re.M)]
    scales = [scale for _, scale, _ in skipped]
    in_a_row = [one[1] / two[1] for one, two in itertools.pairwise(skipped) if two[0] == one[0] + 1]
    losses = done.losses()
    conditions = {
        "none was skipped": bool(skipped),
        "they are not counted": [count for _, _, count in skipped] == list(range(1, len(skipped) + 1)),
        "the scale does not halve": bool(in_a_row) and all(abs(ratio - 2) < 1e-3 for ratio in in_a_row),
        "the scale never rose again": any(later >= one for one, later in itertools.pairwise(scales)),
        "the loss did not fall": len(losses) > 40 and losses[-1] < losses[0],
    }  # fmt: skip
    faults = [fault for fault, holds in conditions.items() if not holds]
    figures = {"skipped": len(skipped), "of": len(losses), "loss": falls(losses), "scales": scales}
    figures |= {"lowest scale": min(scales, default=None)}
    return Outcome(WRONG if faults else RIGHT, "; ".join(faults), figures)


def kernels(context: Context, what: str, dtype: str) -> Outcome:
    """Check the cases of `kernel_checks.py`; the table has their largest differences, the results file every case."""
    command = ["benchmarks/gpu/kernel_checks.py", what, "--dtype", dtype, "--device", context.device]
    done = context.process(command)
    cases, failure = done.cases(), done.failure()
    figures: dict[str, Any] = {"cases": cases, "right": sum(case["right"] for case in cases), "of": len(cases)}
    for name in ("logits", "loss", "gradients", "weights", "norm"):
        values = [case[name] for case in cases if name in case]
        figures |= {name: f"{max(values):.1e}"} if values else {}
    if what == "attention":
        figures["kernels"] = ", ".join(f"{case['case']} {case['kernel']}" for case in cases)
        waits = [f"{case['case']} {case['waits']}" for case in cases if case["waits"]]
        figures["host waits for the GPU"] = ", ".join(waits) or "never"
    if failure:
        return Outcome(failure.verdict, failure.words, figures)
    wrong = ", ".join(case["case"] for case in cases if not case["right"])
    return Outcome(WRONG if wrong or not cases else RIGHT, wrong, figures)


def lora(context: Context, flags: Sequence[Any] = ()) -> Outcome:
    """Check that LoRA has the losses of float32 on the CPU, and is merged, saved and verified."""
    settings = ["--disable_dropout", "--lora_learning_rate", 1e-2, *LORA, *flags]
    done = context.train_small("--dtype", "bf16", "--output_dir", context.folder / "lora", *settings)
    if done.failure():
        return done.failure()
    figures = {"loss": falls(done.losses()), "saved, logits differ by": done.found(r".*verified: .* by (\S+) of")}
    fell = done.evaluations()[-1] < done.evaluations()[0]
    if flags:  # ZeRO 3 draws LoRA's weights on the device, so losses differ from those on the CPU
        verdict = RIGHT if fell and figures["saved, logits differ by"] else WRONG
        return Outcome(verdict, "", figures)
    plain = context.train_small("--dtype", "fp32", *settings, device="cpu")
    if plain.failure():
        return plain.failure()
    difference = largest_difference(done.losses(), plain.losses())
    figures["largest difference"] = f"{difference:.2e} (at most {TOLERANCE['bf16']:.0e})"
    right = difference < TOLERANCE["bf16"] and fell and figures["saved, logits differ by"]
    return Outcome(RIGHT if right else WRONG, "", figures)


def resume(context: Context, flags: Sequence[Any] = ()) -> Outcome:
    """Check that a run resumed at step 7, with dropout, has the losses of the uninterrupted run."""
    folder = context.folder / f"resume{len(list(context.folder.glob('resume*')))}"
    keep = ["--output_dir", folder, "--save_strategy", "steps", "--save_steps", 7, "--save_total_limit", 0]
    whole = context.train_small("--dtype", "bf16", *keep, *flags)
    if whole.failure():
        return whole.failure()
    for later in (folder / "checkpoints").glob("step-*"):
        if later.name != "step-000007":
            shutil.rmtree(later)
    again = context.train_small("--dtype", "bf16", *keep, *flags, "--resume_from_checkpoint", "latest")
    if again.failure():
        return again.failure()
    expected = whole.losses()[7:]
    difference = largest_difference(again.losses(), expected)
    same = "bit for bit" if again.losses() == expected else f"within {difference:.1e}, not bit for bit"
    return Outcome(RIGHT if difference < RESUMED_TOLERANCE else WRONG, f"{len(expected)} losses {same}")


def speed(
    context: Context, shape: str, micro: int, flags: Sequence[Any] = (), steps: int = 40, profiled: bool = False
) -> Outcome:
    """Measure the speed of the last three quarters of `steps`, by main.py's throughput lines.

    No weights are read or saved. With `profiled` three steps are recorded by torch's profiler: which kernels take the
    device's time, and how much of it the device is idle.
    """
    on_cpu = context.device == "cpu"
    # In the first quarter, which is not timed.
    watch = ["--untrained", *(["--profile_at", "5"] if profiled else [])]
    length = [] if "--max_seq_len" in flags else ["--max_seq_len", 64 if on_cpu else 512]
    done = context.run(
        "--model_name_or_path", context.shape(shape), "--data_path", context.dialogues, *length,
        "--per_device_train_batch_size", micro, "--max_steps", steps, "--logging_steps", max(steps // 4, 1),
        "--dtype", "bf16", "--learning_rate", 1e-5, *flags, watch=watch,
    )  # fmt: skip
    if done.failure():
        return done.failure()
    rates = re.findall(r"^.*Throughput: (\d+) real tokens/s", done.output, re.MULTILINE)
    if not rates:
        return Outcome(WRONG, "no throughput line was printed")
    samples = done.found(r".*Throughput: .*, (\S+) samples/s")
    share = done.found(r".*Throughput: .* per device \((\d+\.\d+%) of ")
    seen = done.watched() or {}
    figures = {
        "tokens/s": round(statistics.harmonic_mean([float(rate) for rate in rates[1:] or rates])),
        "TFLOP/s": done.found(r".*Throughput: .*, (\S+) TFLOP/s"), "of peak": share or "unknown",
        "tokens a sample": round(int(rates[-1]) / max(float(samples), 1e-9)),
        "padding": done.found(r"Step .*? padding (\S+),"), **memory_figures(seen), **seen.get("profile", {}),
    }  # fmt: skip
    return Outcome(RIGHT, "", figures)


def memory(context: Context, shape: str, micro: int, flags: Sequence[Any] = ()) -> Outcome:
    """Check that the memory estimate is within 15% of the peak allocated memory of three steps."""
    if context.device == "cpu":
        return Outcome(REFUSED, "for a GPU's memory; benchmarks/memory_estimate.py measures a CPU's")
    outcome = speed(context, shape, micro, flags, steps=3)
    if outcome.verdict != RIGHT:
        return outcome
    figures = {key: value for key, value in outcome.figures.items() if "GB" in key or "estimate" in key}
    if "estimate off by" not in figures:
        return Outcome(WRONG, "no device memory was measured", figures)
    error = float(figures["estimate off by"].rstrip("%")) / 100
    return Outcome(RIGHT if abs(error) <= ESTIMATE_TOLERANCE else WRONG, "", figures)
