"""What a run says about its training steps: losses, throughput, and the records they leave."""

import time
from argparse import Namespace

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from utils.data.batches import TrainBatch
from utils.ds_utils import STEPS_PER_PRINT, world_size
from utils.metrics import MetricsFile, StepLosses
from utils.perf import print_throughput
from utils.utils import global_rank, print_rank_0


class Progress:
    """Follows the optimizer steps; the device is waited for only where a line is printed."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        args: Namespace,
        device: torch.device,
        metrics: MetricsFile,
        epochs: int,
        first_step: int = 0,
    ) -> None:
        """`first_step`: optimizer steps already taken, by the run this one goes on from."""
        self.epochs = epochs
        self.engine, self.args, self.metrics = engine, args, metrics
        self.device_name = _device_label()
        self.losses = StepLosses(device)
        self.epoch = 0
        self.step = first_step
        self.rates: list[float] = []
        self._restart_clock()

    def start_epoch(self, epoch: int, micro_batches: int) -> None:
        """Announce an epoch, counted from 1."""
        self.epoch = epoch
        print_rank_0(f"Beginning of Epoch {epoch}/{self.epochs}, Total Micro Batches {micro_batches}")
        self._restart_clock()

    def add(self, loss: torch.Tensor, micro: TrainBatch) -> None:
        """One micro batch is through; `loss` is its summed loss."""
        self.losses.add(loss, micro.weight > 0)
        if not micro.is_last:
            return
        self.losses.finish_step(micro.step.label_tokens)
        self.rates.append(self.engine.get_lr()[0])
        self.step += 1
        self.tokens += micro.step.tokens
        self.samples += micro.step.samples
        if self.args.print_loss:
            self.record_losses()
        if self.step % STEPS_PER_PRINT == 0:
            self.report()

    def report(self) -> None:
        """Record what is outstanding and print the throughput since the last report. Every rank must call it."""
        self.record_losses()
        if self.samples:
            get_accelerator().synchronize()
            print_throughput(
                self.engine.module, self.args, time.perf_counter() - self.start, global_rank(), tokens=self.tokens,
                samples=self.samples, world_size=world_size(), device_name=self.device_name,
            )  # fmt: skip
        self._restart_clock()

    def record_losses(self) -> None:
        """Bring over and write the losses of all steps so far. Every rank must call it."""
        recent = self.losses.collect()
        for number, (loss, rate) in enumerate(zip(recent, self.rates, strict=True), self.step - len(recent) + 1):
            self.metrics.write(epoch=self.epoch, step=number, loss=loss, learning_rate=rate)
            if self.args.print_loss:
                print_rank_0(f"Epoch: {self.epoch}, Step: {number}, loss = {loss}")
        self.rates = []

    def _restart_clock(self) -> None:
        self.tokens, self.samples, self.start = 0, 0, time.perf_counter()


def _device_label() -> str:
    """The device's product name where it has one (GPUs), else its kind ("cpu")."""
    name = get_accelerator().device_name()
    module = torch.get_device_module(name)
    return module.get_device_name() if hasattr(module, "get_device_name") else name
