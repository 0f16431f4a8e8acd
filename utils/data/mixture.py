"""The data sets of a run: names, weights, and which of them a phase uses."""

import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from utils.data.raw_datasets import known_name
from utils.errors import UserError

SFT_ONLY_SPLIT = "10,0,0"
KNOWN_SPLIT = "2,4,4"  # of known data sets: rows are left for the reward and RLHF phases
# Uses of a data set.
BOTH = "both"
TRAINING = "training"
EVALUATION = "evaluation"


class DataSources(NamedTuple):
    """The data sets of a run, each given as `NAME` or `NAME:WEIGHT`."""

    data_path: Sequence[str]  # divided by `data_split`: phase k uses part k
    data_split: str | None  # None: see `shares_of`
    sft_only: Sequence[str] = ()  # used whole by phase 1, and not by the others
    evaluation: Sequence[str] = ()  # evaluated whole, in place of the evaluation rows of the others

    def of_phase(self, phase: int) -> list[tuple[str, str, str]]:
        """Return (data set, split, use) of each data set that the phase uses, those of `data_path` first."""
        use = TRAINING if self.evaluation else BOTH
        sources = [(name, shares_of(name, self.data_split), use) for name in self.data_path]
        sources += [(name, SFT_ONLY_SPLIT, use) for name in self.sft_only if phase == 1]
        return sources + [(name, SFT_ONLY_SPLIT, EVALUATION) for name in self.evaluation]


def shares_of(text: str, data_split: str | None) -> str:
    """Return how a data set is divided among the phases.

    Args:
        text: the data set, as `NAME` or `NAME:WEIGHT`.
        data_split: as typed; None leaves known data sets as published and gives this phase all data of one's own.
    """
    if data_split is not None:
        return data_split
    return SFT_ONLY_SPLIT if known_name(parse_source(text).name) is None else KNOWN_SPLIT


def divided_as(data_path: Sequence[str], data_split: str | None) -> str:
    """Return how all data sets of `data_path` are divided among the phases, in the words of `--data_split`."""
    shares = dict.fromkeys(shares_of(name, data_split) for name in data_path)
    return " and ".join(shares) or data_split or KNOWN_SPLIT


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


def check_evaluation_source(text: str) -> None:
    """Check one name of `--eval_data_path`; raises UserError where it has a weight."""
    if parse_source(text).weight != 1:
        raise UserError(f"--eval_data_path {text} has a weight: every row is evaluated once, so leave it out.")


def weighted(index: np.ndarray, weight: float) -> np.ndarray:
    """Return the rows that a weight makes of a part: its first rows, or the whole part repeated.

    Args:
        index: [rows] shuffled row numbers.

    Returns:
        [round(weight * rows)]
    """
    return np.resize(index, round(weight * len(index)))
