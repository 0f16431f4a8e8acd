"""Keep a run: resume it, write its checkpoints and its best model, and end it when it is asked to stop."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, NoReturn

import deepspeed
import transformers
from transformers import PreTrainedTokenizerBase

from utils.checkpoint.checkpoint_folder import checkpoints_folder, find_checkpoint, restore_random_states
from utils.checkpoint.resume import data_record, describe_position, follow_schedule, restore, run_record
from utils.checkpoint.write_checkpoint import Begun, begin_checkpoint, finish_checkpoint, save_checkpoint
from utils.data.training_data import TrainingData
from utils.distributed.failures import Interrupted
from utils.distributed.ranks import answer_of_rank_0, global_rank, is_rank_0, print_rank_0
from utils.errors import UserError
from utils.export.hf_model import publish_model
from utils.export.owned_files import keep_foreign, owned_files
from utils.export.save import export_form, save_verified_model
from utils.files import INCOMPLETE, replace_folder, write_json
from utils.logging.console import phase
from utils.logging.loss_curve import PICTURE, draw_losses
from utils.machine.device import set_random_seed
from utils.module.attention import clear_documents
from utils.run_config import RunConfig
from utils.train.plan import RunPlan, make_plan
from utils.train.progress import Progress
from utils.train.state import RunState

NAME = "best_model"
RECORD = "best.json"


class Run(NamedTuple):
    """A run in progress: its position and its length."""

    state: RunState
    plan: RunPlan


class Checkpointer:
    """Saves the run's position, and its model where it is the best so far. Every rank must make the same calls."""

    def __init__(
        self,
        config: RunConfig,
        engine: deepspeed.DeepSpeedEngine,
        tokenizer: PreTrainedTokenizerBase,
        data: TrainingData,
    ) -> None:
        self.config, self.engine, self.tokenizer, self.data = config, engine, tokenizer, data
        self.last_checkpoint: str | None = None
        self._saved: RunState | None = None
        self._begun: Begun | None = None  # a checkpoint that is being written
        self._answers = 0  # of all ranks, since it was begun
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._record: dict[str, Any] = {}  # what each checkpoint's marker holds beside the position

    def resume(self) -> Run:
        """Return the run at the position `--resume_from_checkpoint` names, or at its start, with its learning rate.

        Raises:
            UserError: the checkpoint is not complete, or belongs to other arguments or data.
        """
        args, engine = self.config.args, self.engine
        checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint, print_rank_0)
        data = data_record(self.data, args, self.tokenizer)  # of a stream at its first window, wherever the run stands
        if checkpoint is None:
            forget_best_model(args.output_dir)
            state = RunState()
        else:
            state = restore(engine, checkpoint, data, args)
        # Only now is the number of steps known: packing depends on what the model can do.
        plan = make_plan(self.config, self.data.train, state)
        self._record = run_record(engine, data, self.config)
        engine.lr_scheduler = transformers.get_scheduler(
            args.lr_scheduler_type, engine.basic_optimizer, args.num_warmup_steps, plan.steps
        )
        # Weights are the same on all ranks by now; from here on each rank draws its own dropout masks.
        set_random_seed(args.seed + global_rank())
        if checkpoint is not None:
            print_rank_0(describe_position(checkpoint, state, plan))
            follow_schedule(engine, state)
            restore_random_states(checkpoint, args.seed)
        return Run(state, plan)

    def save(self, progress: Progress) -> str:
        """Write a checkpoint of the run's position, unless it is already written; returns its folder."""
        self.finish()
        state = self._position(progress)
        if self.last_checkpoint is None or self._saved != state:
            with phase("saving a checkpoint"):
                self._published(save_checkpoint(self.engine, self.tokenizer, state, self.config, self._record))
            self._saved = RunState.from_dict(state.to_dict())
        return self.last_checkpoint

    def save_due(self, progress: Progress) -> None:
        """Write a checkpoint that is due, or begin to with `--save_in_background`."""
        if not self.config.args.save_in_background:
            self.save(progress)
            return
        self.finish()
        state = self._position(progress)
        with phase("copying a checkpoint"):
            self._begun = begin_checkpoint(self.engine, state, self.config, self._record, self._writer)
        self._answers = 0
        self._saved = RunState.from_dict(state.to_dict())

    def is_writing(self) -> bool:
        """Whether this rank's files of a checkpoint are still being written."""
        return self._begun is not None and not self._begun.writing.done()

    def follow(self, all_idle: bool) -> None:
        """Publish a checkpoint once it is written. Every rank must call it after each step.

        Args:
            all_idle: no rank was writing one step ago, the same on all ranks.
        """
        self._answers += 1  # the first answer is older than the checkpoint
        if self._begun is not None and all_idle and self._answers > 1:
            self.finish()

    def finish(self) -> None:
        """Wait for a checkpoint that is being written, and publish it."""
        if self._begun is not None:
            begun, self._begun = self._begun, None
            with phase("saving a checkpoint"):
                self._published(finish_checkpoint(begun, self.config))

    def _published(self, folder: str) -> None:
        self.last_checkpoint = folder
        print_rank_0(f"Checkpoint: {folder}")

    def _position(self, progress: Progress) -> RunState:
        """Return the run's position, with what a run that goes on from it needs."""
        progress.record_losses()
        progress.state.scheduler_steps = self.engine.lr_scheduler.last_epoch
        progress.state.metrics_bytes = progress.metrics.size()
        return progress.state

    def interrupt(self, progress: Progress, received: str | None) -> NoReturn:
        """Save and end the run as a signal asked; `received` names the signal, None when another rank got it.

        Raises:
            Interrupted: always.
        """
        output_dir = self.config.args.output_dir
        why = f"Stopped at step {progress.state.step}" + (f" by {received}" if received else "")
        if output_dir is None:
            progress.deliver()
            raise Interrupted(f"{why}. Nothing is saved: there is no --output_dir.")
        folder = self.save(progress)
        if is_rank_0():
            draw_losses(output_dir)
        if self.config.save_only_model:
            raise Interrupted(f"{why}. Its model is in {folder}; --save_only_model leaves nothing to go on from.")
        raise Interrupted(f"{why}. To go on: the same command with --resume_from_checkpoint latest ({folder})")

    def evaluated(self, state: RunState, loss: float, samples: int) -> None:
        """Note the loss of the evaluation that was due, over so many samples; keep the model if it is the best."""
        if samples == 0:
            state.evaluation_due = False
            return
        if state.record_evaluation(loss) and self.config.args.load_best_model_at_end:
            clear_documents()
            with phase("saving the best model"):
                self._keep_best_model(state)
        if self.has_lost_patience(state):
            print_rank_0(
                f"Early stop after step {state.step}: {state.evaluations_without_gain} evaluation(s) in a "
                f"row without a loss below {state.best_loss:.6g} of step {state.best_step}"
            )

    def has_lost_patience(self, state: RunState) -> bool:
        """Whether `--early_stopping_patience` evaluations in a row brought no lower loss."""
        patience = self.config.args.early_stopping_patience
        return patience is not None and state.evaluations_without_gain >= patience

    def _keep_best_model(self, state: RunState) -> None:
        """Save the model as the best so far, verified, in place of the one before. Every rank must call it."""
        folder = best_model_folder(self.config.args.output_dir)
        work = os.path.join(os.path.dirname(folder), INCOMPLETE + NAME)
        if is_rank_0():
            shutil.rmtree(work, ignore_errors=True)
        form = export_form(self.config, self.tokenizer)
        save_verified_model(self.engine, self.tokenizer, self.data.train[0]["input_ids"], work, form)
        if is_rank_0():
            _spare_foreign_files(folder)
            write_json(os.path.join(work, RECORD), {"step": state.step, "eval_loss": state.best_loss})
            replace_folder(work, folder)
        print_rank_0(f"Best model so far: step {state.step}, evaluation loss {state.best_loss:.6g}")


