"""What a run says about its training steps, live or in lines, and the records they leave."""

import time
from argparse import Namespace

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm

from utils.data.batching.batches import TrainBatch
from utils.distributed.ranks import all_reduce_sum, global_rank, print_rank_0, world_size
from utils.logging.console import advance_run_bar, has_live_line, is_narrow, open_run_bar, say, show_figures
from utils.logging.metrics_file import MetricsFile
from utils.logging.trackers import send_record
from utils.machine.device import device_label, peak_memory_gb
from utils.perf import Throughput, measure_throughput, throughput_line
from utils.train.plan import RunPlan


class Progress:
    """Follows the optimizer steps; the device is waited for only every `--logging_steps`."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        args: Namespace,
        device: torch.device,
        metrics: MetricsFile,
        plan: RunPlan,
        first_step: int = 0,
    ) -> None:
        """`first_step`: optimizer steps already taken, by the run this one goes on from."""
        self.plan = plan
        self.engine, self.args, self.metrics, self.device = engine, args, metrics, device
        self.device_name = device_label()
        self.losses = StepLosses(device)
        self.epoch = 0
        self.step = first_step
        # Of the steps since the losses were last collected: learning rate, and the gradient norm as DeepSpeed has it.
        self.rates: list[float] = []
        self.norms: list[torch.Tensor | float | None] = []
        self.last: dict[str, float | None] = {}  # the record of the step collected last
        self.restart_clock()
        open_run_bar(plan.steps, first_step)

    def start_epoch(self, epoch: int, micro_batches: int) -> None:
        """Announce an epoch, counted from 1; the windows of a stream are one."""
        if epoch != self.epoch:
            print_rank_0(f"Beginning of Epoch {epoch}/{self.plan.epochs}, Total Micro Batches {micro_batches}")
            self.restart_clock()
        self.epoch = epoch

    def add(self, loss: torch.Tensor, micro: TrainBatch) -> None:
        """One micro batch is through; `loss` is its summed loss."""
        self.losses.add(loss, micro.weight > 0)
        self.slots += micro.tensors["input_ids"].numel() if micro.weight > 0 else 0
        if not micro.is_last:
            return
        self.losses.finish_step(micro.step.label_tokens)
        self.rates.append(self.engine.get_lr()[0])
        # A step that was skipped has no norm: what the engine holds may be that of another step.
        self.norms.append(self.engine.get_global_grad_norm() if self.engine.was_step_applied() else None)
        self.step += 1
        self.steps += 1
        self.tokens += micro.step.tokens
        self.samples += micro.step.samples
        advance_run_bar(self.epoch, self.plan.epochs)
        if self.args.print_loss:
            self.record_losses()
        if self.step % self.args.logging_steps == 0:
            self.report()

    def report(self) -> None:
        """Record what is outstanding and say how the steps since the last report went. Every rank must call it."""
        self.record_losses()
        if self.samples:
            get_accelerator().synchronize()
            seconds = time.perf_counter() - self.start
            rates = measure_throughput(
                self.engine.module, self.args, seconds, tokens=self.tokens, samples=self.samples,
                world_size=world_size(), device_name=self.device_name,
            )  # fmt: skip
            padding = 1 - self.tokens / all_reduce_sum([self.slots], self.device)[0]
            memory = peak_memory_gb(self.device)
            self.record(
                epoch=self.epoch, step=self.step, tokens_per_second=rates.tokens_per_second,
                samples_per_second=rates.samples_per_second, tflops_per_device=rates.tflops,
                peak_share=rates.peak_share, padding_share=padding, memory_gb=memory, seconds=seconds,
            )  # fmt: skip
            if global_rank() == 0:
                self._show(rates, padding, memory, seconds)
        self.restart_clock()

    def _show(self, rates: Throughput, padding: float, memory: float, seconds: float) -> None:
        loss, rate, norm = (self.last[name] for name in ("loss", "learning_rate", "grad_norm"))
        peak = "?" if rates.peak_share is None else f"{rates.peak_share:.0%}"
        speed = rates.tokens_per_second
        if has_live_line() and is_narrow():
            norm_words = "skipped" if norm is None else f"{norm:.2g}"
            show_figures(
                f"loss {loss:.2f} lr {rate:.0e} norm {norm_words} {tqdm.format_sizeof(speed)}/s pad {padding:.0%} "
                f"peak {peak} {memory:.1f}G"
            )
        elif has_live_line():
            show_figures(
                f"loss {loss:.4f}, lr {rate:.2e}, norm {_short(norm)}, {speed:,.0f} tok/s, "
                f"pad {padding:.1%}, peak {peak}, {memory:.1f} GB"
            )
        else:
            left = (self.plan.steps - self.step) * seconds / self.steps
            say(
                f"Step {self.step}/{self.plan.steps}, epoch {self.epoch}/{self.plan.epochs}: loss {loss:.4f}, learning "
                f"rate {rate:.2e}, gradient norm {_short(norm)}, padding {padding:.1%}, memory {memory:.2f} GB, "
                f"{_clock(left)} left"
            )
        say(throughput_line(rates, world_size(), self.device_name))

    def record_losses(self) -> None:
        """Bring over and write the figures of all steps so far. Every rank must call it."""
        recent = self.losses.collect()
        first = self.step - len(recent) + 1
        for number, (loss, rate, norm) in enumerate(zip(recent, self.rates, self.norms, strict=True), first):
            norm = None if norm is None else float(norm)
            self.last = {"loss": loss, "learning_rate": rate, "grad_norm": norm}
            self.record(epoch=self.epoch, step=number, **self.last)
            if self.args.print_loss:
                print_rank_0(f"Epoch: {self.epoch}, Step: {number}, loss = {loss}")
        self.rates, self.norms = [], []

    def record(self, **record: float | None) -> None:
        """Write one record to metrics.jsonl and send it to the services of `--report_to`."""
        self.metrics.write(**record)
        send_record(self.engine, record)

    def restart_clock(self) -> None:
        """What comes now is measured anew: what was done since the last report (evaluating) is no training."""
        self.tokens, self.samples, self.steps, self.slots = 0, 0, 0, 0
        self.start = time.perf_counter()


def _short(norm: float | None) -> str:
    return "none (skipped)" if norm is None else f"{norm:.3g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


class StepLosses:
    """Collects the loss of optimizer steps on the device and brings them over in one go when asked."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: list[torch.Tensor] = []
        self.tokens: list[int] = []
        self.current = torch.zeros((), device=device)
        self.last = self.current, 1  # the step just finished

    def add(self, summed_loss: torch.Tensor, counts: bool) -> None:
        """Add one micro batch of the current step."""
        if counts:
            self.current = self.current + summed_loss.detach()

    def finish_step(self, step_label_tokens: int) -> None:
        """The step is complete; it had so many label tokens over all ranks."""
        self.sums.append(self.current)
        self.tokens.append(step_label_tokens)
        self.last = self.current, step_label_tokens
        self.current = torch.zeros((), device=self.device)

    def collect(self) -> list[float]:
        """Mean loss per label token of every step since the last call. Every rank must call it."""
        if not self.sums:
            return []
        sums = torch.stack(self.sums)
        if dist.is_initialized():
            dist.all_reduce(sums)
        losses = [total / tokens for total, tokens in zip(sums.tolist(), self.tokens, strict=True)]
        self.sums, self.tokens = [], []
        return losses

    def of_last_step(self) -> float:
        """Mean loss per label token of the step just finished. Waits for the device; every rank must call it."""
        total = self.last[0].detach().clone()
        if dist.is_initialized():
            dist.all_reduce(total)
        return total.item() / self.last[1]
