"""What users write in arguments: sizes, GPUs, data sets with weights, shares. Parsed without importing any library."""

import math
import os
import re
from argparse import Namespace
from contextlib import suppress
from datetime import date
from typing import NamedTuple

from utils.errors import UserError

HERE = "here"  # the value of a bare --dry_run
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Gpus(NamedTuple):
    """The GPUs a plan is made for instead of this machine."""

    count: int  # over all nodes
    gigabytes: float  # of memory each, in 1e9 bytes


def parse_gpus(text: str | None) -> Gpus | None:
    """Parse `--dry_run 64x80`: 64 GPUs of 80 GB; None for a run, or a dry run, on this machine.

    Raises:
        UserError: the text is not of that form.
    """
    if text in (None, HERE):
        return None
    match = re.fullmatch(r"([1-9]\d*)[xX×](\d+(?:\.\d+)?)", text)
    if not match or float(match[2]) == 0:
        raise UserError(f"--dry_run {text}: write GPUs x gigabytes, as in 64x80, or nothing for this machine.")
    return Gpus(int(match[1]), float(match[2]))


def parse_fit(text: str | None) -> float | None:
    """Parse `--fit 24`: gigabytes of each device; None where the device's own memory counts.

    Raises:
        UserError: the text is no number above 0.
    """
    if text in (None, HERE):
        return None
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise UserError(f"--fit {text}: write gigabytes of each device, as in 24, or nothing for its free memory.")


def is_date(text: str) -> bool:
    """Whether a text is a date in the form YYYY-MM-DD."""
    with suppress(ValueError):
        return date.fromisoformat(text).isoformat() == text
    return False


class Steps(NamedTuple):
    """Optimizer steps from `first` to `last`, both included; the first of a run is 1."""

    first: int
    last: int


def parse_steps(text: str | None) -> Steps | None:
    """Parse `--profile_steps 11:13`; None for None.

    Raises:
        UserError: the text is not of that form.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--profile_steps {text}: write the first and the last step, counted from 1, as in 11:13.")
    return Steps(int(match[1]), int(match[2]))


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


def parse_data_split(text: str) -> list[float]:
    """Parse shares such as "2,4,4": one for every phase, so as many as there are phases; SFT alone needs the first.

    Raises:
        UserError: not numbers, a negative or infinite share, or zeros alone.
    """
    argument = "--data_split"
    advice = 'give shares separated by commas, for example "2,4,4"'
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError as err:
        raise UserError(f'{argument} "{text}" is not a list of numbers: {advice}.') from err
    if not all(math.isfinite(share) for share in [*shares, sum(shares)]):
        raise UserError(f'{argument} "{text}" holds a share that is not a finite number: {advice}.')
    if min(shares) < 0:
        raise UserError(f'{argument} "{text}" holds a negative share: {advice}.')
    if sum(shares) == 0:
        raise UserError(f'{argument} "{text}" gives every part nothing: {advice}.')
    return shares


def parse_size(text: str) -> int:
    """Return the bytes of a size in transformers' spelling: 5GB, 200MB.

    Raises:
        UserError: the text is not of that form, or means zero bytes.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", text.strip(), flags=re.IGNORECASE)
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise UserError(f"--max_shard_size {text}: write a number above 0 with KB, MB, GB or TB, as in 5GB or 200MB.")
    return size


def asked_eot_token(args: Namespace) -> str | None:
    """Return the end token that `--add_eot_token` asks for; None for the tokenizer's own eos."""
    return args.eot_token if args.add_eot_token else None


def default_cache_folder() -> str:
    """Return the user's own cache folder on the node's disk, below $XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "sft_scripts")
