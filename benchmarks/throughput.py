"""Training speed and memory of every layout, interleaved in one run, against this machine's matrix rate.

    python benchmarks/throughput.py --tokenizer FOLDER --data_path .../Dahoas/rm-static

A randomly initialised OPT of the 125m shape (`--hidden`, `--layers` for others) trains under DeepSpeed exactly
as main.py trains it: same batches, same loss, same optimizer. Each round takes one optimizer step of every
layout, so noise of the machine falls on all alike. `--peer trl` runs TRL's SFTTrainer on the same model and
texts afterwards, padded and packed, where trl is installed.
"""

import argparse
import ctypes
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import deepspeed  # noqa: E402
import torch  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerBase  # noqa: E402

from utils.attention import NAME as DOCUMENTS  # noqa: E402
from utils.data.batches import collate_for, train_batches  # noqa: E402
from utils.data.data_utils import PromptDataset, create_prompt_dataset  # noqa: E402
from utils.data.sampler import epoch_units  # noqa: E402
from utils.ds_utils import get_train_ds_config, start_process_group  # noqa: E402
from utils.loss import install_loss, summed_loss  # noqa: E402
from utils.optimizer import create_optimizer  # noqa: E402
from utils.perf import flops_per_token, model_shape  # noqa: E402
from utils.precision import resolve_dtype  # noqa: E402
from utils.utils import load_hf_tokenizer, to_device  # noqa: E402

LAYOUTS = ("max_length", "longest", "free", "packed")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def parse_arguments() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder of OPT's tokenizer (vocabulary 50,272)")
    parser.add_argument("--data_path", required=True, help="a folder whose path contains a known data set name")
    parser.add_argument("--dtype", default="auto", help="as in main.py")
    parser.add_argument("--micro_batch", type=int, default=8, help="samples (rows when packed) per forward")
    parser.add_argument("--rounds", type=int, default=3, help="measured optimizer steps of each layout, after one more")
    parser.add_argument("--max_seq_len", type=int, default=512, help="as in main.py")
    parser.add_argument("--hidden", type=int, default=768, help="width; 768 is OPT-125m")
    parser.add_argument("--layers", type=int, default=12, help="12 is OPT-125m")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="which to run")
    parser.add_argument("--peer", choices=["trl"], default=None, help="also run TRL's SFTTrainer")
    return parser.parse_args()


def make_model(args: Namespace) -> OPTForCausalLM:
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=args.hidden, word_embed_proj_dim=args.hidden, ffn_dim=4 * args.hidden, vocab_size=50272,
        num_hidden_layers=args.layers, num_attention_heads=max(args.hidden // 64, 1), max_position_embeddings=2048,
        dropout=0.1,
    )  # fmt: skip
    return OPTForCausalLM(config)


def matrix_rate(dtype: torch.dtype, device: torch.device, hidden: int) -> float:
    """FLOP/s of the model's own matrix products, the better of both directions: the ceiling of any training step."""
    rows, best = 2048, 0.0
    activations = torch.randn(rows, hidden, dtype=dtype, device=device)
    weight = torch.randn(4 * hidden, hidden, dtype=dtype, device=device)
    for _ in range(5):
        get_accelerator().synchronize()
        start = time.perf_counter()
        for _ in range(4):
            activations @ weight.t()
        get_accelerator().synchronize()
        best = max(best, 4 * 2 * rows * hidden * 4 * hidden / (time.perf_counter() - start))
    return best


def reset_peak_memory() -> None:
    """Start a new peak: the device's own, or on a CPU the process's resident memory."""
    if get_accelerator().device_name() == "cpu":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    else:
        get_accelerator().reset_peak_memory_stats()


def peak_memory_gb() -> float:
    if get_accelerator().device_name() == "cpu":
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20
    return get_accelerator().max_memory_allocated() / 2**30


def endless_batches(data: PromptDataset, layout: str, args: Namespace, pad: int, on_cpu: bool) -> Any:
    collate = collate_for("free" if layout in ("free", "packed") else layout, pad, args.max_seq_len)
    epoch = 0
    while True:
        epoch += 1
        row_length = args.max_seq_len if layout == "packed" else None
        units = epoch_units(data.lengths(), data.label_counts(), 1234, epoch, row_length)
        yield from train_batches(data, units, collate, args.micro_batch, 1, 1, 0, on_cpu)


def step(engine: Any, batch: Any, layout: str, device: torch.device) -> None:
    """One optimizer step in the given layout, on the one engine all layouts share."""
    model = engine.module
    model.set_attn_implementation(DOCUMENTS if layout in ("free", "packed") else "sdpa")
    install_loss(model, fused=layout != "max_length")
    loss = summed_loss(engine, to_device(batch.tensors, device))
    engine.backward(loss * batch.weight)
    engine.step()
    get_accelerator().synchronize()


