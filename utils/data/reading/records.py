"""Reads the records of JSON and CSV files one by one, strictly; errors name the record and the line.

A JSON file is a list of objects, or one object per line (JSON Lines); either may be compressed with gzip. It is read
in blocks, so a large file takes little memory.
"""

import codecs
import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any, TextIO

from utils.errors import UserError

BLOCK_CHARS = 1 << 20
LONGEST_FIELD = 1 << 30  # of CSV; the csv module's default limit, 128 KiB, is less than a long document
_GZIP = b"\x1f\x8b"
_LARGEST_BLANK = 4096  # bytes
CSV_ADVICE = "write one record per line below a line of column names, texts with commas or line breaks in double quotes"
SHAPE_ADVICE = 'write a list of objects, [{"...": "..."}, ...], or one object per line (JSON Lines)'

# Files that were put together from several have a byte order mark at the beginning of each.
_SPACE = re.compile(r"[ \t\r\n\ufeff]*")
_DECODER = json.JSONDecoder()
_JSON_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}


def json_kind(value: Any) -> str:
    """Name the kind of a JSON value for a message: "a list", "a number", ..."""
    return _JSON_NAMES.get(type(value), "a number")


def iter_json_records(path: str) -> Iterator[tuple[int, int, dict]]:
    """Yield `(record number from 1, line number from 1, record)` for every object in the file.

    Raises:
        UserError: the file is missing, empty, not UTF-8, not JSON, cut off, or holds something but objects.
    """
    try:
        with _open_text(path) as stream:
            yield from _records(_Reader(stream), path)
    except UnicodeDecodeError as err:
        raise UserError(_not_utf8(path, err)) from err
    except (EOFError, zlib.error, gzip.BadGzipFile) as err:
        raise UserError(f"{path} is no complete gzip file ({err}): copy it again.") from err
    except OSError as err:
        raise UserError(f"{path} cannot be read: {err.strerror or err}. Put the file there.") from err


def _open_text(path: str) -> TextIO:
    # utf-8-sig: files from Windows tools begin with a byte order mark.
    if path.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return open(path, encoding="utf-8-sig")


def lone_object_names(path: str) -> set[str]:
    """Return the fields of the one object that is all a .json file holds; none of any other file."""
    if not path.lower().endswith((".json", ".json.gz")):
        return set()
    try:
        with _open_text(path) as stream:
            reader = _Reader(stream)
            value = reader.value() if reader.peek() == "{" else None
            return set(value) if isinstance(value, dict) and reader.peek() == "" else set()
    except (OSError, EOFError, ValueError, zlib.error, RecursionError):
        return set()


def first_names(path: str, is_csv: bool) -> set[str]:
    """Return the fields of a file's first record; none where it can't be read."""
    try:
        return set(next(iter_csv_records(path) if is_csv else iter_json_records(path), (0, 0, {}))[2])
    except UserError:
        return set()


def is_blank(path: str) -> bool:
    """Whether a JSON or CSV file, compressed or not, holds no record, not even a header: a shard without rows."""
    try:
        if os.path.getsize(path) > _LARGEST_BLANK:
            return False
        with _open_text(path) as stream:
            return stream.read().strip(" \t\r\n\ufeff") in ("", "[]")
    except (OSError, EOFError, ValueError, zlib.error):
        return not os.path.exists(path) or os.path.getsize(path) == 0


