"""What a run keeps of itself on its way: checkpoints, the best model, and what it does when asked to stop."""

import json
import os
import shutil
from argparse import Namespace
from typing import Any, NoReturn

import deepspeed
import torch
from transformers import PreTrainedTokenizerBase

from utils.checkpoint.checkpoint_folder import checkpoints_folder, save_checkpoint
from utils.distributed.ranks import answer_of_rank_0, global_rank, print_rank_0
from utils.errors import UserError
from utils.export.hf_model import publish_model, save_model_folder, settled, unwrap
from utils.export.model_card import describe_model
from utils.export.peft_adapter import ADAPTER_FOLDER, save_lora_adapter
from utils.export.verify import live_logits, verify_saved_model
from utils.logging.console import phase
from utils.logging.loss_curve import PICTURE, draw_losses
from utils.module.attention import set_documents
from utils.train.progress import Progress
from utils.train.state import RunState
from utils.train.stop_request import Interrupted

SAMPLE_TOKENS = 64
NAME = "best_model"
RECORD = "best.json"


class Keeper:
    """Saves the run's position, and its model where it is the best so far. Every rank must make the same calls."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        tokenizer: PreTrainedTokenizerBase,
        args: Namespace,
        progress: Progress,
        state: RunState,
        record: dict[str, Any],
        sample: torch.Tensor,
    ) -> None:
        """`record` goes into every checkpoint's marker; `sample` [length] token ids, to verify a saved model with."""
        self.engine, self.tokenizer, self.args, self.progress = engine, tokenizer, args, progress
        self.state, self.record, self.sample = state, record, sample[None, :SAMPLE_TOKENS]
        self.last_checkpoint: str | None = None
        self._saved: RunState | None = None

    def save(self) -> str:
        """Write a checkpoint of this position, unless it is already written; returns its folder."""
        self.progress.record_losses()
        self.state.scheduler_steps = self.engine.lr_scheduler.last_epoch
        self.state.metrics_bytes = self.progress.metrics.size()
        if self.last_checkpoint is None or self._saved != self.state:
            with phase("saving a checkpoint"):
                self.last_checkpoint = save_checkpoint(self.engine, self.tokenizer, self.state, self.args, self.record)
            self._saved = RunState.from_dict(self.state.to_dict())
            print_rank_0(f"Checkpoint: {self.last_checkpoint}")
        return self.last_checkpoint

    def interrupt(self, received: str | None) -> NoReturn:
        """Save and end the run as it was asked to; `received` names the signal, None when another rank got it.

        Raises:
            Interrupted: always.
        """
        why = f"Stopped at step {self.state.step}" + (f" by {received}" if received else "")
        if self.args.output_dir is None:
            raise Interrupted(f"{why}. Nothing is saved: there is no --output_dir.")
        folder = self.save()
        if global_rank() == 0:
            draw_losses(self.args.output_dir)
        if self.args.save_only_model:
            raise Interrupted(f"{why}. Its model is in {folder}; --save_only_model leaves nothing to go on from.")
        raise Interrupted(f"{why}. To go on: the same command with --resume_from_checkpoint latest ({folder})")

    def evaluated(self, loss: float, samples: int) -> None:
        """The evaluation that was due gave this loss over so many samples."""
        if samples == 0:
            self.state.evaluation_due = False
            return
        if self.state.record_evaluation(loss) and self.args.load_best_model_at_end:
            set_documents(None)
            with phase("saving the best model"):
                keep_best_model(self.engine, self.tokenizer, self.sample, self.state, self.args)
        if self.has_lost_patience():
            print_rank_0(
                f"Early stop after step {self.state.step}: {self.state.evaluations_without_gain} evaluation(s) in a "
                f"row without a loss below {self.state.best_loss:.6g} of step {self.state.best_step}"
            )

    def has_lost_patience(self) -> bool:
        """`--early_stopping_patience` evaluations in a row brought no lower loss."""
        patience = self.args.early_stopping_patience
        return patience is not None and self.state.evaluations_without_gain >= patience


def _folder(args: Namespace) -> str:
    return os.path.join(checkpoints_folder(args.output_dir), NAME)


def forget_best_model(args: Namespace) -> None:
    """Remove an earlier run's; called by a run that starts anew."""
    if args.output_dir and global_rank() == 0:
        shutil.rmtree(_folder(args), ignore_errors=True)


def keep_best_model(
    engine: deepspeed.DeepSpeedEngine,
    tokenizer: PreTrainedTokenizerBase,
    sample: torch.Tensor,
    state: RunState,
    args: Namespace,
) -> None:
    """Save the model as the best so far, verified, in place of the one before. Every rank must call it."""
    folder, work = _folder(args), os.path.join(checkpoints_folder(args.output_dir), ".incomplete-" + NAME)
    if global_rank() == 0:
        shutil.rmtree(work, ignore_errors=True)
    expected = live_logits(engine.module, sample.to(engine.device))
    save_model_folder(settled(engine), tokenizer, work, describe_model(args, tokenizer), args.max_shard_size)
    if args.save_lora_adapter:
        save_lora_adapter(unwrap(engine), args.model_name_or_path, os.path.join(work, ADAPTER_FOLDER))
    if global_rank() == 0:
        verify_saved_model(work, sample, expected)
        with open(os.path.join(work, RECORD), "w", encoding="utf-8") as file:
            json.dump({"step": state.step, "eval_loss": state.best_loss}, file)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(work, folder)
    print_rank_0(f"Best model so far: step {state.step}, evaluation loss {state.best_loss:.6g}")


def publish_best_model(args: Namespace) -> bool:
    """Make the best model the final one, in `--output_dir`; False when there is none. Every rank must call it.

    Raises:
        UserError: it can't be written; the best model stays where it is.
    """
    folder = _folder(args)
    found = answer_of_rank_0(os.path.isfile(os.path.join(folder, RECORD)))
    if found and global_rank() == 0:
        try:
            publish_model(folder, args.output_dir, leave_out=(RECORD, PICTURE))
        except OSError as err:
            raise UserError(
                f"can't copy the best model to {args.output_dir} ({err}): it is whole in {folder}."
            ) from err
        with open(os.path.join(folder, RECORD), encoding="utf-8") as file:
            best = json.load(file)
        print_rank_0(
            f"Saved to {args.output_dir}: the model of step {best['step']}, evaluation loss {best['eval_loss']:.6g}, "
            "verified when it was kept"
        )
    return found
