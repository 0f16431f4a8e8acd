"""GPUs that are not here, as `--dry_run 64x80` names them."""

import re
from typing import NamedTuple

from utils.errors import UserError

HERE = "here"  # what a bare --dry_run means


class Gpus(NamedTuple):
    """What a plan is for."""

    count: int  # over all nodes
    gigabytes: float  # of memory each, in 1e9 bytes


def parse_gpus(text: str | None) -> Gpus | None:
    """The GPUs of `--dry_run 64x80`; None for a run, or a dry run, on this machine.

    Raises:
        UserError: the text is not of that form.
    """
    if text in (None, HERE):
        return None
    match = re.fullmatch(r"([1-9]\d*)[xX×](\d+(?:\.\d+)?)", text)
    if not match or float(match[2]) == 0:
        raise UserError(f"--dry_run {text}: write GPUs x gigabytes, as in 64x80, or nothing for this machine.")
    return Gpus(int(match[1]), float(match[2]))
