"""The live line, seen through a pseudo-terminal."""

import os
import pty
import re
import select
import struct
import subprocess
import sys
import time
from fcntl import ioctl
from termios import TIOCSWINSZ

import pytest
from conftest import ROOT

from utils.logging import console

CONTRACT = [
    "***** Running training *****",
    "***** Evaluating perplexity, Epoch 1/2 *****",
    "saving the final model ...",
]


def in_terminal(command: list, columns: int) -> str:
    """All that a command writes to a terminal of this width."""
    master, slave = pty.openpty()
    ioctl(slave, TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(list(map(str, command)), stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    seen, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline:
        if select.select([master], [], [], 0.2)[0]:
            try:
                seen += os.read(master, 65536)
            except OSError:  # the other end is closed
                break
        elif process.poll() is not None:
            break
    process.kill()
    os.close(master)
    assert process.wait() == 0, seen.decode()
    return seen.decode()


@pytest.fixture(scope="module")
def terminal_run(run_setting, tmp_path_factory):
    """A run of 20 steps in a terminal 150 columns wide: all that it wrote."""
    places = ["--output_dir", tmp_path_factory.mktemp("run"), "--logging_steps", "3", "--save_steps", "8"]
    return in_terminal([sys.executable, ROOT / "main.py", *run_setting, *places], columns=150)


def test_one_line_has_all_the_figures(terminal_run):
    drawn = re.findall(r"Epoch 2/2 step 1[58]/20 \|.*?\| \d\d:\d\d left, loss [^\r\n]*", terminal_run)
    assert drawn, terminal_run
    figures = (
        r"loss \d\.\d{4}, acc \d+\.\d%, lr \d\.\d\de-\d\d, norm \d\S*, [\d,]+ tok/s, pad 0\.0%, peak \?, \d\.\d GB"
    )
    assert any(re.search(figures, line) for line in drawn), drawn
    assert max(map(len, drawn)) <= 150


def test_it_says_what_else_takes_time(terminal_run):
    for words in ("preparing the optimizer ...", "evaluating", "saving a checkpoint", "writing the model"):
        assert words in terminal_run


def test_lines_stand_whole_above_it(terminal_run):
    """What a user's script greps for begins at the left edge, with nothing of the bar before or after it."""
    shown = [
        line.split("\r")[-1].replace("\x1b[K", "").rstrip() for line in terminal_run.replace("\r\n", "\n").split("\n")
    ]
    for line in CONTRACT:
        assert line in shown, shown
    assert sum(line.startswith("Epoch: ") and "loss = " in line for line in shown) == 20
    assert "Step 3/20, epoch" not in terminal_run, "lines with the figures are for where there is no live line"


def test_nothing_is_drawn_without_a_terminal(capsys):
    console.open_run_bar(10, 0)
    console.advance_run_bar(1, 1)
    console.show_figures("loss 1")
    with console.phase("waiting") as show:
        show("1/2")
    console.close_run_bar()
    console.say("a line")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("a line\n", "")


def test_prints_of_libraries_go_to_the_log_and_ours_are_shown(capsys, caplog):
    @console.chatter_to_log()
    def setting_up():
        print("noise\n\nmore noise")
        console.say("a decision")

    with caplog.at_level("INFO", logger=console.PRINTED):
        setting_up()
    print("after")
    assert capsys.readouterr().out == "a decision\nafter\n"
    assert [record.message for record in caplog.records] == ["noise", "more noise"]
