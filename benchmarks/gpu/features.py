"""Checks of the GPU check (`check.py`) for what a run may do besides: signals, streams, tiles, 4 bits, less memory."""

import re
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.cases import LORA, TOLERANCE, Context, falls, largest_difference
from benchmarks.gpu.processes import RIGHT, WRONG, Outcome


def interrupted(context: Context) -> Outcome:
    """Check that a run that is told to end (SIGTERM) saves a checkpoint and goes on from it."""
    keep = ["--dtype", "bf16", "--output_dir", context.folder / "interrupted", "--save_strategy", "epoch"]
    done = context.train_small(*keep, watch=["--terminate_at", "5"])
    saved = sorted(folder.name for folder in (context.folder / "interrupted" / "checkpoints").glob("step-*"))
    again = context.train_small(*keep, "--resume_from_checkpoint", "latest")
    figures = {"checkpoint": ", ".join(saved) or "none", "steps before": len(done.losses())}
    if not saved:
        return Outcome(WRONG, f"exit status {done.status} and no checkpoint", figures)
    return again.failure() or Outcome(RIGHT, f"{len(again.losses())} steps after it", figures)


def streaming(context: Context) -> Outcome:
    """Check that a run that reads its data window by window, in an order of its own, learns."""
    done = context.train_small("--dtype", "bf16", "--streaming", 200, "--max_steps", 20)
    if done.failure():
        return done.failure()
    losses = done.losses()
    return Outcome(RIGHT if len(losses) == 20 and losses[-1] < losses[0] else WRONG, f"loss {falls(losses)}")


def answers(context: Context) -> Outcome:
    """Check that prompt_eval.py answers with a model beside itself, and that both give the same answers."""
    done = context.process(
        ["prompt_eval.py", "--model_name_or_path_baseline", context.small, "--model_name_or_path_finetune",
         context.small, "--max_new_tokens", 8]
    )  # fmt: skip
    if done.failure():
        return done.failure()
    texts: dict[str, list[str]] = {"Baseline": [], "finetune": []}
    for name, text in re.findall(r"^=+(Baseline|finetune): [^\n]*=\n(.*?)(?=^=====)", done.output, re.M | re.S):
        texts[name].append(text.strip())
    same = texts["Baseline"] == texts["finetune"]
    right = same and texts["Baseline"] and all(texts["Baseline"])
    words = "answers, the same from both" if same else "answers, not the same from both"
    return Outcome(RIGHT if right else WRONG, f"{len(texts['Baseline'])} {words}")


def like_float32(context: Context, flags: Sequence[Any] = (), common: Sequence[Any] = (), said: str = "") -> Outcome:
    """Check that a run in bf16 with `flags` has the losses of one without them in float32 on the CPU.

    Args:
        common: flags of both runs.
        said: a line that the run must print begins with a match of this.
    """
    done = context.train_small("--dtype", "bf16", "--disable_dropout", *common, *flags)
    if done.failure():
        return done.failure()
    plain = context.train_small("--dtype", "fp32", "--disable_dropout", *common, device="cpu")
    if plain.failure():
        return plain.failure()
    difference = max(
        largest_difference(done.losses(), plain.losses()), largest_difference(done.evaluations(), plain.evaluations())
    )
    line = done.found(f"({said}.*)")
    figures = {
        "largest difference": f"{difference:.2e} (at most {TOLERANCE['bf16']:.0e})",
        "printed": line and line[:60],
    }
    figures["loss"] = falls(done.losses())
    right = difference < TOLERANCE["bf16"] and line is not None
    return Outcome(RIGHT if right else WRONG, "", figures)


def tiled(context: Context) -> Outcome:
    """Check a small Llama, whose blocks have an MLP of their own, with tiled MLPs."""
    return like_float32(context, ["--tiled_mlp"], ["--model_name_or_path", context.small_llama], "Tiled MLP")


def quantized(context: Context) -> Outcome:
    """Check LoRA over weights in 4 bits, which bitsandbytes' kernels on a GPU and on a CPU must read alike."""
    common = [*LORA, "--lora_learning_rate", 1e-2, "--quantize_base", "nf4"]
    return like_float32(context, common=common, said=".*weights .* in NF4")


def masters(context: Context) -> Outcome:
    """Check that master weights under ZeRO 3 begin as the checkpoint's float32 values."""
    done = context.train_small("--dtype", "bf16", "--zero_stage", 3, "--max_steps", 2, watch=["--masters"])
    if done.failure():
        return done.failure()
    found = (done.watched() or {}).get("masters", {})
    right = found.get("restored", 0) > 0 and found.get("largest difference") == 0
    return Outcome(RIGHT if right else WRONG, "", found)


def stepped_down(context: Context) -> Outcome:
    """Check that a run with --fit that runs out of memory goes on from its checkpoint, and takes the same steps."""
    folder = context.folder / "stepped_down"
    keep = ["--output_dir", folder, "--save_strategy", "steps", "--save_steps", 2]
    flags = ["--dtype", "bf16", "--disable_dropout", "--fit", *keep]
    done = context.train_small(*flags, watch=["--out_of_memory_at", "5"])
    if done.failure() and "once, it goes on" not in done.output:
        return done.failure()
    difference = largest_difference(done.evaluations(), context.reference()["eval_losses"])
    choices = re.findall(r"^  \* (.*?): ", done.output, re.MULTILINE)
    figures = {"settings": ", then ".join(choices), "evaluation losses differ by": f"{difference:.2e}"}
    if done.failure():
        return Outcome(WRONG, done.failure().words, figures)
    right = len(choices) == 2 and difference < TOLERANCE["bf16"]
    return Outcome(RIGHT if right else WRONG, "", figures)


def optimizer_speed(context: Context) -> Outcome:
    """Measure the optimizer step in one sweep against DeepSpeed's own, by `benchmarks/optimizer_step.py`."""
    done = context.process(["benchmarks/optimizer_step.py", "--rounds", 3 if context.device == "cpu" else 12])
    if done.failure():
        return done.failure()
    figures = dict(re.findall(r"^(DeepSpeed's|in one sweep|ratio of a round): (.*)$", done.output, re.MULTILINE))
    return Outcome(RIGHT if len(figures) == 3 else WRONG, "", figures)
