"""Supervised fine-tuning of a causal language model with DeepSpeed: one run, from arguments to a saved model.

What it does
  * trains any decoder-only model of transformers under ZeRO 0 to 3, with or without offload and LoRA, on one
    process (`python main.py`) or many (`deepspeed --num_gpus 8 main.py`, torchrun, srun), on GPUs or a CPU;
  * the loss of an optimizer step is the mean over all label tokens of its whole global batch, so ranks,
    micro batch and accumulation change nothing; padding never counts;
  * by default there is no padding at all: samples lie end to end in one row, each attending to itself alone
    (`--padding`, `--packing`); the real model shows before training that this changes nothing;
  * a row too long for one device is shared by several (`--sequence_parallel_size`), with the same losses;
  * perplexity is exp(summed negative log-likelihood / label tokens) over the evaluation set;
  * saves what plain `from_pretrained` loads, LoRA merged, and verifies it before it says it is done.

What it refuses: fp16 on a CPU (DeepSpeed can't), sequences longer than the model's positions, a LoRA name that
matches no layer, data that is not what it should be. All of it is found before a model is loaded.
"""

import os
import sys
from argparse import Namespace
from typing import Any

from utils.data.training_data import create_data
from utils.logging.library_log import LOG, quiet_libraries  # first: DeepSpeed talks while it is imported
from utils.model.build import create_model
from utils.model.tokenizer import create_tokenizer

# isort: split
import deepspeed
import torch
from transformers import PreTrainedTokenizerBase, get_scheduler

from utils.arguments.parser import parse_args
from utils.arguments.preflight import check_run
from utils.checkpoint.checkpoint_folder import find_checkpoint
from utils.checkpoint.checkpointer import SAMPLE_TOKENS, Keeper, forget_best_model, publish_best_model
from utils.checkpoint.resume import (
    arguments_record,
    describe_position,
    follow_schedule,
    restore,
    run_record,
)
from utils.data.batching.batches import collate_for, eval_batches, train_batches
from utils.data.batching.sampler import micro_batches_per_epoch, remaining_units, step_members
from utils.data.data_utils import PromptDataset
from utils.distributed.failures import end_run
from utils.distributed.launchers import adopt_launcher, launched_rank
from utils.distributed.process_group import local_rank_of, start_process_group
from utils.distributed.ranks import global_rank, print_rank_0
from utils.dry_run.dry_run import dry_run
from utils.ds_utils import build_ds_config
from utils.engine.engine import create_optimizer, initialize_engine
from utils.engine.nvme_swap import remove_swap_folders
from utils.export.hf_model import save_hf_format, unwrap
from utils.export.model_card import describe_model
from utils.export.peft_adapter import ADAPTER_FOLDER, save_lora_adapter
from utils.export.verify import live_logits, verify_saved_model
from utils.logging.console import close_run_bar, phase
from utils.logging.loss_curve import draw_losses
from utils.logging.metrics_file import MetricsFile
from utils.machine.device import set_random_seed, to_device
from utils.model.layout_check import choose_layout
from utils.module.attention import set_documents
from utils.module.fused_loss import summed_loss
from utils.module.neftune import add_embedding_noise
from utils.module.sequence_parallel import start_sequence_parallel
from utils.run_config import averaged_over, data_rank, data_ranks, planned_ranks, sequence_part
from utils.train.nonfinite_steps import BadSteps
from utils.train.perplexity import evaluate
from utils.train.plan import (
    RunPlan,
    cut_micro_batches,
    is_checkpoint_due,
    is_evaluation_due,
    micro_batches_of_epoch,
    print_plan,
    units_in_use,
)
from utils.train.progress import Progress
from utils.train.run_file import recorded_run
from utils.train.state import RunState
from utils.train.stop_request import EXIT_BY_SIGINT, EXIT_INTERRUPTED, Interrupted, StopRequest


def main(args: Namespace) -> None:
    """One run, top to bottom."""
    check_run(args)
    LOG.open(None if args.dry_run else args.output_dir)
    device = start_process_group(args.local_rank, args.ddp_timeout)
    groups = start_sequence_parallel(args)
    ds_config = build_ds_config(args, planned_ranks(args))
    set_random_seed(args.seed)
    arguments = arguments_record(args, data_ranks(args))

    tokenizer = create_tokenizer(args)
    model = None if args.dry_run else create_model(args, tokenizer, ds_config)
    train_data, eval_data = create_data(args, tokenizer, ahead=device.type != "cpu")
    cut_micro_batches(args, ds_config, train_data)
    if args.dry_run:
        dry_run(args, ds_config, tokenizer, train_data, eval_data, device, create_model, groups)
        return

    optimizer = create_optimizer(model, args)
    engine = initialize_engine(model, optimizer, ds_config, groups)
    args.padding = choose_layout(engine.module, args.padding, len(tokenizer), device, sequence_part(args))
    args.packing = args.packing and args.padding == "free"
    add_embedding_noise(engine.module, args.neftune_noise_alpha)

    checkpoint = find_checkpoint(args, print_rank_0)
    if checkpoint is None:
        forget_best_model(args)
    state = restore(engine, checkpoint, train_data, args) if checkpoint else RunState()
    # Only now is the number of steps known: packing depends on what the model can do.
    plan = print_plan(args, train_data, state)
    record = run_record(engine, train_data, args, arguments)
    engine.lr_scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.num_warmup_steps, plan.steps)
    # Weights are the same on all ranks by now; from here on each draws its own dropout masks.
    set_random_seed(args.seed + global_rank())
    if checkpoint:
        print_rank_0(describe_position(checkpoint, state, plan))
        follow_schedule(engine, state, checkpoint, args.seed)

    with recorded_run(engine, args, train_data, eval_data, plan, state):
        train(engine, train_data, eval_data, tokenizer, args, device, plan, state, record)
        save(engine, tokenizer, train_data, args, device)


