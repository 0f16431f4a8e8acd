"""TRL's SFTTrainer beside the layouts of throughput.py: each way in a process of its own, a step whenever it is asked.

A process of its own shows what TRL alone takes in memory, over all its steps; a step at a time lets TRL take turns with
ours. All ways get the token ids of our own data set: padded and padding-free in the very steps that ours take, which no
fixed batch size gives. packed gets the documents of all turns and packs them by itself, so the documents of one of its
turns, one step of as many rows as ours, are only about the same in number and length.
"""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from itertools import accumulate
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from deepspeed.accelerator import get_accelerator  # noqa: E402

from benchmarks.throughput.turns import Measured, Turn, peak_memory_gb, total  # noqa: E402

# TRL without flash attention, which it asks for and a CPU lacks, runs these with the model's default, sdpa.
WAYS: dict[str, dict[str, Any]] = {
    "padded": {},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True},
}
DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def own_environment() -> dict[str, str]:
    """For a process that is no rank of this one's group."""
    return {name: value for name, value in os.environ.items() if name not in DISTRIBUTED}


class Peer:
    """One way of TRL's in its process, ready to take turns; a context manager, which ends it."""

    def __init__(self, way: str, setting: dict[str, Any], steps: list[int]) -> None:
        self.way, self.setting = way, setting
        self.steps = steps  # of each turn
        self.peak = 0.0  # GB, of the process so far

    def __enter__(self) -> "Peer":
        self.process = subprocess.Popen(
            [sys.executable, __file__, self.way, json.dumps(self.setting)], text=True, env=own_environment(),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._answer("READY")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def turn(self, number: int) -> Measured:
        return total([self._step() for _ in range(self.steps[number])])

    def _step(self) -> Measured:
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        *measured, self.peak = self._answer("STEP")
        return Measured(*measured)

    def _answer(self, kind: str) -> Any:
        for line in self.process.stdout:
            if line.startswith(f"{kind} "):
                return json.loads(line.split(" ", 1)[1])
        raise RuntimeError(f"TRL {self.way} ended with {self.process.wait()}")


def peers(args: Namespace, data: Any, turns: list[Turn], folder: str) -> dict[str, Peer]:
    """The ways asked for, not yet started; `args` of throughput.py, `folder` for what the processes read and write."""
    steps = [units.members for turn in turns for units in turn.steps]
    Path(folder, "steps.json").write_text(
        json.dumps([[data[int(index)]["input_ids"].tolist() for index in step] for step in steps])
    )
    found = {}
    for way in args.peer_ways.split(","):
        counts = [1 if way == "packed" else len(turn.steps) for turn in turns]
        # One step more than is asked for, so that no process ends while another one is measured.
        setting = {**vars(args), "folder": folder, "max_steps": sum(counts) + 1}
        found[f"TRL {way}"] = Peer(way, setting, counts)
    return found


def make_trainer(way: str, args: Namespace, asked: "Asked") -> Any:
    import datasets
    from torch.utils.data import DataLoader
    from trl import SFTConfig, SFTTrainer

    from benchmarks.throughput.random_model import make_model
    from utils.model.tokenizer import load_hf_tokenizer

    steps = json.loads(Path(args.folder, "steps.json").read_text())
    rows = [row for step in steps for row in step]
    places = [list(range(end - len(step), end)) for step, end in zip(steps, accumulate(map(len, steps)), strict=True)]

    class Trainer(SFTTrainer):
        def get_train_dataloader(self) -> DataLoader:
            if way == "packed":
                return super().get_train_dataloader()
            return self.accelerator.prepare(
                DataLoader(
                    self.train_dataset, batch_sampler=places, collate_fn=self.data_collator,
                    pin_memory=self.args.dataloader_pin_memory,
                )
            )  # fmt: skip

        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
            asked.count(inputs)
            return super().training_step(model, inputs, *rest, **named)

    common = {"max_length": args.max_seq_len, "bf16": args.dtype == "bf16", "fp16": args.dtype == "fp16"}
    config = SFTConfig(
        **{**common, **WAYS[way]}, output_dir=args.folder, max_steps=args.max_steps, learning_rate=1e-5,
        per_device_train_batch_size=args.micro_batch, gradient_checkpointing=False, report_to=[], save_strategy="no",
        logging_strategy="no", use_cpu=asked.on_cpu, disable_tqdm=True, dataloader_pin_memory=not asked.on_cpu,
    )  # fmt: skip
    return Trainer(
        make_model(args), args=config, train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
        processing_class=load_hf_tokenizer(args.tokenizer), callbacks=[asked.callback()],
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
        if not sys.stdin.readline():
            sys.exit()
        self.start = time.perf_counter()

    def end(self) -> None:
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
    trainer = make_trainer(way, Namespace(**json.loads(setting)), Asked(get_accelerator().device_name() == "cpu"))
    print("READY null", flush=True)
    trainer.train()


if __name__ == "__main__":
    main()
