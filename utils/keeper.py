"""What a run keeps of itself on its way: checkpoints, the best model, and what it does when asked to stop."""

from argparse import Namespace
from typing import Any, NoReturn

import deepspeed
import torch
from transformers import PreTrainedTokenizerBase

from utils.attention import set_documents
from utils.best_model import keep_best_model
from utils.checkpoint import save_checkpoint
from utils.console import phase
from utils.interrupt import Interrupted
from utils.metrics import draw_losses
from utils.progress import Progress
from utils.run_state import RunState
from utils.utils import global_rank, print_rank_0

SAMPLE_TOKENS = 64


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