def train(
    engine: deepspeed.DeepSpeedEngine,
    train_data: PromptDataset,
    eval_data: PromptDataset,
    tokenizer: PreTrainedTokenizerBase,
    args: Namespace,
    device: torch.device,
    plan: RunPlan,
    state: RunState,
    record: dict[str, Any],
) -> None:
    """All steps from `state` on, with perplexity before the first, after each epoch and every `--eval_steps`."""
    rank, ranks, on_cpu = data_rank(args), data_ranks(args), device.type == "cpu"
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    collate = collate_for(args.padding, tokenizer.pad_token_id, args.max_seq_len, sequence_part(args))
    metrics = MetricsFile(args.output_dir, global_rank() == 0, state.metrics_bytes)
    progress = Progress(engine, args, device, metrics, plan, state.step)
    keeper = Keeper(engine, tokenizer, args, progress, state, record, sample=train_data[0]["input_ids"])
    bad_steps = BadSteps(engine, args.max_bad_steps)
    stop = StopRequest(args.ddp_timeout)

    def perplexity() -> None:
        print_rank_0(f"***** Evaluating perplexity, Epoch {state.epochs_begun}/{plan.epochs} *****")
        batches = eval_batches(eval_data, collate, args.per_device_eval_batch_size, ranks, rank, on_cpu)
        count = micro_batches_per_epoch(len(eval_data), args.per_device_eval_batch_size, 1, ranks)
        result = evaluate(engine, batches, device, stop.agreed, count)
        if result is None:
            keeper.interrupt(stop.received)
        print_rank_0("ppl: {}, loss: {}".format(*result) if len(eval_data) else "no evaluation data: no perplexity")
        progress.record(epoch=state.epochs_begun, step=state.step, eval_loss=result[1], perplexity=result[0])
        keeper.evaluated(result[1], len(eval_data))
        progress.restart_clock()

    print_rank_0("***** Running training *****")
    if state.evaluation_due:
        perplexity()
    while not plan.is_done(state) and not keeper.has_lost_patience():
        units = units_in_use(args, train_data, state)
        rest = remaining_units(units, state.units_done)
        progress.start_epoch(state.epoch, micro_batches_of_epoch(args, plan, units))
        engine.train()
        batches = train_batches(
            train_data, rest, collate, micro, accumulation, ranks, rank, on_cpu, averaged_over(args)
        )
        for batch in batches:
            engine.set_gradient_accumulation_boundary(batch.is_last)
            loss = summed_loss(engine, to_device(batch.tensors, device))
            engine.backward(loss * batch.weight)
            engine.step()
            progress.add(loss, batch)
            if not batch.is_last:
                continue
            if engine.was_step_applied():
                bad_steps.good()
            else:
                samples = step_members(units, state.units_done, batch.step.units)
                bad_steps.check(progress.step, progress.losses.of_last_step(), samples, keeper.last_checkpoint)
            state.advance(batch.step.units, len(units.tokens), train_data.after)
            state.evaluation_due = is_evaluation_due(state, plan, args.eval_steps)
            if stop.agreed():
                keeper.interrupt(stop.received)
            if state.evaluation_due:
                progress.report()
                perplexity()
            if is_checkpoint_due(state, args.save_strategy, args.save_steps):
                keeper.save()
            if plan.is_done(state) or keeper.has_lost_patience():
                break
    stop.close()
    close_run_bar()
    set_documents(None)
    if args.output_dir is not None and global_rank() == 0:
        print_rank_0(f"Loss curve: {draw_losses(args.output_dir)}")


def save(
    engine: deepspeed.DeepSpeedEngine,
    tokenizer: PreTrainedTokenizerBase,
    train_data: PromptDataset,
    args: Namespace,
    device: torch.device,
) -> None:
    """Save the model, load it again with plain transformers, and compare. Every rank takes part."""
    if args.output_dir is None:
        print_rank_0("no --output_dir: the model is not saved")
        return
    print_rank_0("saving the final model ...")
    if args.load_best_model_at_end and publish_best_model(args):
        return
    sample = train_data[0]["input_ids"][None, :SAMPLE_TOKENS]
    expected = live_logits(engine.module, sample.to(device))
    with phase("writing the model"):
        folder = save_hf_format(engine, tokenizer, args, describe=describe_model(args, tokenizer))
    if args.save_lora_adapter:
        adapter = os.path.join(folder, ADAPTER_FOLDER)
        save_lora_adapter(unwrap(engine), args.model_name_or_path, adapter)
        print_rank_0(
            f"LoRA adapter saved to {adapter}, for peft.PeftModel.from_pretrained on {args.model_name_or_path}"
        )
    if global_rank() == 0:
        difference = verify_saved_model(folder, sample, expected)
        print_rank_0(f"Saved to {folder} and verified: reloaded logits differ by {difference:.1e} of the largest")


def run(argv: list[str] | None = None) -> None:
    """Start `main` and end with one message and a status that says what happened."""
    try:
        adopt_launcher()
        with quiet_libraries():
            args = parse_args(argv)
            args.local_rank = local_rank_of(args.local_rank)
            main(args)
    except Interrupted as stop:
        print_rank_0(str(stop), launched_rank())
        sys.exit(EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        print_rank_0("stopped before the training began: there is nothing to save", launched_rank())
        sys.exit(EXIT_BY_SIGINT)
    except Exception as err:  # the end of the line: each kind of failure has its words and status
        end_run(err, launched_rank())
    finally:
        remove_swap_folders()


if __name__ == "__main__":
    run()