def best_model_folder(output_dir: str) -> str:
    """Return the folder of the model of the lowest evaluation loss, kept beside the checkpoints."""
    return os.path.join(checkpoints_folder(output_dir), NAME)


def forget_best_model(output_dir: str | None) -> None:
    """Remove an earlier run's best model, and print it; a run that starts anew calls this."""
    if not output_dir or not is_rank_0():
        return
    folder = best_model_folder(output_dir)
    if os.path.isfile(os.path.join(folder, RECORD)):
        _spare_foreign_files(folder)
        shutil.rmtree(folder, ignore_errors=True)
        print_rank_0(f"The best model of an earlier run, in {folder}, is removed: this run starts anew")


def _spare_foreign_files(folder: str) -> None:
    """Keep what no run wrote into a best model's folder that is about to go; one without a list is all a run's."""
    owned = owned_files(folder)
    if owned:
        keep_foreign(folder, {RECORD, *owned})


def publish_best_model(output_dir: str) -> bool:
    """Make the best model the final one, in `output_dir`; False when there is none. Every rank must call it.

    Raises:
        UserError: it can't be written; the best model stays where it is.
    """
    folder = best_model_folder(output_dir)
    found = answer_of_rank_0(os.path.isfile(os.path.join(folder, RECORD)))
    if found and is_rank_0():
        try:
            publish_model(folder, output_dir, leave_out=(RECORD, PICTURE))
        except OSError as err:
            raise UserError(f"can't copy the best model to {output_dir} ({err}): it is whole in {folder}.") from err
        with open(os.path.join(folder, RECORD), encoding="utf-8") as file:
            best = json.load(file)
        print_rank_0(
            f"Saved to {output_dir}: the model of step {best['step']}, evaluation loss {best['eval_loss']:.6g}, "
            "verified when it was kept"
        )
    return found
