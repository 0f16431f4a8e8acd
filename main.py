"""Fine-tune a causal language model with DeepSpeed: one run, from its arguments to a saved model.

Any decoder-only model of transformers trains, under ZeRO 0 to 3, with or without offload and LoRA, in one process
(`python main.py`) or many (`deepspeed --num_gpus 8 main.py`, torchrun, srun), on GPUs or a CPU.

  * The loss of an optimizer step is the mean over all label tokens of its global batch, however ranks, micro batches
    and accumulation cut it. By default there is no padding: samples lie end to end in one row, each attends to itself
    alone, and the real model shows before training that this changes nothing.
  * Perplexity is exp(summed negative log-likelihood / label tokens) over the evaluation data.
  * The saved model loads with plain `from_pretrained`, LoRA merged; before the run ends it is loaded and compared.

`utils/arguments/preflight.py` refuses what can't work before a model is loaded.
"""

if __name__ == "__main__":
    from utils.arguments.early import answer_early

    answer_early()  # what needs none of the libraries below, whose import takes seconds

from argparse import Namespace
from dataclasses import replace

from utils.logging.library_log import quiet_libraries  # first: DeepSpeed prints while it is imported

# isort: split
from deepspeed import DeepSpeedEngine

from utils.arguments.output_folder import claim_output_folder, release_output_folder
from utils.arguments.parser import parse_args
from utils.arguments.preflight import check_run
from utils.checkpoint.checkpointer import Checkpointer, Run
from utils.checkpoint.final_model import save_final_model
from utils.checkpoint.rehearsal import rehearse_saving
from utils.checkpoint.resume import date_of_run, decisions_of_run, newest_checkpoint
from utils.data.batching.batches import collate_for
from utils.data.training_data import TrainingData, load_training_data
from utils.distributed.failures import end_run
from utils.distributed.launchers import adopt_launcher, launched_rank
from utils.distributed.process_group import leave_process_group
from utils.distributed.ranks import print_rank_0
from utils.dry_run.dry_run import dry_run
from utils.dry_run.fit import fit_to_memory
from utils.dry_run.step_down import run_stepping_down
from utils.ds_utils import build_ds_config
from utils.engine.engine import create_engine
from utils.engine.nvme_swap import remove_swap_folders
from utils.logging.console import begin, print_any_text
from utils.machine.interrupts import raise_at_interrupt
from utils.machine.streams import open_closed_streams
from utils.model.build import create_model, model_form
from utils.model.layout_check import choose_layout
from utils.model.learning_rate import advise_rate
from utils.model.model_utils import count_parameters
from utils.model.special_tokens import stop_where_answers_end
from utils.model.stored_masters import restore_stored_masters
from utils.model.tokenizer import create_tokenizer
from utils.module.compiled import compile_blocks
from utils.module.neftune import add_embedding_noise
from utils.module.router_loss import describe_routers
from utils.prompt_eval.samples import answerer
from utils.run_config import RunConfig
from utils.train.epoch import finish_step, open_epoch
from utils.train.nonfinite_steps import NonfiniteSteps
from utils.train.perplexity import measure_perplexity
from utils.train.plan import is_checkpoint_due, is_evaluation_due
from utils.train.progress import Progress
from utils.train.run_file import recorded_run
from utils.train.start import start_run
from utils.train.step import micro_step
from utils.train.stop_request import StopRequest


