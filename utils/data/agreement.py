"""Checks once, after the data are prepared, that all ranks have the same: nodes may hold different copies."""

import socket
from typing import NamedTuple

from utils.distributed.ranks import gather_from_all
from utils.errors import UserError


class Content(NamedTuple):
    """What identifies prepared data; equal for equal data, whatever the node."""

    key: str  # a hash of the source files, the settings and the code
    samples: int  # for training
    evaluation: int  # samples
    tokens: int  # of both
    checksum: int  # of all ids and labels


def check_ranks_agree(own: Content) -> None:
    """Compare what all ranks prepared. Every rank must call it.

    Raises:
        UserError: on every rank, where one of them prepared other data than rank 0.
    """
    found: list[tuple[Content, str]] = gather_from_all((own, socket.gethostname()))
    first, first_host = found[0]
    for rank, (other, host) in enumerate(found):
        if other == first:
            continue
        alike = "with other settings or program files" if other[1:] == first[1:] else "from other files"
        raise UserError(
            f"the ranks prepared different data, {alike}: rank 0 ({first_host}) has {_counts(first)}, rank {rank} "
            f"({host}) has {_counts(other)}. Copy the same data, model and program to every node, and start again."
        )


def _counts(content: Content) -> str:
    return (
        f"{content.samples} training samples, {content.evaluation} for evaluation, {content.tokens} tokens "
        f"(key {content.key}, checksum {content.checksum:08x})"
    )
