"""A run of main.py in this process, after which its peak device memory and its memory estimate are printed.

    python benchmarks/gpu/watched_run.py [--untrained] -- MAIN_ARGUMENTS

`--untrained` makes random weights in bf16 on the device instead of reading them: writing and reading a model of 13b
would take longer than the measurement. The last line is `WATCHED` and a JSON object.
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
from utils.dry_run.memory import estimate_memory  # noqa: E402
from utils.model.build import model_form  # noqa: E402


def estimate_before_training(seen: dict[str, Any]) -> None:
    """Make main.py's `train` note the estimate of the run in `seen` before it trains."""
    train = program.train

    def noting(engine: Any, data: Any, config: Any, run: Any, checkpointer: Any) -> None:
        try:
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


def make_weights_on_device() -> None:
    """Make main.py's `create_model` build random weights in bf16 on the device."""
    create = program.create_model

    def untrained(*args: Any) -> torch.nn.Module:
        with torch.device(get_accelerator().current_device_name()):
            return create(*args, untrained=True)

    program.create_model = untrained
    utils.model.model_utils._training_dtype = lambda ds_config: torch.bfloat16


def main() -> None:
    own, given = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    seen: dict[str, Any] = {}
    estimate_before_training(seen)
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