def main(args: Namespace) -> None:
    """Train one model, from arguments to a saved folder; `args` stay as typed, `config` holds the decisions."""
    begin("checking the arguments")
    check_run(args)
    begin("joining the ranks")
    config, groups = start_run(args)
    begin("taking the output folder")
    claim_output_folder(args)
    config = replace(config, template_date=date_of_run(args))
    begin("loading the tokenizer")
    tokenizer = create_tokenizer(args.model_name_or_path, config.eot_token)
    begin("preparing the data")
    data = load_training_data(config, tokenizer)
    config = fit_to_memory(config, data.train, tokenizer, decisions_of_run(args))
    ds_config = build_ds_config(config)
    if args.dry_run:
        dry_run(config, ds_config, tokenizer, data, groups)
        return

    begin("loading the model")
    form = model_form(args, config.gradient_checkpointing)
    model = create_model(args.model_name_or_path, form, tokenizer, ds_config)
    stop_where_answers_end(model, tokenizer, data.train)
    advise_rate(count_parameters(model)[1], args.learning_rate, args.lora_learning_rate, args.lora_dim)
    begin("preparing DeepSpeed")
    engine = create_engine(config, model, ds_config, groups)
    restore_stored_masters(engine, args.model_name_or_path)
    begin("trying to save")
    rehearse_saving(config, engine, tokenizer)
    begin("checking the layout of batches")
    layout = choose_layout(
        engine.module, config.layout, len(tokenizer), config.device, config.sequence_part, args.max_seq_len
    )
    config = config.with_layout(layout)
    describe_routers(engine.module)
    add_embedding_noise(engine.module, args.neftune_noise_alpha)
    if args.torch_compile:
        compile_blocks(engine.module, config.compiled_shape)

    begin("reading the checkpoint")
    checkpointer = Checkpointer(config, engine, tokenizer, data)
    run = checkpointer.resume()
    with recorded_run(engine, config, data, *run):
        begin("training")
        train(engine, data, config, run, checkpointer)
        begin("saving the model")
        save_final_model(engine, tokenizer, data, config)


def train(engine: DeepSpeedEngine, data: TrainingData, config: RunConfig, run: Run, checkpointer: Checkpointer) -> None:
    """Take all steps from `run`'s position on; perplexity before the first, after each epoch, every `--eval_steps`."""
    args, (state, plan) = config.args, run
    pad_token_id = checkpointer.tokenizer.pad_token_id
    collate = collate_for(config.layout, pad_token_id, args.max_seq_len, config.sequence_part)
    progress = Progress(engine, config, plan, state)
    nonfinite_steps = NonfiniteSteps(engine, args.max_bad_steps)
    stop = StopRequest(args.ddp_timeout, checkpointer.is_writing)
    answer_samples = answerer(engine, args, data.train.chat, checkpointer.tokenizer, state)

    def evaluate() -> None:
        begin("evaluating")
        progress.begin_evaluation()
        result = measure_perplexity(engine, data.evaluation, collate, config, stop.agreed)
        if result is None:
            checkpointer.interrupt(progress, stop.received)
        progress.end_evaluation(result)
        answer_samples()
        checkpointer.evaluated(state, result.loss, len(data.evaluation))
        progress.restart_clock()
        begin("training")

    print_rank_0("***** Running training *****")
    if state.evaluation_due:
        evaluate()
    while not (plan.is_done(state) or checkpointer.has_lost_patience(state)):
        epoch = open_epoch(config, data.train, plan, state, collate)
        progress.start_epoch(epoch.micro_batches)
        engine.train()
        for batch in epoch.batches:
            loss = micro_step(engine, batch, config.device)
            progress.add_micro_batch(loss, batch)
            if not batch.is_last:
                continue

            samples = finish_step(epoch, data.train, state, batch.step)
            progress.finish_step(batch.step)
            nonfinite_steps.follow(progress, samples, checkpointer.last_checkpoint)
            state.evaluation_due = is_evaluation_due(state, plan, args.eval_steps)
            if stop.agreed():
                checkpointer.interrupt(progress, stop.received)
            checkpointer.follow(stop.all_idle)
            if state.evaluation_due:
                progress.report()
                evaluate()
            if is_checkpoint_due(state, args.save_strategy, args.save_steps):
                checkpointer.save_due(progress)
            if plan.is_done(state) or checkpointer.has_lost_patience(state):
                break
    checkpointer.finish()
    stop.close()
    progress.close()


def run(argv: list[str] | None = None) -> None:
    """Start `main`; a failure ends with one message and the exit status of its kind."""
    open_closed_streams()
    print_any_text()
    try:
        adopt_launcher()
        with quiet_libraries():
            run_stepping_down(main, parse_args(argv), newest_checkpoint, release_output_folder)
            leave_process_group()
    except BaseException as err:
        end_run(err, launched_rank())
    finally:
        remove_swap_folders()
        release_output_folder()


if __name__ == "__main__":
    raise_at_interrupt()
    run()
