"""The data sets of a run: names, weights, and which of them a phase uses."""

import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from utils.errors import UserError

SFT_ONLY_SPLIT = "10,0,0"


class DataSources(NamedTuple):
    """The data sets of a run, each given as `NAME` or `NAME:WEIGHT`."""

    data_path: Sequence[str]  # divided by `data_split`: phase k uses part k
    data_split: str
    sft_only: Sequence[str] = ()  # used whole by phase 1, and not by the others

    def of_phase(self, phase: int) -> list[tuple[str, str]]:
        """Return (data set, split) of each data set that the phase uses, those of `data_path` first."""
        sources = [(name, self.data_split) for name in self.data_path]
        return sources + [(name, SFT_ONLY_SPLIT) for name in self.sft_only if phase == 1]


class Source(NamedTuple):
    """One data set of `--data_path`, and how often each of its training rows is used."""

    name: str
    weight: float


def parse_source(text: str) -> Source:
    """Parse `NAME` or `NAME:WEIGHT`; an existing path that contains a colon is a name.

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
    """Return the rows that a weight makes of a part: its first rows, or the whole part repeated.

    Args:
        index: [rows] shuffled row numbers.

    Returns:
        [round(weight * rows)]
    """
    return np.resize(index, round(weight * len(index)))
