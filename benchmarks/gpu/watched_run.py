"""Run main.py in this process; print its peak device memory beside the memory estimate for the same run.

    python benchmarks/gpu/watched_run.py [--untrained] -- MAIN_ARGUMENTS

`--untrained` makes the weights at random on the device, in bf16, instead of reading them: a model of 13b would take
longer to write and read than to measure. What was seen is the last line, `WATCHED` and an object of JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import main as program  # noqa: E402

# isort: split
import torch  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402

import utils.model.model_utils  # noqa: E402
from utils.dry_run.dry_run import largest_micro_batch  # noqa: E402
from utils.dry_run.memory import foresee  # noqa: E402


def foresee_training(seen: dict[str, Any]) -> None:
    """Let main.py's `train` first note the estimate of its own run."""
    train = program.train

    def noting(engine: Any, train_data: Any, eval_data: Any, tokenizer: Any, args: Any, device: Any, *rest: Any) -> Any:
        try:
            layout = largest_micro_batch(args, train_data, device.type == "cpu")
            guess = foresee(args, engine.config, layout, 1, len(tokenizer)).estimate
            seen.update(estimate=guess.peak, moments=guess.moments)
        except Exception as err:  # a fault of the estimate must not end the run that is measured
            seen.update(estimate_error=f"{type(err).__name__}: {err}")
        train(engine, train_data, eval_data, tokenizer, args, device, *rest)
        seen["finished"] = True

    program.train = noting


def make_weights_on_device() -> None:
    """Let main.py's `create_model` make its weights in bf16, on the device, at random."""
    create = program.create_model

    def untrained(args: Any, tokenizer: Any, ds_config: dict) -> torch.nn.Module:
        with torch.device(get_accelerator().current_device_name()):
            return create(args, tokenizer, ds_config, untrained=True)

    program.create_model = untrained
    utils.model.model_utils._training_dtype = lambda ds_config: torch.bfloat16


def main() -> None:
    own, given = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    seen: dict[str, Any] = {}
    foresee_training(seen)
    if "--untrained" in own:
        make_weights_on_device()
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