def _not_utf8(path: str, err: UnicodeDecodeError) -> str:
    """Return the message for a file that is not UTF-8, with the first line that is not."""
    place, encoding = "", "another encoding"
    with open(path, "rb") as stream:
        if stream.read(2) == _GZIP and not path.lower().endswith(".gz"):
            return f"{path} is compressed by gzip: end its name in .gz."
    with (gzip.open if path.lower().endswith(".gz") else open)(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                encoding = "UTF-16"
            try:
                line.decode()
            except UnicodeDecodeError:
                place = f"line {number}: "
                break
    return f"{path} is not UTF-8 text, but {encoding} ({place}{err.reason}): save it as UTF-8."


class _Reader:
    """A text stream read value by value, with its position and line."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.text = ""
        self.place = 0
        self.line = 1

    def _more(self) -> bool:
        # Read twice as much each time, so that a value larger than a block is not parsed over and over.
        block = self.stream.read(max(BLOCK_CHARS, len(self.text) - self.place))
        self.text = self.text[self.place :] + block
        self.place = 0
        return bool(block)

    def _advance(self, place: int) -> None:
        self.line += self.text.count("\n", self.place, place)
        self.place = place

    def peek(self) -> str:
        """Return the next character that is not white space, "" at the end; it stays unread."""
        while True:
            self._advance(_SPACE.match(self.text, self.place).end())
            if self.place < len(self.text):
                return self.text[self.place]
            if not self._more():
                return ""

    def skip(self) -> None:
        """Skip the character that `peek` returned."""
        self.place += 1

    def value(self) -> Any:
        """Read the JSON value that begins here; raises json.JSONDecodeError."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.place)
            except json.JSONDecodeError as err:
                if not self._may_be_incomplete(err) or not self._more():
                    raise
                continue
            self._advance(end)
            return value

    def _may_be_incomplete(self, err: json.JSONDecodeError) -> bool:
        """Whether the error may be due to the end of the block rather than to the file."""
        return err.msg.startswith("Unterminated string") or err.pos > len(self.text) - 16

    def line_of(self, err: json.JSONDecodeError) -> int:
        """Return the line of the file at which `value` failed."""
        begin = len(err.doc) - (len(self.text) - self.place)  # what was read before may be forgotten since
        return self.line + err.doc.count("\n", begin, err.pos)


def _records(reader: _Reader, path: str) -> Iterator[tuple[int, int, dict]]:
    first = reader.peek()
    if first == "":
        raise UserError(f"{path} is empty: {SHAPE_ADVICE}.")
    if first not in "[{":
        raise UserError(f"{path} does not begin with a list or an object: {SHAPE_ADVICE}.")
    is_list = first == "["
    if is_list:
        reader.skip()
    number = 0
    while not _at_end(reader, path, is_list, number):
        number += 1
        line, record = reader.line, _value(reader, path, number)
        if not isinstance(record, dict):
            raise UserError(f"{path}, record {number} (line {line}) is {json_kind(record)}: {SHAPE_ADVICE}.")
        yield number, line, record


def _at_end(reader: _Reader, path: str, is_list: bool, number: int) -> bool:
    """Skip what separates two records; return True when no further record follows."""
    following = reader.peek()
    if not is_list:
        return following == ""
    if following == "":
        raise UserError(
            f"{path} ends after record {number} (line {reader.line}) without the closing ]: it was cut off. "
            "Copy or write it again."
        )
    if following == "]":
        reader.skip()
        if reader.peek():
            raise UserError(f"{path} goes on after the closing ] (line {reader.line}): remove that, or {SHAPE_ADVICE}.")
        return True
    if number > 0:
        if following != ",":
            raise UserError(f'{path}, line {reader.line}: a "," is missing after record {number}: put it there.')
        reader.skip()
        reader.peek()
    return False


def _value(reader: _Reader, path: str, number: int) -> Any:
    try:
        return reader.value()
    except json.JSONDecodeError as err:
        where = f"{path}, record {number} (line {reader.line_of(err)}) is not valid JSON"
        found = err.doc[err.pos : err.pos + 1]
        if found == "'":
            raise UserError(f"{where}: texts stand in double quotes there, not in single ones as in Python.") from err
        if found == "]":
            raise UserError(f"{where}: remove the comma before it, which follows the last record.") from err
        raise UserError(
            f"{where}: {err.msg}. Correct that line; if it is the last one, the file was cut off and must be copied "
            "again."
        ) from err
    except RecursionError as err:
        raise UserError(f"{path}, record {number} (line {reader.line}) is nested too deeply: flatten it.") from err


def iter_csv_records(path: str) -> Iterator[tuple[int, int, dict[str, str]]]:
    """Yield `(record number from 1, line number from 1, record)` for every row below the header.

    White space around the names of columns is no part of them. Where the header has spaces after its commas, those
    after the commas of the rows are no part of the texts either.

    Raises:
        UserError: the file is missing, empty, not UTF-8, or a row has more or fewer fields than the header.
    """
    csv.field_size_limit(LONGEST_FIELD)
    before = 0
    try:
        # utf-8-sig: files from spreadsheets begin with a byte order mark.
        with open(path, encoding="utf-8-sig", newline="") as stream:
            # Files that were put together from several have a byte order mark at the beginning of each.
            lines = (line.removeprefix("\ufeff") for line in stream)
            rows = csv.reader(lines, strict=True)
            names = next(rows, None)
            if names is None:
                raise UserError(f"{path} is empty: {CSV_ADVICE}.")
            before = rows.line_num
            is_spaced, header = _header(names, path)
            rows = csv.reader(lines, strict=True, skipinitialspace=is_spaced)
            number, line = 0, before + 1
            for fields in rows:
                if fields:  # an empty line is no record
                    number += 1
                    if len(fields) != len(header):
                        raise UserError(
                            f"{path}, record {number} (line {line}) has {len(fields)} fields where the header has "
                            f"{len(header)}: {CSV_ADVICE}."
                        )
                    yield number, line, dict(zip(header, fields, strict=True))
                line = before + rows.line_num + 1
    except UnicodeDecodeError as err:
        raise UserError(_not_utf8(path, err)) from err
    except csv.Error as err:
        raise UserError(f"{path}, line {before + rows.line_num} is not valid CSV ({err}): {CSV_ADVICE}.") from err
    except OSError as err:
        raise UserError(f"{path} cannot be read: {err.strerror or err}. Put the file there.") from err


def csv_columns(path: str) -> list[str]:
    """Return the columns of a CSV file, also where no row follows; raises UserError."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as stream:
        return _header(next(csv.reader(stream), []), path)[1]


def csv_has_spaces(path: str) -> bool:
    """Whether spaces follow the commas of a CSV file's header, so that they are left out everywhere."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as stream:
        return _header(next(csv.reader(stream), []), path)[0]


def _header(names: list[str], path: str) -> tuple[bool, list[str]]:
    """Return whether spaces follow the commas, and the names of the columns."""
    is_spaced = any(name != name.lstrip() for name in names[1:])
    if is_spaced:  # quotes after a space were read as letters
        names = next(csv.reader([",".join(names)], skipinitialspace=True))
    header = [name.strip() for name in names]
    if len(set(header)) < len(header):
        raise UserError(f"{path} has two columns of the same name ({', '.join(header)}): rename one.")
    return is_spaced, header
