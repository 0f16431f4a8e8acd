"""Files that DeepSpeed's checkpoint would write, held in memory, so that a thread can write them later."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy

import deepspeed


class HeldFile:
    """The content of one file, in the pieces in which it was written."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.pieces: list[bytes] = []

    def write(self, piece: bytes | memoryview) -> int:
        """Keep a copy of `piece`; return its bytes."""
        self.pieces.append(bytes(piece))
        return len(self.pieces[-1])

    def flush(self) -> None:
        """Do nothing, as a file of memory may."""


@contextmanager
def held_in_memory(engine: deepspeed.DeepSpeedEngine) -> Iterator[list[HeldFile]]:
    """Return a context in which `engine.save_checkpoint` writes into the list that is yielded, and not to the disk.

    What it writes is the content of the files to the byte: changing a weight afterwards changes none of it.
    """
    files: list[HeldFile] = []
    own = engine.checkpoint_engine

    def save(state_dict: dict, path: str) -> None:
        files.append(HeldFile(path))
        own.save(state_dict, files[-1])

    engine.checkpoint_engine = copy(own)
    engine.checkpoint_engine.save = save
    try:
        yield files
    finally:
        engine.checkpoint_engine = own


def write_files(files: list[HeldFile]) -> None:
    """Write the files and have the disk confirm each; memory is given back file by file."""
    while files:
        held = files.pop(0)
        with open(held.path, "wb") as file:
            while held.pieces:
                file.write(held.pieces.pop(0))
            file.flush()
            os.fsync(file.fileno())
