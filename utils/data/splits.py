"""Divides rows among the phases by shuffled indexes that are the same on every machine and in every run.

The three phases of RLHF training share one data set. Each uses its own part of one shuffled index, so a later phase,
run elsewhere, must compute exactly the same parts: the result depends only on the seed, the split text and the number
of rows.
"""

import io
import os
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from utils.errors import UserError
from utils.files import write_aside
from utils.logging.console import say
from utils.notation import parse_data_split

PUBLISHED = "published"
LARGEST_REMAINDER = "largest remainder"


class Boundaries(NamedTuple):
    """Where the parts of a split begin and end: part k is `[boundaries[k], boundaries[k + 1])`."""

    boundaries: list[int]
    rule: str  # PUBLISHED or LARGEST_REMAINDER; callers print where the second was needed


def get_shuffle_idx(seed: int, size: int) -> np.ndarray:
    """Return the row numbers 0 to `size - 1` in an order fixed by `seed`, [size] of `index_dtype`."""
    index = np.arange(start=0, stop=size, step=1, dtype=index_dtype(size))
    np.random.RandomState(seed=seed).shuffle(index)
    return index


def index_dtype(size: int) -> type:
    """Return the integer type of an index over `size` rows, which is part of the published file format."""
    return np.uint32 if size < 2**32 - 2 else np.int64


def split_boundaries(data_split: str, size: int) -> Boundaries:
    """Divide `size` rows into consecutive parts whose lengths follow the shares in `data_split`.

    The published rule applies wherever its boundaries increase from 0 to `size`. Where they decrease (as "0,5,5" does
    for 7 rows), parts would overlap, and the largest remainder rule applies instead.

    Raises:
        UserError: `data_split` is malformed.
    """
    shares = parse_data_split(data_split)
    published = _published_boundaries(shares, size)
    if published[-1] == size and all(low <= high for low, high in pairwise(published)):
        return Boundaries(published, PUBLISHED)
    return Boundaries(_largest_remainder_boundaries(shares, size), LARGEST_REMAINDER)


def _published_boundaries(shares: list[float], size: int) -> list[int]:
    """Return the rounded running sums, all but the first moved so that the last one is `size`."""
    total = sum(shares)
    ends = np.cumsum([round(share / total * float(size)) for share in shares], dtype=np.int64)
    return [0, *(ends - (ends[-1] - size)).tolist()]


def _largest_remainder_boundaries(shares: list[float], size: int) -> list[int]:
    """Give every part the whole rows of its quota, and the rest to the largest fractions, ties to the first part.

    Fractions are exact, so a zero share has no remainder and never gets a row.
    """
    exact = [Fraction(share) for share in shares]
    quotas = [share * size / sum(exact) for share in exact]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda part: counts[part] - quotas[part])
    for part in by_remainder[: size - sum(counts)]:
        counts[part] += 1
    return [0, *np.cumsum(counts, dtype=np.int64).tolist()]


def get_raw_dataset_split_index(
    local_rank: int,
    output_path: str,
    dataset_name: str,
    seed: int,
    split_name: str,
    data_split: str,
    split_index: int,
    data_size: int,
    rebuild: bool = False,
) -> np.ndarray:
    """Return the row numbers of one part of a data set, and keep those of all parts on disk.

    The files `{output_path}/{dataset_name}_seed{seed}_{split_name}_{data_split}_{k}.npy` are for later phases and
    other tools. The result is always computed, which takes no longer than checking a file would; a file that differs
    from it in any byte (made for another size, truncated, overwritten) is written anew.

    Args:
        local_rank: only ranks 0 and -1 print.
        dataset_name: the clean name, without `/` and `-`.
        data_split: the shares, such as "2,4,4".
        split_index: the part, from 0.
        data_size: rows of the data set.
        rebuild: write every file anew, even a correct one.

    Returns:
        [rows of that part] uint32 (int64 from 2**32 - 2 rows up).

    Raises:
        UserError: `data_split` is malformed, or a file cannot be written.
    """
    boundaries = split_boundaries(data_split, data_size).boundaries
    if not 0 <= split_index < len(boundaries) - 1:
        raise ValueError(f'part {split_index} of split "{data_split}" was asked for: it has {len(boundaries) - 1}')
    shuffled = get_shuffle_idx(seed, data_size)
    prefix = os.path.join(output_path, f"{dataset_name}_seed{seed}_{split_name}_{data_split}")
    for part in range(len(boundaries) - 1):
        index = shuffled[boundaries[part] : boundaries[part + 1]]
        _keep_index(f"{prefix}_{part}.npy", index, rebuild, quiet=local_rank > 0)
    # A copy: a view would hold the whole index in memory.
    return shuffled[boundaries[split_index] : boundaries[split_index + 1]].copy()


def _keep_index(path: str, index: np.ndarray, rebuild: bool, quiet: bool) -> None:
    """Write the file at `path` unless it holds exactly `index`."""
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=True)
    wanted = buffer.getvalue()
    try:
        found = None
        if os.path.isfile(path):
            with open(path, "rb") as file:
                found = file.read(len(wanted) + 1)
        if found == wanted and not rebuild:
            return
        if found is not None and not quiet:
            say(f"Split index {path} does not fit the data or was to be rebuilt: written anew")
        with write_aside(path) as file:
            file.write(wanted)
    except OSError as err:
        raise UserError(
            f"The split index {path} cannot be kept: {err}. Make the folder writable or free some space, or "
            "choose another with --data_output_path."
        ) from err
