"""A warm-up that does other than it says is said in one line."""

from argparse import Namespace

import pytest

from utils.train.plan import warm_up_warning


@pytest.mark.parametrize(
    ("schedule", "warm_up", "words"),
    [
        ("cosine", 0, None), ("cosine", 10, None), ("constant_with_warmup", 5, None), ("constant", 0, None),
        ("constant", 5, "has no effect with --lr_scheduler_type constant"),
        ("cosine", 40, "is more than the run's 10 steps: the learning rate ends at 25.0% of its peak"),
    ],
)  # fmt: skip
def test_warm_up(schedule, warm_up, words):
    found = warm_up_warning(Namespace(lr_scheduler_type=schedule, num_warmup_steps=warm_up), 10)
    assert (found is None) if words is None else (words in found)


def test_it_is_printed(run_inside, run_arguments):
    status, printed, error = run_inside([*run_arguments, "--max_steps", "1", "--num_warmup_steps", "5", "--dry_run"])
    assert status == 0 and printed.count("Warm-up: --num_warmup_steps 5 is more than the run's 1 steps") == 1, error
