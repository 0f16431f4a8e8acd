"""What the words of a data argument say: a name with a weight, roles with columns."""

import math
import os
import re
from typing import NamedTuple

import numpy as np

from utils.errors import UserError


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
