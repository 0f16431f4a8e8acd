"""Names the place of the first row that is refused: tokenization works on batches, in processes that don't know it."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np

from utils.data.formats.base import PromptRawDataset
from utils.data.tokenization.sample_form import SampleForm
from utils.data.tokenization.tokenize_rows import map_arguments
from utils.errors import UserError

ROWS_AT_ONCE = 100


def name_refused_row(raw: PromptRawDataset, split: str, sample: SampleForm, numbers: np.ndarray | None = None) -> None:
    """Raise UserError with the place of the first row of phase 1 that is refused; return where none is.

    Args:
        split: "train" or "eval".
        numbers: [rows] which rows of the source are used, in order; None: all.
    """
    name = (raw.eval_split if split == "eval" else None) or raw.train_split
    data = raw.raw_datasets[name].dataset
    rows: Iterable[dict[str, Any]] = data if numbers is None else data.select(numbers)
    mapping = map_arguments(raw, sample, 1, sample.tokenizer)
    rows, first = iter(rows), 0
    while batch := list(islice(rows, ROWS_AT_ONCE)):
        if _refusal(batch, mapping) is not None:
            for place, row in enumerate(batch):
                if why := _refusal([row], mapping):
                    number = first + place if numbers is None else int(numbers[first + place])
                    raise UserError(f"{raw.place_of(name, number)}: {why}")
        first += len(batch)


def _refusal(rows: list[dict[str, Any]], mapping: dict[str, Any]) -> str | None:
    """Return why rows are refused; None where they are not."""
    try:
        mapping["function"]({name: [row[name] for row in rows] for name in rows[0]}, **mapping["fn_kwargs"])
    except UserError as err:
        return str(err)
    return None