def measure(args: Namespace, data: PromptDataset, pad: int, dtype: str, device: torch.device) -> None:
    engine_config = get_train_ds_config(False, 0, dtype)
    engine_config["train_micro_batch_size_per_gpu"] = engine_config["train_batch_size"] = args.micro_batch
    model = make_model(args)
    options = Namespace(learning_rate=1e-5, lora_learning_rate=1e-5, weight_decay=0.0, offload=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=create_optimizer(model, options), config=engine_config)
    engine.train()
    shape = model_shape(model)
    rate = matrix_rate(DTYPES[dtype], device, args.hidden)
    layouts = args.layouts.split(",")
    batches = {layout: endless_batches(data, layout, args, pad, device.type == "cpu") for layout in layouts}
    seconds, tokens, cells, peaks, samples = (dict.fromkeys(layouts, 0.0) for _ in range(5))
    for number in range(args.rounds + 1):
        for layout in layouts:
            batch = next(batches[layout])
            reset_peak_memory()
            start = time.perf_counter()
            step(engine, batch, layout, device)
            elapsed = time.perf_counter() - start
            if number == 0:  # kernels warm up, memory is first touched
                continue
            seconds[layout] += elapsed
            tokens[layout] += batch.step.tokens
            samples[layout] += batch.step.samples
            cells[layout] += batch.tensors["input_ids"].numel()
            peaks[layout] = max(peaks[layout], peak_memory_gb())
    print(f"\nmatrix rate {rate / 1e9:.0f} GFLOP/s ({dtype}, {device.type}, {torch.get_num_threads()} threads)")
    print(f"{args.rounds} steps of each layout, {args.micro_batch} samples or rows, max_seq_len {args.max_seq_len}\n")
    print("| layout | real tokens/s | x first | padding | peak memory GB | share of matrix rate |")
    print("| --- | --- | --- | --- | --- | --- |")
    first = tokens[layouts[0]] / seconds[layouts[0]]
    for layout in layouts:
        speed = tokens[layout] / seconds[layout]
        share = speed * flops_per_token(shape, tokens[layout] / samples[layout]) / rate
        padding = 1 - tokens[layout] / cells[layout]
        print(f"| {layout} | {speed:.0f} | {speed / first:.2f} | {padding:.0%} | {peaks[layout]:.2f} | {share:.0%} |")


def measure_trl(args: Namespace, data: PromptDataset, tokenizer: PreTrainedTokenizerBase, dtype: str) -> None:
    """TRL's SFTTrainer on the same model and token ids, padded and packed, in this process."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    ids = [data[index]["input_ids"].tolist() for index in range(len(data))]
    for packing in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            config = SFTConfig(
                output_dir=folder, per_device_train_batch_size=args.micro_batch, max_steps=args.rounds + 1,
                max_length=args.max_seq_len, packing=packing, learning_rate=1e-5, bf16=dtype == "bf16",
                report_to=[], save_strategy="no", logging_steps=1, gradient_checkpointing=False,
                use_cpu=get_accelerator().device_name() == "cpu", disable_tqdm=True,
            )  # fmt: skip
            clock = _StepClock()
            trainer = SFTTrainer(
                make_model(args), args=config, train_dataset=datasets.Dataset.from_dict({"input_ids": ids}),
                processing_class=tokenizer, callbacks=[clock.callback()],
            )  # fmt: skip
            trainer.train()
            seen = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
            speed = (seen[-1] - seen[0]) / (clock.times[-1] - clock.times[0])
            print(f"| TRL SFTTrainer {'packed' if packing else 'padded'} | {speed:.0f} | | | | |")


class _StepClock:
    """Notes when each optimizer step of a transformers Trainer ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def callback(self) -> Any:
        from transformers import TrainerCallback

        times = self.times

        class Note(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                times.append(time.perf_counter())

        return Note()


def main() -> None:
    args = parse_arguments()
    dtype, reason = resolve_dtype(args.dtype)
    device = start_process_group(0, 600)
    print(f"dtype {dtype} ({reason}); {subprocess.getoutput('git rev-parse --short HEAD')}; torch {torch.__version__}")
    tokenizer = load_hf_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory() as cache:
        data, _ = create_prompt_dataset(
            0, [args.data_path], "10,0,0", cache, 1, 1234, tokenizer, args.max_seq_len, tokenizer.eos_token
        )
        measure(args, data, tokenizer.pad_token_id, dtype, device)
        if args.peer:
            measure_trl(args, data, tokenizer, dtype)


if __name__ == "__main__":
    main()
