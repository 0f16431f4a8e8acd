"""The help of both programs: every flag has a group of its own subject and a help line, and can be printed."""

import pytest

from utils.arguments import parser as training
from utils.prompt_eval import arguments as evaluation

PARSERS = {"main.py": training.build_parser, "prompt_eval.py": evaluation.build_parser}


@pytest.mark.parametrize("program", PARSERS)
def test_help_can_be_printed_and_names_every_flag(program):
    parser = PARSERS[program]()
    printed = " ".join(parser.format_help().split())  # a stray % in a help text raises here
    assert all(flag in printed for action in parser._actions for flag in action.option_strings)


@pytest.mark.parametrize("program", PARSERS)
def test_every_flag_has_a_group_and_a_help_line(program):
    parser = PARSERS[program]()
    loose = [action.dest for action in parser._optionals._group_actions]
    assert loose == ["help"], "these have no group"
    assert all(action.help for action in parser._actions)
