"""How large the micro batches of a run on a CPU are."""

from argparse import Namespace
from typing import Any

from deepspeed.accelerator import get_accelerator

from utils.data.prompt_dataset import PromptDataset
from utils.hardware import parse_gpus
from utils.utils import print_rank_0

TOKENS_AT_ONCE = 2048  # 25 MB in float32 where an MLP is 3,072 wide, 32 MB in 16 bits where it is 8,192


def cut_micro_batches(args: Namespace, ds_config: dict[str, Any], train_data: PromptDataset) -> None:
    """On a CPU without ZeRO, run micro batches of 2,048 tokens on average at most, and more of them: the same steps.

    The activations of larger ones are blocks above 32 MB, which are mapped anew each time (`host_memory`), and so few
    tokens keep a CPU as busy as more do (`benchmarks/RESULTS.md`), in less memory. In 16 bits gradients are added up in
    16 bits, as by any accumulation. Where ranks share gradients each micro batch would send its own, and padded batches
    stay as they were asked for: what is longest in them would change. `args` and `ds_config` are set to what is run.
    """
    asked = args.per_device_train_batch_size
    on_cpu = get_accelerator().device_name() == "cpu" and parse_gpus(args.dry_run) is None
    if not on_cpu or args.padding != "free" or args.zero_stage > 0 or len(train_data) == 0:
        return
    each = args.max_seq_len if args.packing else float(train_data.lengths().mean())
    micro = max(
        (size for size in range(1, asked + 1) if asked % size == 0 and size * each <= TOKENS_AT_ONCE), default=1
    )
    if micro == asked:
        return
    args.per_device_train_batch_size = ds_config["train_micro_batch_size_per_gpu"] = micro
    args.gradient_accumulation_steps *= asked // micro
    ds_config["gradient_accumulation_steps"] = args.gradient_accumulation_steps
    unit = "packed rows" if args.packing else "samples"
    print_rank_0(
        f"Micro batches: {asked} {unit} as {asked // micro} x {micro}, the same optimizer step "
        "(a CPU is as fast so, in less memory)"
    )
