"""Count optimizer steps that were skipped for a non-finite loss or gradient; several in a row end the run."""

import math

import deepspeed

from utils.distributed.ranks import print_rank_0
from utils.errors import UserError
from utils.train.progress import Progress

NAMED_SAMPLES = 16


class NonfiniteSteps:
    """Counts skipped steps.

    An overflow of fp16 gradients with a finite loss is no fault while the loss scale is still falling.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, limit: int) -> None:
        self.engine, self.limit = engine, limit
        self.in_a_row = 0
        self.overflows = 0
        self.overflowed_at: float | None = None  # the loss scale after the skipped step just before

    def follow(self, progress: Progress, samples: list[int], last_checkpoint: str | None) -> None:
        """Count the step just finished, if it was skipped. Every rank must call it after every step; see `check`."""
        if self.engine.was_step_applied():
            self.step_taken()
        else:
            progress.deliver()  # the lines of earlier steps come before this one's, also where it ends the run
            self.check(progress.state.step, progress.losses.of_last_step(), samples, last_checkpoint)

    def step_taken(self) -> None:
        """Start counting anew: a step was applied."""
        self.in_a_row = 0
        self.overflowed_at = None

    def check(self, step: int, loss: float, samples: list[int], last_checkpoint: str | None) -> None:
        """Print why a step was skipped. Every rank must call it for the same step.

        Args:
            loss: mean loss of the step over all ranks.
            samples: positions in the training data of the step's samples.

        Raises:
            UserError: it is the last of `limit` skipped steps in a row.
        """
        if self.engine.fp16_enabled() and math.isfinite(loss) and self._scale_falls():
            self.overflows += 1
            print_rank_0(
                f"Step {step} skipped: gradients overflowed fp16, the loss scale is now "
                f"{self.engine.optimizer.loss_scale:g} ({self.overflows} such steps so far)"
            )
            return
        self.in_a_row += 1
        what = f"its loss is {loss}" if not math.isfinite(loss) else f"its gradients are not finite (loss {loss:.4g})"
        more = f" and {len(samples) - NAMED_SAMPLES} more" if len(samples) > NAMED_SAMPLES else ""
        print_rank_0(
            f"Step {step} skipped: {what}. Its samples, by position in the training data: "
            f"{', '.join(map(str, samples[:NAMED_SAMPLES]))}{more}"
        )
        if self.in_a_row >= self.limit:
            good = f"The last good checkpoint is {last_checkpoint}" if last_checkpoint else "There is no checkpoint"
            raise UserError(
                f"{self.in_a_row} steps in a row, the last step {step}, had a loss or gradients that are not finite "
                f"({what}). {good}. Lower --learning_rate or add --num_warmup_steps; with --dtype fp16 use bf16; look "
                "at the samples named above; --max_bad_steps allows more."
            )

    def _scale_falls(self) -> bool:
        """Whether the loss scale is lower than after the skipped step just before; True where there was none.

        At the minimum of the scale ZeRO ends the run; without ZeRO DeepSpeed keeps skipping every step.
        """
        before, self.overflowed_at = self.overflowed_at, self.engine.optimizer.loss_scale
        return before is None or self.overflowed_at < before
