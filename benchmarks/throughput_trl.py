"""TRL's SFTTrainer beside the layouts of throughput.py: each way in a process of its own, a step whenever it is asked.

A process of its own shows what TRL alone takes in memory; a step at a time lets TRL take turns with ours. All ways get
the token ids of our own data set, and pad in the order of our epoch, so that step k pads the same samples as ours.
"""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

# TRL without flash attention, which it asks for and a CPU lacks, runs these with the model's default, sdpa.
WAYS: dict[str, dict[str, Any]] = {
    "padded": {"train_sampling_strategy": "sequential"},
    "padding-free": {"train_sampling_strategy": "sequential", "padding_free": True, "max_length": None},
    "packed": {"packing": True},
}
DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Peer:
    """One way of TRL's in its process, ready to take steps; a context manager, which ends it."""

    def __init__(self, way: str, setting: dict[str, Any]) -> None:
        self.way, self.setting = way, setting

    def __enter__(self) -> "Peer":
        environment = {name: value for name, value in os.environ.items() if name not in DISTRIBUTED}
        self.process = subprocess.Popen(
            [sys.executable, __file__, self.way, json.dumps(self.setting)], text=True, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._answer("READY")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def step(self, memory: bool = False) -> Any:
        from throughput import Measured

        self.process.stdin.write("memory\n" if memory else "step\n")
        self.process.stdin.flush()
        return Measured(*self._answer("STEP"))

    def _answer(self, kind: str) -> Any:
        for line in self.process.stdout:
            if line.startswith(f"{kind} "):
                return json.loads(line.split(" ", 1)[1])
        raise RuntimeError(f"TRL {self.way} ended with {self.process.wait()}")


def peers(args: Namespace, data: Any, dtype: str, folder: str) -> dict[str, Peer]:
    """The ways asked for, not yet started; `args` of throughput.py, `folder` for what the processes read and write."""
    from utils.data.sampler import epoch_order

    rows = [data[int(index)]["input_ids"].tolist() for index in epoch_order(len(data), 1234, 1)]
    Path(folder, "rows.json").write_text(json.dumps(rows))
    setting = {**vars(args), "dtype": dtype, "folder": folder}
    return {way: Peer(way, setting) for way in args.peer_ways.split(",")}


def make_trainer(way: str, args: Namespace, asked: "Asked") -> Any:
    import datasets
    from throughput import make_model
    from trl import SFTConfig, SFTTrainer

    from utils.utils import load_hf_tokenizer

    class Trainer(SFTTrainer):
        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
            asked.count(inputs)
            return super().training_step(model, inputs, *rest, **named)

    rows = json.loads(Path(args.folder, "rows.json").read_text())
    tokenizer = load_hf_tokenizer(args.tokenizer)
    common = {"max_length": args.max_seq_len, "bf16": args.dtype == "bf16", "fp16": args.dtype == "fp16"}
    config = SFTConfig(
        **{**common, **WAYS[way]}, output_dir=args.folder, max_steps=args.rounds + 2, learning_rate=1e-5,
        per_device_train_batch_size=args.micro_batch, gradient_checkpointing=False, report_to=[], save_strategy="no",
        logging_strategy="no", use_cpu=asked.on_cpu, disable_tqdm=True, dataloader_pin_memory=not asked.on_cpu,
    )  # fmt: skip
    return Trainer(
        make_model(args), args=config, train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
        processing_class=tokenizer, callbacks=[asked.callback()],
    )  # fmt: skip


class Asked:
    """Holds the trainer before each optimizer step until a line comes, and answers with what the step took."""

    def __init__(self, on_cpu: bool) -> None:
        self.on_cpu, self.start, self.counts = on_cpu, 0.0, (0, 0, 0)

    def count(self, inputs: dict[str, Any]) -> None:
        """Real tokens, samples and cells of a batch."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if mask is None:  # one row of whole samples, each counted from 0
            self.counts = ids.numel(), int((inputs["position_ids"] == 0).sum()), ids.numel()
        else:
            self.counts = int(mask.sum()), len(ids), ids.numel()

    def begin(self) -> None:
        from throughput import reset_peak_memory

        line = sys.stdin.readline()
        if not line:
            sys.exit()
        if line == "memory\n":
            reset_peak_memory()
        self.start = time.perf_counter()

    def end(self) -> None:
        from deepspeed.accelerator import get_accelerator
        from throughput import peak_memory_gb

        get_accelerator().synchronize()
        print(f"STEP {json.dumps([time.perf_counter() - self.start, *self.counts, peak_memory_gb()])}", flush=True)

    def callback(self) -> Any:
        from transformers import TrainerCallback

        asked = self

        class Turns(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                asked.begin()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                asked.end()

        return Turns()


def main() -> None:
    way, setting = sys.argv[1:]
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
    from deepspeed.accelerator import get_accelerator

    trainer = make_trainer(way, Namespace(**json.loads(setting)), Asked(get_accelerator().device_name() == "cpu"))
    print("READY null", flush=True)
    trainer.train()


if __name__ == "__main__":
    main()
