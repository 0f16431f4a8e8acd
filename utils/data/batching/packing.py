"""Packs documents into rows by best-fit decreasing; no document is split."""

from bisect import bisect_left, insort

import numpy as np


def pack_best_fit(lengths: np.ndarray, row_length: int, order: np.ndarray) -> list[np.ndarray]:
    """Pack documents into rows of at most `row_length` tokens each.

    Best-fit decreasing (Johnson 1973): the longest document first, each into the fullest row that still has room for
    it. It never needs more than 11/9 of the least possible number of rows, plus one.

    Args:
        lengths: [documents] tokens of each, at most `row_length`.
        order: [documents] a permutation that breaks ties, so that each epoch makes rows of its own.

    Returns:
        One array of document numbers per row. The number of rows depends on the lengths alone.

    Raises:
        ValueError: a document is longer than a row.
    """
    if len(lengths) and lengths.max() > row_length:
        raise ValueError(f"a document of {lengths.max()} tokens does not fit a row of {row_length}")
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # free tokens -> rows with that many
    rooms: list[int] = []  # the keys of open_rows, ascending
    for document in order[np.argsort(-lengths[order], kind="stable")].tolist():
        length = int(lengths[document])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), row_length
            rows.append([])
        else:
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room]
                rooms.pop(at)
        rows[row].append(document)
        left = room - length
        if left not in open_rows:
            open_rows[left] = []
            insort(rooms, left)
        open_rows[left].append(row)
    return [np.array(row, dtype=np.int64) for row in rows]
