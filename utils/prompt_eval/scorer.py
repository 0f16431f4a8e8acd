"""The user's scorer, a command that reads answers as JSON lines and prints one number per line."""

import json
import math
import shlex
import subprocess
from collections.abc import Sequence

from utils.errors import UserError


def score_answers(command: str, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Run the user's command and return its score of every (prompt, answer) pair; higher is better.

    `command` is started once, without a shell. It reads one line `{"prompt": ..., "answer": ...}` per pair from its
    standard input and prints one finite number per line, as many as there are pairs.

    Raises:
        UserError: the command failed, or printed something else.
    """
    lines = "".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in pairs)
    try:
        done = subprocess.run(shlex.split(command), input=lines, capture_output=True, encoding="utf-8", check=False)
    except OSError as err:
        raise UserError(f"--scorer_command {command!r} cannot be started: {err.strerror}") from err
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed no error"])[-1]
        raise UserError(f"--scorer_command {command!r} ended with status {done.returncode}: {last}")
    printed = done.stdout.split("\n")
    printed = printed[:-1] if printed[-1] == "" else printed
    if len(printed) != len(pairs):
        raise UserError(f"--scorer_command {command!r} printed {len(printed)} lines for {len(pairs)} answers")
    return [_number(text, line, command) for line, text in enumerate(printed, start=1)]


def _number(text: str, line: int, command: str) -> float:
    """Return the finite number that a line of the command's output holds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"--scorer_command {command!r}, line {line} is no finite number: {text[:80]!r}")
    return value
