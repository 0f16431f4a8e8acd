"""Count how often a step in 16 bits without ZeRO waits for the device: as it is, and with DeepSpeed's own settings.

    python benchmarks/waits.py [--layers 24] [--steps 5]

No GPU is needed: what would wait for one is counted on the CPU, where the engine makes the same calls. These are reads
of a value (`aten::_local_scalar_dense`, as by `tensor.item()`) and the accelerator's `synchronize`. The model is an OPT
of 388 tensors, as many as OPT-1.3b has. Beside them stand the reductions of all gradients, which wait for nothing but
copy every gradient twice.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# What is left to DeepSpeed, each with the rows above it: a function of `utils/engine/engine.py`, or a setting.
LEFT = {
    "its own optimizer step": "sweep_in_steps",
    "its check of each gradient for overflow": "leave_overflow_to_the_norm",
    "its reduction on one rank": "leave_out_reduction_of_one_rank",
    "its throughput timer": "timers",
}
COUNTS = ("reads", "synchronizations", "reductions")


def count_waits(program: Any) -> list[dict[str, int]]:
    """Make `program.micro_step` count; return the list that gets the counts of each micro batch.

    program: the imported `main.py`.
    """
    import torch
    from deepspeed import DeepSpeedEngine
    from deepspeed.accelerator import get_accelerator
    from torch.utils._python_dispatch import TorchDispatchMode

    found: list[dict[str, int]] = []
    step, accelerator, reduce = program.micro_step, get_accelerator(), DeepSpeedEngine.buffered_allreduce_fallback
    count = dict.fromkeys(COUNTS, 0)

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            count["reads"] += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    def noting(name: str, call: Any) -> Any:
        def noted(*args: Any, **options: Any) -> Any:
            count[name] += 1
            return call(*args, **options)

        return noted

    def counted(engine: Any, *args: Any) -> Any:
        count.update(dict.fromkeys(COUNTS, 0))
        with Reads():
            loss = step(engine, *args)
        found.append({**count, "trained": sum(one.requires_grad for one in engine.module.parameters())})
        return loss

    accelerator.synchronize = noting("synchronizations", accelerator.synchronize)
    DeepSpeedEngine.buffered_allreduce_fallback = noting("reductions", reduce)
    program.micro_step = counted
    return found


def allow_fp16() -> None:
    """Make the CPU say that it trains in fp16."""
    from deepspeed.accelerator import get_accelerator

    from utils import run_config

    type(get_accelerator()).is_fp16_supported = lambda self: True
    run_config.resolve_dtype = lambda requested: (requested, "patched")


def run_one(left: list[str], arguments: list[str]) -> None:
    """Run main.py with the parts `left` to DeepSpeed, and print the counts of its last micro batch."""
    import main as program
    from utils.engine import engine

    for name in left:
        setattr(engine, name, lambda engine: None)
    if "fp16" in arguments:
        allow_fp16()
    found = count_waits(program)
    program.run(arguments)
    print("WAITS " + json.dumps(found[-1]), flush=True)


def make_inputs(folder: Path, layers: int) -> list[Any]:
    """Write a model of narrow layers and some records; return main.py's arguments for them."""
    import torch
    from transformers import OPTForCausalLM

    from benchmarks.gpu.random_models import copy_tokenizer, make_records, opt_config

    torch.manual_seed(0)
    copy_tokenizer(folder / "model")
    config = opt_config("tiny", num_hidden_layers=layers, vocab_size=1816, max_position_embeddings=512)
    OPTForCausalLM(config).save_pretrained(folder / "model")
    return [
        "--model_name_or_path", folder / "model", "--data_path", make_records(folder / "records"), "--max_seq_len", 64,
        "--data_split", "10,0,0", "--data_output_path", folder / "cache", "--per_device_train_batch_size", 8,
    ]  # fmt: skip


def measure(command: list[Any], left: list[str], folder: Path) -> dict[str, int]:
    """Return the counts of a run in a process of its own with the parts `left` to DeepSpeed."""
    config = folder / "deepspeed.json"
    settings: dict[str, Any] = {"fp16": {"enabled": True, "initial_scale_power": 10}} if "fp16" in command else {}
    settings |= {"timers": {"throughput": {"enabled": True}}} if "timers" in left else {}
    config.write_text(json.dumps(settings), encoding="utf-8")
    call = [sys.executable, __file__, "--left", ",".join(name for name in left if name != "timers"), "--"]
    done = subprocess.run(
        [*map(str, [*call, *command, "--deepspeed_config", config])], cwd=ROOT, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("WAITS ")]
    if not lines:
        raise SystemExit(f"main.py failed:\n{done.stdout}{done.stderr}")
    return json.loads(lines[-1][6:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--steps", type=int, default=5, help="steps of each run; the last is counted")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        inputs = [*make_inputs(Path(name), args.layers), "--max_steps", args.steps]
        print(f"| of the step, left to DeepSpeed | precision | tensors trained | {' | '.join(COUNTS)} |")
        print("| --- " * (3 + len(COUNTS)) + "|")
        for number in range(len(LEFT) + 1):
            left, last = list(LEFT.values())[:number], [*LEFT][number - 1]
            for dtype in ("bf16", "fp16"):
                found = measure([*inputs, "--dtype", dtype], left, Path(name))
                counts = " | ".join(str(found[count]) for count in COUNTS)
                what = f"{'and ' * (number > 1)}{last}" if number else "nothing: as it is"
                print(f"| {what} | {dtype} | {found['trained']} | {counts} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--left"]:
        run_one([part for part in sys.argv[2].split(",") if part], sys.argv[4:])
    else:
        main()
