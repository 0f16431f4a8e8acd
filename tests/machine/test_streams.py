"""Runs whose standard streams are closed, as services and `>&-` start them."""

import os
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
