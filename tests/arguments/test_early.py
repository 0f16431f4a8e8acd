"""What is answered before the libraries are imported: help, and values that are wrong by themselves."""

import argparse
import re
import subprocess
import sys

import deepspeed
import pytest
from conftest import ROOT

from utils.arguments.early import answer_early
from utils.arguments.parser import build_parser

LIBRARIES = {"torch", "transformers", "deepspeed", "datasets", "pandas", "pyarrow"}


def started(*command: str) -> tuple[subprocess.CompletedProcess, set[str], str]:
    """Run a program: (what came of it, the libraries it imported, its own words on stderr)."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    imported = set(re.findall(r"^import time:.*\| +(\w+)$", done.stderr, flags=re.MULTILINE))
    words = "".join(line for line in done.stderr.splitlines(True) if not line.startswith("import time:"))
    return done, imported, words


@pytest.mark.parametrize("program", ["main.py", "prompt_eval.py"])
def test_help_imports_no_library(program):
    done, imported, _ = started(program, "--help")
    assert done.returncode == 0 and "usage:" in done.stdout
    assert "argparse" in imported and not imported & LIBRARIES


def test_a_wrong_value_is_refused_without_a_library():
    done, imported, words = started("main.py", "--model_name_or_path", "no/model", "--max_seq_len", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert words == "error: --max_seq_len must be at least 2, not 1.\n"
    assert not imported & LIBRARIES


def test_a_wrong_value_of_prompt_eval_is_refused_without_a_library():
    done, imported, words = started("prompt_eval.py", "--model_name_or_path_baseline", "no/model", "--top_k", "0")
    assert done.returncode == 2
    assert words.startswith("prompt_eval.py: 2 problems:") and "--top_k 0: at least 1 is needed" in words
    assert not imported & LIBRARIES


def test_a_wrong_column_is_refused_before_models_and_compiler_are_imported(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"left": "a", "right": "b"}\n')
    model = str(ROOT / "demo" / "tiny_opt")
    done, imported, words = started("main.py", "--model_name_or_path", model, "--data_path", str(data), "--dry_run")
    assert done.returncode == 2 and "has the columns left, right" in words
    assert {"torch", "transformers", "datasets"} <= imported
    assert not re.search(r"transformers\.modeling_utils|torch\._dynamo\.convert_frame", done.stderr)


def test_one_rank_speaks(monkeypatch, capsys):
    """The other ranks find the mistake in the run itself, where they wait for rank 0's message."""
    monkeypatch.setattr(sys, "argv", ["main.py", "--model_name_or_path", "no/model", "--max_seq_len", "1"])
    monkeypatch.setenv("RANK", "1")
    answer_early()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as stop:
        answer_early()
    assert stop.value.code == 2 and "--max_seq_len" in capsys.readouterr().err


def test_deepspeeds_arguments_are_those_that_deepspeed_adds():
    def described(parser: argparse.ArgumentParser) -> dict[str, tuple]:
        actions = [action for action in parser._actions if "deep" in action.option_strings[0]]
        return {action.option_strings[0]: (type(action), action.dest, action.default) for action in actions}

    theirs = described(deepspeed.add_config_arguments(argparse.ArgumentParser()))
    assert theirs and described(build_parser()) == theirs


def test_an_older_name_that_is_not_read_is_refused():
    done, _, words = started("main.py", "--model_name_or_path", "no/model", "--deepscale_config", "x.json")
    assert done.returncode == 2 and "--deepscale_config" in words and "--deepspeed_config" in words
