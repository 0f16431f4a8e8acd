"""Progress of training: the figures of its steps, printed live or in lines, and recorded in metrics.jsonl."""

import math
from collections.abc import Callable
from typing import NamedTuple

import deepspeed
import torch
from tqdm import tqdm

from utils.data.batching.batches import TrainBatch
from utils.data.batching.sampler import StepSize
from utils.distributed.ranks import global_rank, is_rank_0, print_rank_0, sum_on_device, world_size
from utils.logging.console import (
    advance_run_bar,
    close_run_bar,
    has_live_line,
    is_narrow,
    open_run_bar,
    say,
    show_figures,
)
from utils.logging.loss_curve import draw_losses
from utils.logging.metrics_file import MetricsFile
from utils.logging.trackers import send_record
from utils.machine.device import device_label, peak_memory_gb
from utils.machine.later import Moment, OnItsWay, can_run_ahead
from utils.module.attention import clear_documents
from utils.module.fused_loss import last_figures
from utils.notation import parse_steps
from utils.perf import Throughput, Work, measure_throughput, throughput_line
from utils.run_config import RunConfig
from utils.train.perplexity import Evaluation, describe_source
from utils.train.plan import RunPlan
from utils.train.state import RunState
from utils.train.step_losses import StepLosses
from utils.train.step_profile import StepProfile


class Span(NamedTuple):
    """The steps that a speed record is about, and the position at their end."""

    epoch: int
    step: int
    steps: int
    tokens: int
    samples: int


