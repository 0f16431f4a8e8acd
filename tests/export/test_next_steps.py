"""The commands that a run ends with."""

import shlex

from conftest import ROOT

from utils.export.next_steps import next_steps, next_steps_text
from utils.prompt_eval.arguments import parse_args


def test_our_own_commands_can_be_typed(tmp_path):
    """Scripts that exist, and arguments that prompt_eval.py takes; a folder with a blank in its name stays one word."""
    base, folder = str(tmp_path / "a base"), str(tmp_path / "an output")
    commands = [shlex.split(command) for command in next_steps(base, folder).values()]
    own = [words for words in commands if words[0] == "bash"]
    assert len(own) == 2
    for words in own:
        assert (ROOT / words[1]).is_file() and words[-1] == folder
    assert own[1][2:] == [base, folder]
    assert parse_args(["--model_name_or_path_baseline", base, "--model_name_or_path_finetune", folder])
    assert all(folder in words for words in commands)


def test_each_stands_in_a_line_of_its_own():
    lines = next_steps_text("base", "out").splitlines()
    assert lines[0] == "What next:" and len(lines) == 1 + len(next_steps("base", "out"))
    assert all(command in line for line, command in zip(lines[1:], next_steps("base", "out").values(), strict=True))
