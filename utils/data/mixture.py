"""The data sets of a run: names, weights, and which of them a phase uses."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from utils.notation import parse_source

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
    from utils.data.raw_datasets import known_name  # imports datasets, which the command line can wait for

    return SFT_ONLY_SPLIT if known_name(parse_source(text).name) is None else KNOWN_SPLIT


def divided_as(data_path: Sequence[str], data_split: str | None) -> str:
    """Return how all data sets of `data_path` are divided among the phases, in the words of `--data_split`."""
    shares = dict.fromkeys(shares_of(name, data_split) for name in data_path)
    return " and ".join(shares) or data_split or KNOWN_SPLIT


def weighted(index: np.ndarray, weight: float) -> np.ndarray:
    """Return the rows that a weight makes of a part: its first rows, or the whole part repeated.

    Args:
        index: [rows] shuffled row numbers.

    Returns:
        [round(weight * rows)]
    """
    return np.resize(index, round(weight * len(index)))
