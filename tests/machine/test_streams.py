"""Runs whose standard streams are closed, as services and `>&-` start them."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from fork_runs import finished_run


def without_streams(argv: list[str]) -> None:
    """main.py with all three streams closed."""
    import main

    for number in range(3):
        os.close(number)
    sys.stdin = sys.stdout = sys.stderr = None
    main.run(argv)


def test_a_run_without_streams_trains_and_saves(run_arguments, tmp_path):
    command = [*run_arguments, "--max_steps", "1", "--per_device_train_batch_size", "8"]
    printed = finished_run([*command, "--output_dir", tmp_path / "out"], program=without_streams)
    assert printed.strip() == "" and (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("program", ["main.py", "prompt_eval.py"])
def test_no_file_gets_the_number_of_a_closed_stream(program):
    """The next file to be opened would: native warnings would be written into it."""
    script = (
        "import sys, os; sys.argv[1:] = ['--no_such_flag']\n"
        f"from utils.{'arguments' if program == 'main.py' else 'prompt_eval'}.early import answer_early\n"
        "try:\n    answer_early()\nexcept SystemExit:\n    pass\n"
        "file = os.open('pytest.ini', os.O_RDONLY)\nsys.exit(file if sys.stdout and sys.stderr and sys.stdin else 99)"
    )
    done = subprocess.run(
        ["bash", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, script], cwd=ROOT, check=False
    )
    assert done.returncode >= 3 and done.returncode != 99


def with_a_pipe_that_nobody_reads(argv: list[str]) -> None:
    """main.py whose stdout goes to a reader that ends after the first line, as `| head -1` does."""
    import main

    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(writer)
    os.close(reader)
    former, sys.stdout = sys.stdout, os.fdopen(1, "w", closefd=False)
    main.run(argv)
    assert former, "or its end would have closed the descriptor"


def on_a_full_disk(argv: list[str]) -> None:
    """main.py whose stdout is a file on a disk that is full."""
    import main

    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    former, sys.stdout = sys.stdout, os.fdopen(1, "w", closefd=False)
    main.run(argv)
    assert former


@pytest.mark.parametrize(
    ("program", "why"), [(with_a_pipe_that_nobody_reads, "Broken pipe"), (on_a_full_disk, "No space left on device")]
)
def test_a_run_goes_on_without_a_stdout_that_takes_its_lines(program, why, run_arguments, tmp_path):
    command = [*run_arguments, "--max_steps", "1", "--per_device_train_batch_size", "8"]
    printed = finished_run([*command, "--output_dir", tmp_path / "out"], program=program)
    assert printed.strip() == f"stdout can't be written any more ({why}): the run goes on without printing"
    assert (tmp_path / "out" / "config.json").exists()


def under_nohup(argv: list[str]) -> None:
    """main.py with SIGHUP ignored, which gets one in the second step."""
    import main
    from utils.train.progress import Progress

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    start = Progress.start_epoch
    Progress.start_epoch = lambda self, *given: (os.kill(os.getpid(), signal.SIGHUP), start(self, *given))
    main.run(argv)


def test_nohup_is_respected(run_arguments, tmp_path):
    command = [*run_arguments, "--max_steps", "2", "--per_device_train_batch_size", "8"]
    printed = finished_run([*command, "--output_dir", tmp_path / "out"], program=under_nohup)
    assert "SIGHUP" not in printed and (tmp_path / "out" / "config.json").exists()


def test_answers_for_a_reader_that_has_enough(tiny_opt):
    """`| head -1`: no message of a broken pipe, and the status that a shell gives."""
    command = f'"{sys.executable}" prompt_eval.py --model_name_or_path_baseline "{tiny_opt}" '
    command += f'--model_name_or_path_finetune "{tiny_opt}" --max_new_tokens 2 | true; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "141" and "Broken" not in done.stderr, done.stderr
