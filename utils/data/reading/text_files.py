"""Opens data files of text, compressed or not, and names the endings of data files.

A name tells what a file is: `.jsonl` what it holds, and a further `.gz`, `.bz2`, `.xz` or `.zst` how it is compressed.
"""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TextIO

from utils.errors import UserError

PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


def _packed(*suffixes: str) -> tuple[str, ...]:
    return suffixes + tuple(suffix + packed for packed in PACKED_SUFFIXES for suffix in suffixes)


PARQUET_SUFFIXES = (".parquet",)
LIST_SUFFIXES = _packed(".json")  # may hold a list, or one object
JSON_SUFFIXES = LIST_SUFFIXES + _packed(".jsonl", ".ndjson", ".jsonlines")
TAB_SUFFIXES = _packed(".tsv")
CSV_SUFFIXES = _packed(".csv") + TAB_SUFFIXES
DATA_SUFFIXES = PARQUET_SUFFIXES + JSON_SUFFIXES + CSV_SUFFIXES
SHOWN_SUFFIXES = (
    ".parquet, .json, .jsonl, .ndjson, .jsonlines, .csv or .tsv; these but parquet may be compressed and end in "
    f"{', '.join(PACKED_SUFFIXES[:-1])} or {PACKED_SUFFIXES[-1]} after that"
)
# Other forms in which people keep data: they are not read, which is said.
OTHER_SUFFIXES = (
    ".txt", ".arrow", ".feather", ".xlsx", ".xls", ".ods", ".pkl", ".pickle", ".npy", ".npz", ".pt", ".h5", ".hdf5",
    ".avro", ".orc", ".tfrecord", ".msgpack", ".yaml", ".yml", ".toml", ".xml", ".db", ".sqlite", ".lmdb", ".mdb",
    ".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".lz4", ".br", ".zstd", *PACKED_SUFFIXES,
)  # fmt: skip
# What raises where a file is not what its ending says, or is cut off.
BAD_FILES = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)

_BEGINNINGS = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
_PROGRAMS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd", "": "data"}
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _open_zst(path: str) -> IO[bytes]:
    import pyarrow as pa  # not above: prompt_eval.py --help needs this module, and no library

    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(path), "zstd"))


_OPENERS: dict[str, Callable[[str], IO[bytes]]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst,
}  # fmt: skip


def open_bytes(path: str) -> IO[bytes]:
    """Open a file, unpacked as its name says."""
    return _OPENERS.get(_packing(path), lambda file: open(file, "rb"))(path)


def open_text(path: str, newline: str | None = None) -> TextIO:
    """Open a file of UTF-8 text, unpacked as its name says, without a byte order mark at its beginning."""
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline=newline)


@contextmanager
def read_text(path: str, newline: str | None = None) -> Iterator[TextIO]:
    """Open a file as `open_text` does, and close it at the end.

    Raises:
        UserError: what is read of it is not UTF-8, can't be unpacked, or the system can't read it.
    """
    try:
        with open_text(path, newline) as stream:
            yield stream
    except UnicodeDecodeError as err:
        raise not_utf8(path, err) from err
    except BAD_FILES as err:
        raise not_whole(path, err) from err
    except OSError as err:
        raise unreadable(path, err) from err


def _packing(path: str) -> str:
    return next((suffix for suffix in PACKED_SUFFIXES if path.lower().endswith(suffix)), "")


def not_utf8(path: str, err: UnicodeDecodeError) -> UserError:
    """Return the error for a file that is not UTF-8, with the first line that is not."""
    if (real := _packed_as(path)) and not _packing(path):
        return UserError(f"{path} is compressed: end its name in {real}.")
    place, encoding = "", "another encoding"
    with open_bytes(path) as stream:
        for number, line in enumerate(stream, 1):
            if line.startswith(_UTF16):
                encoding = "UTF-16"
            try:
                line.decode()
            except UnicodeDecodeError:
                place = f"line {number}: "
                break
    return UserError(f"{path} is not UTF-8 text, but {encoding} ({place}{err.reason}): save it as UTF-8.")


def not_whole(path: str, err: Exception) -> UserError:
    """Return the error for a compressed file that can't be unpacked."""
    named, real = _packing(path), _packed_as(path)
    if named and real != named:
        other = f"end its name in {real}" if real else f"take {named} off its name"
        return UserError(f"{path} is not compressed as its name says: {other}, or copy it again.")
    return UserError(f"{path} is no complete {_PROGRAMS[named]} file ({err}): copy it again.")


def unreadable(path: str, err: OSError) -> UserError:
    """Return the error for a file that the system can't read, or (without a number) that can't be unpacked."""
    if err.errno is None:
        return not_whole(path, err)
    return UserError(f"{path} cannot be read: {err.strerror or err}. Put the file there.")


def _packed_as(path: str) -> str:
    """Return the ending that tells how a file is compressed, by its first bytes; empty where it is not."""
    with open(path, "rb") as stream:
        start = stream.read(6)
    return next((suffix for mark, suffix in _BEGINNINGS.items() if start.startswith(mark)), "")
