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

from utils.library_log import LOG, quiet_libraries  # first: DeepSpeed talks while it is imported

# isort: split
import deepspeed
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, get_scheduler

from utils.args import parse_args
from utils.attention import set_documents
from utils.bad_steps import BadSteps
from utils.best_model import forget_best_model, publish_best_model
from utils.big_models import remove_swap_folders
from utils.checkpoint import find_checkpoint
from utils.checks import check_run, end_of_conversation_token
from utils.console import close_run_bar, phase
from utils.data.batches import collate_for, eval_batches, train_batches
from utils.data.data_utils import PromptDataset, create_prompt_dataset
from utils.data.sampler import micro_batches_per_epoch, remaining_units, step_members
from utils.data.sources import parse_columns
from utils.data.stream import SFT_PHASE, create_prompt_stream
from utils.dry_run import dry_run
from utils.ds_utils import build_ds_config, local_rank_of, start_process_group
from utils.evaluation import evaluate
from utils.failures import end_run
from utils.interrupt import EXIT_BY_SIGINT, EXIT_INTERRUPTED, Interrupted, StopRequest
from utils.keeper import SAMPLE_TOKENS, Keeper
from utils.launchers import adopt_launcher, launched_rank
from utils.loss import summed_loss
from utils.metrics import MetricsFile, draw_losses
from utils.micro_batches import cut_micro_batches
from utils.model.model_utils import create_hf_model, describe_parameters, enable_checkpointing
from utils.model_card import describe_model
from utils.module.adapter import ADAPTER_FOLDER, save_lora_adapter
from utils.module.lora import (
    convert_linear_layer_to_lora,
    describe_lora,
    make_model_gradient_checkpointing_compatible,
    only_optimize_lora_parameters,
)
from utils.neftune import add_embedding_noise
from utils.optimizer import create_optimizer, initialize_engine
from utils.plan import data_ranks, micro_batches_of_epoch, planned_ranks, print_plan, units_in_use, window_size
from utils.progress import Progress
from utils.resume import arguments_record, describe_position, follow_schedule, restore, run_record
from utils.run_file import recorded_run
from utils.run_state import RunPlan, RunState, is_checkpoint_due, is_evaluation_due
from utils.saving import live_logits, unwrap, verify_saved_model
from utils.self_check import choose_layout
from utils.sequence_parallel import averaged_over, data_rank, sequence_part, start_sequence_parallel
from utils.tiled_mlp import tile_mlps
from utils.utils import global_rank, load_hf_tokenizer, print_rank_0, save_hf_format, set_random_seed, to_device


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


def create_tokenizer(args: Namespace) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, with `--eot_token` added if asked for."""
    tokenizer = load_hf_tokenizer(args.model_name_or_path, True, args.eot_token if args.add_eot_token else None)
    print_rank_0(
        f"Tokenizer: {type(tokenizer).__name__}, {len(tokenizer)} entries; every sample ends with "
        f"{end_of_conversation_token(args, tokenizer)!r}; padding is {tokenizer.pad_token!r}"
    )
    return tokenizer


def create_data(
    args: Namespace, tokenizer: PreTrainedTokenizerBase, ahead: bool
) -> tuple[PromptDataset, PromptDataset]:
    """Training and evaluation data: prepared whole and cached, or with `--streaming` read window by window."""
    end_token, columns = end_of_conversation_token(args, tokenizer), parse_columns(args.columns)
    if args.streaming:
        return create_prompt_stream(
            args.local_rank, [*args.data_path, *args.sft_only_data_path], args.data_output_path, args.seed, tokenizer,
            args.max_seq_len, end_token, window_size(args), args.completion_only_loss, columns, args.chat_template,
            ahead,
        )  # fmt: skip
    return create_prompt_dataset(
        args.local_rank, args.data_path, args.data_split, args.data_output_path, SFT_PHASE, args.seed, tokenizer,
        args.max_seq_len, end_token, args.sft_only_data_path, num_proc=args.preprocessing_num_workers,
        completion_only=args.completion_only_loss, columns=columns, chat_template=args.chat_template,
    )  # fmt: skip


def create_model(
    args: Namespace, tokenizer: PreTrainedTokenizerBase, ds_config: dict, untrained: bool = False
) -> torch.nn.Module:
    """The model as it will train: loaded (`untrained`: random weights), LoRA wrapped, checkpointing on."""
    model = create_hf_model(
        AutoModelForCausalLM, args.model_name_or_path, tokenizer, None if untrained else ds_config,
        rlhf_training=untrained, disable_dropout=args.disable_dropout, dropout=args.dropout,
    )  # fmt: skip
    if args.add_eot_token:
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(args.eot_token)
    if args.tiled_mlp:
        print_rank_0(f"Tiled MLP: {tile_mlps(model)}")
    if args.lora_dim > 0:
        model = convert_linear_layer_to_lora(
            model, args.lora_module_name, args.lora_dim, args.lora_alpha, args.lora_dropout
        )
        print_rank_0(f"LoRA: {describe_lora(model)}")
        if args.only_optimize_lora:
            model = only_optimize_lora_parameters(model)
            model = make_model_gradient_checkpointing_compatible(model)
    if args.gradient_checkpointing:
        enable_checkpointing(model, args.activation_offloading)
    print_rank_0(f"Model: {describe_parameters(model)}")
    return model


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
