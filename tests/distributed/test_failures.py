"""Last words of a run: what a user can mend is said in their terms, and fp16's overflows are no failure."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch

from utils.distributed.failures import as_user_error
from utils.errors import UserError
from utils.train.nonfinite_steps import NonfiniteSteps
from utils.train.stop_request import SIGNALS, StopRequest


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("as it is"), "as it is"),
        (torch.OutOfMemoryError("CUDA out of memory."), "lower --per_device_train_batch_size"),
        # DeepSpeed's words when the loss scale can't go down any further.
        (
            Exception("Current loss scale already at minimum - cannot decrease scale anymore. Exiting run."),
            "Use --dtype bf16",
        ),
    ],
)
def test_known_failures_say_what_to_do(error, words):
    assert words in str(as_user_error(error))


def test_other_failures_keep_their_traceback():
    assert as_user_error(KeyError("weight")) is None


@pytest.fixture
def fp16_engine():
    """As much of an engine as NonfiniteSteps looks at; no CPU trains in fp16."""
    return SimpleNamespace(fp16_enabled=lambda: True, optimizer=SimpleNamespace(loss_scale=32768.0))


def test_overflows_of_fp16_are_counted_and_no_error(fp16_engine, capsys):
    steps = NonfiniteSteps(fp16_engine, limit=1)
    for step in range(1, 13):
        steps.check(step, 3.5, [1, 2], None)
        fp16_engine.optimizer.loss_scale /= 2
    printed = capsys.readouterr().out
    assert steps.overflows == 12
    assert "Step 12 skipped: gradients overflowed fp16, the loss scale is now 16 (12 such steps so far)" in printed


def test_overflows_at_the_lowest_loss_scale_end_the_run(fp16_engine):
    """Without ZeRO DeepSpeed keeps the scale at its minimum and would skip every step to the end."""
    steps = NonfiniteSteps(fp16_engine, limit=2)
    for step in (1, 3):
        steps.check(step, 3.5, [1, 2], None)
        steps.step_taken()  # the scale may be the same after a good step
    assert steps.overflows == 2
    steps.check(5, 3.5, [1, 2], None)
    steps.check(6, 3.5, [1, 2], None)
    with pytest.raises(UserError, match=r"2 steps in a row, the last step 7, .*its gradients are not finite.*use bf16"):
        steps.check(7, 3.5, [1, 2], None)


def test_a_loss_that_is_not_finite_is_one_in_fp16_too(fp16_engine, capsys):
    steps = NonfiniteSteps(fp16_engine, limit=2)
    steps.check(1, float("nan"), list(range(40)), "out/checkpoints/step-000001")
    assert "Step 1 skipped: its loss is nan" in capsys.readouterr().out
    steps.step_taken()
    steps.check(3, float("inf"), list(range(40)), "out/checkpoints/step-000001")
    assert "14, 15 and 24 more" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"2 steps in a row, the last step 4.*step-000001.*--max_bad_steps"):
        steps.check(4, float("nan"), [7], "out/checkpoints/step-000001")


def test_a_reader_forked_from_the_run_leaves_signals_to_it(capfd):
    """On a GPU data is read in a process of its own, which Ctrl-C reaches as well: one answer is enough."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        request = StopRequest(10)
        reader = os.fork()
        if reader == 0:
            request._note(signal.SIGINT, None)
            request._note(signal.SIGINT, None)
            os._exit(0 if request.received is None else 1)
        assert os.waitpid(reader, 0)[1] == 0
        assert capfd.readouterr().out == ""
        request._note(signal.SIGINT, None)
        assert request.received == "SIGINT" and "stopping after this step" in capfd.readouterr().out
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
