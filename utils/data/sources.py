"""What the words of a data argument say: a name with a weight, roles with columns."""

import math
import os
import re
from typing import NamedTuple

import numpy as np

from utils.errors import UserError

ROLE_NAMES = (
    "messages", "prompt", "chosen", "rejected", "response", "completion", "instruction", "input", "output",
)  # fmt: skip


class Source(NamedTuple):
    """One word of `--data_path`: a data set and how often each of its training rows is used."""

    name: str
    weight: float


def parse_source(text: str) -> Source:
    """`NAME` or `NAME:WEIGHT`; a path that exists with a colon in it is a name.

    Raises:
        UserError: the weight is not a finite number above 0.
    """
    match = re.fullmatch(r"(.+):([-+]?(?:[\d.]+(?:[eE][-+]?\d+)?|inf|nan))", text)
    if match is None or os.path.exists(text):
        return Source(text, 1.0)
    try:
        weight = float(match[2])
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UserError(f"the weight in --data_path {text} must be a number above 0, such as 0.3, not {match[2]}.")
    return Source(match[1], weight)


def weighted(index: np.ndarray, weight: float) -> np.ndarray:
    """The rows of a part that a weight leaves: its first ones, in shuffled order, or all of them several times.

    Args:
        index: [rows] shuffled row numbers.

    Returns:
        [round(weight * rows)]
    """
    return np.resize(index, round(weight * len(index)))


def parse_columns(text: str | None) -> dict[str, str]:
    """`ROLE=COLUMN,ROLE=COLUMN` as a dict.

    Raises:
        UserError: not of that form, an unknown role, or one named twice.
    """
    columns: dict[str, str] = {}
    for pair in (text or "").split(",") if text is not None else ():
        role, sign, column = (part.strip() for part in pair.partition("="))
        if not sign or not column or role not in ROLE_NAMES:
            raise UserError(
                f'--columns "{text}": {pair!r} is not ROLE=COLUMN with one of the roles {", ".join(ROLE_NAMES)}.'
            )
        if role in columns:
            raise UserError(f'--columns "{text}" names {role} twice.')
        columns[role] = column
    return columns