class Progress:
    """Follows the optimizer steps, and never waits for the step just given to a GPU.

    There the figures of a step are recorded and printed when the next step has been given to it, or before anything
    else is: an evaluation, a checkpoint, the end. A CPU has taken the step by then, and they come at once.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        config: RunConfig,
        plan: RunPlan,
        state: RunState,
    ) -> None:
        """Follow `state`, the position of the run, which its owner advances after every optimizer step."""
        self.engine, self.plan, self.state = engine, plan, state
        self.args, self.device, self.batches = config.args, config.device, config.batches
        self.is_checkpointed = config.gradient_checkpointing
        self.metrics = MetricsFile(config.args.output_dir, is_rank_0(), state.metrics_bytes)
        self.device_name = device_label()
        self.losses = StepLosses(config.device)
        self.profile = StepProfile(parse_steps(self.args.profile_steps), self.args.output_dir, state.step)
        self.announced_epoch = 0
        self.micro_batch = 0  # of the epoch, on each rank: the number of the next one
        # Of the steps since the losses were last collected: learning rate, and the gradient norm as DeepSpeed has it.
        self.rates: list[float] = []
        self.norms: list[torch.Tensor | float | None] = []
        self.last: dict[str, float | None] = {}  # the record of the step delivered last
        self.pending: list[Callable[[], None]] = []  # figures that are on their way from the device
        self.runs_ahead = can_run_ahead(config.device)
        self.restart_clock()
        open_run_bar(plan.steps, state.step)

    def start_epoch(self, micro_batches: int) -> None:
        """Print the beginning of an epoch, counted from 1; all windows of a stream are one epoch."""
        if self.state.epoch != self.announced_epoch:
            print_rank_0(
                f"Beginning of Epoch {self.state.epoch}/{self.plan.epochs}, Total Micro Batches {micro_batches}"
            )
            self.restart_clock()
            state, cut = self.state, self.batches
            steps = state.step if state.stream is not None else state.units_done // cut.global_batch
            self.micro_batch = steps * cut.accumulation
        self.announced_epoch = self.state.epoch

    def add_micro_batch(self, loss: torch.Tensor, batch: TrainBatch) -> None:
        """Note the summed loss of a micro batch; only `--print_loss` reads it, which synchronizes with the device."""
        if self.args.print_loss and batch.weight > 0:
            mean = loss.item() / max(1, len(batch.tensors["targets"]))
            say(f"Epoch: {self.state.epoch - 1}, Step: {self.micro_batch}, Rank: {global_rank()}, loss = {mean}")
        self.micro_batch += 1
        self.losses.add(loss, batch.weight > 0, last_figures(self.engine), len(batch.tensors["targets"]))
        self.slots += batch.tensors["input_ids"].numel() if batch.weight > 0 else 0

    def finish_step(self, step: StepSize) -> None:
        """Note an optimizer step, once the run's state has advanced; report it where `--logging_steps` says so."""
        self.losses.finish_step(step.label_tokens)
        self.rates.append(self.engine.get_lr()[0])
        # A skipped step has no norm: the engine may still hold that of another step.
        self.norms.append(self.engine.get_global_grad_norm() if self.engine.was_step_applied() else None)
        self.steps += 1
        self.tokens += step.tokens
        self.samples += step.samples
        advance_run_bar(self.state.epochs_begun, self.plan.epochs)
        self.profile.follow(self.state.step)
        self.deliver()
        if self.state.step % self.args.logging_steps == 0:
            self._take_report()
            if not self.runs_ahead:
                self.deliver()

    def report(self) -> None:
        """Record and print the figures of the steps since the last report. Every rank must call it."""
        self._take_report()
        self.deliver()

    def deliver(self) -> None:
        """Wait for the figures that are on their way, record and print them."""
        pending, self.pending = self.pending, []
        for write in pending:
            write()

    def _take_report(self) -> None:
        """Send the figures of the steps since the last report on their way."""
        self._take_losses()
        if self.samples:
            self._take_speed()
        self.restart_clock()

    def _take_speed(self) -> None:
        """Send what the speed record and the printed line need on its way."""
        state, ended = self.state, Moment(self.device)
        span = Span(state.epochs_begun, state.step, self.steps, self.tokens, self.samples)
        memory, began = peak_memory_gb(self.device), self.began
        slots = OnItsWay([sum_on_device(self.slots, self.device)])
        load = self.losses.begin_collecting_load()

        def write() -> None:
            seconds = began.seconds_until(ended)
            rates = measure_throughput(
                self.engine.module, self.is_checkpointed, Work(span.tokens, span.samples, seconds),
                world_size=world_size(), device_name=self.device_name,
            )  # fmt: skip
            padding = 1 - span.tokens / slots.get()[0].item()
            routers = {} if (of_experts := load()) is None else {"expert_load": of_experts}
            self.record(
                epoch=span.epoch, step=span.step, tokens_per_second=rates.tokens_per_second,
                samples_per_second=rates.samples_per_second, tflops_per_device=rates.tflops,
                peak_share=rates.peak_share, padding_share=padding, memory_gb=memory, seconds=seconds,
                **routers,
            )  # fmt: skip
            if is_rank_0():
                self._show(span, rates, padding, memory, seconds)

        self.pending.append(write)

    def _show(self, span: "Span", rates: Throughput, padding: float, memory: float, seconds: float) -> None:
        loss, rate, norm, accuracy = (
            self.last[name] for name in ("loss", "learning_rate", "grad_norm", "token_accuracy")
        )
        peak = "?" if rates.peak_share is None else f"{rates.peak_share:.0%}"
        speed = rates.tokens_per_second
        throughput = throughput_line(rates, world_size(), self.device_name)
        if has_live_line():
            say(throughput)
        if has_live_line() and is_narrow():
            norm_words = "skipped" if norm is None else f"{norm:.2g}"
            show_figures(
                f"loss {loss:.2f} lr {rate:.0e} norm {norm_words} {tqdm.format_sizeof(speed)}/s pad {padding:.0%} "
                f"peak {peak} {memory:.1f}G"
            )
        elif has_live_line():
            show_figures(
                f"loss {loss:.4f}, acc {accuracy:.1%}, lr {rate:.2e}, norm {_short(norm)}, {speed:,.0f} tok/s, "
                f"pad {padding:.1%}, peak {peak}, {memory:.1f} GB"
            )
        else:
            plan = self.plan
            left = (plan.steps - span.step) * seconds / span.steps
            say(
                f"Step {span.step}/{plan.steps}, epoch {span.epoch}/{plan.epochs}: loss {loss:.4f}, token "
                f"accuracy {accuracy:.1%}, learning rate {rate:.2e}, gradient norm {_short(norm)}, padding "
                f"{padding:.1%}, memory {memory:.2f} GB, {_clock(left)} left. {throughput}"
            )

    def begin_evaluation(self) -> None:
        """Print that perplexity is measured."""
        print_rank_0(f"***** Evaluating perplexity, Epoch {self.state.epochs_begun}/{self.plan.epochs} *****")

    def end_evaluation(self, result: Evaluation) -> None:
        """Print and record what was measured; nan where there is no evaluation data."""
        measured = f"ppl: {result.perplexity}, loss: {result.loss}"
        has_data = not math.isnan(result.loss)
        print_rank_0(measured if has_data else "no evaluation data: no perplexity")
        if has_data:
            print_rank_0(f"token accuracy: {result.accuracy:.2%}")
        for name, one in result.sources.items():
            print_rank_0(describe_source(name, one))
        sources = {name: _figures_of(one) for name, one in result.sources.items()}
        self.record(
            epoch=self.state.epochs_begun, step=self.state.step, **_figures_of(result),
            **({"sources": sources} if sources else {}),
        )  # fmt: skip

    def record_losses(self) -> None:
        """Read the figures of all steps so far from the device and write them. Every rank must call it."""
        self._take_losses()
        self.deliver()

    def _take_losses(self) -> None:
        """Send the figures of all steps so far on their way."""
        means, rates = self.losses.begin_collecting(), self.rates
        epoch, first = self.state.epochs_begun, self.state.step - len(rates) + 1
        on_device = [norm for norm in self.norms if torch.is_tensor(norm)]
        places, norms, coming = [torch.is_tensor(norm) for norm in self.norms], self.norms, OnItsWay(on_device)
        self.rates, self.norms = [], []

        def write() -> None:
            arrived = iter(coming.get())
            values = [next(arrived) if there else norm for there, norm in zip(places, norms, strict=True)]
            for number, (figures, rate, norm) in enumerate(zip(means(), rates, values, strict=True), first):
                norm = None if norm is None else float(norm)
                self.last = {**figures, "learning_rate": rate, "grad_norm": norm}
                self.record(epoch=epoch, step=number, **self.last)

        self.pending.append(write)

    def record(self, **record: float | list[float] | dict[str, dict[str, float]] | None) -> None:
        """Write one record to metrics.jsonl and send it to the services of `--report_to`."""
        self.metrics.write(**record)
        send_record(self.engine, record)

    def close(self) -> None:
        """End the live line and the row layout of the last batch, and draw the loss curve."""
        self.deliver()
        close_run_bar()
        self.profile.finish(self.state.step)
        clear_documents()
        if self.args.output_dir is not None and is_rank_0():
            print_rank_0(f"Loss curve: {draw_losses(self.args.output_dir)}")

    def restart_clock(self) -> None:
        """Start measuring anew: evaluating and saving are no part of the training speed."""
        self.tokens, self.samples, self.steps, self.slots = 0, 0, 0, 0
        self.began = Moment(self.device)


def _figures_of(result: Evaluation) -> dict[str, float]:
    return {"eval_loss": result.loss, "perplexity": result.perplexity, "eval_accuracy": result.accuracy}


def _short(norm: float | None) -> str:
    return "none (skipped)" if norm is None else f"{norm:.3g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
