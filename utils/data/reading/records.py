"""Reads the records of JSON and CSV files one by one, strictly; errors name the record and the line.

A JSON file is a list of objects, or one object per line (JSON Lines); either may be compressed with gzip. It is read
in blocks, so a large file takes little memory.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any, TextIO

from utils.errors import UserError

BLOCK_CHARS = 1 << 20
LONGEST_FIELD = 1 << 30  # of CSV; the csv module's default limit, 128 KiB, is less than a long document
CSV_ADVICE = "write one record per line below a line of column names, texts with commas or line breaks in double quotes"
SHAPE_ADVICE = 'write a list of objects, [{"...": "..."}, ...], or one object per line (JSON Lines)'

_SPACE = re.compile(r"[ \t\r\n]*")
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
        raise UserError(f"{path} is not UTF-8 text ({err}): save it as UTF-8.") from err
    except (EOFError, zlib.error, gzip.BadGzipFile) as err:
        raise UserError(f"{path} is no complete gzip file ({err}): copy it again.") from err
    except OSError as err:
        raise UserError(f"{path} cannot be read: {err.strerror or err}. Put the file there.") from err


def _open_text(path: str) -> TextIO:
    # utf-8-sig: files from Windows tools begin with a byte order mark.
    if path.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return open(path, encoding="utf-8-sig")


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
        return self.line + self.text.count("\n", self.place, err.pos)


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
        raise UserError(
            f"{path}, record {number} (line {reader.line_of(err)}) is not valid JSON: {err.msg}. Correct "
            "that line; if it is the last one, the file was cut off and must be copied again."
        ) from err
    except RecursionError as err:
        raise UserError(f"{path}, record {number} (line {reader.line}) is nested too deeply: flatten it.") from err


def iter_csv_records(path: str) -> Iterator[tuple[int, int, dict[str, str]]]:
    """Yield `(record number from 1, line number from 1, record)` for every row below the header.

    Raises:
        UserError: the file is missing, empty, not UTF-8, or a row has more or fewer fields than the header.
    """
    csv.field_size_limit(LONGEST_FIELD)
    try:
        # utf-8-sig: files from spreadsheets begin with a byte order mark.
        with open(path, encoding="utf-8-sig", newline="") as stream:
            rows = csv.reader(stream, strict=True)
            header = next(rows, None)
            if header is None:
                raise UserError(f"{path} is empty: {CSV_ADVICE}.")
            if len(set(header)) < len(header):
                raise UserError(f"{path} has two columns of the same name ({', '.join(header)}): rename one.")
            number, line = 0, rows.line_num + 1
            for fields in rows:
                if fields:  # an empty line is no record
                    number += 1
                    if len(fields) != len(header):
                        raise UserError(
                            f"{path}, record {number} (line {line}) has {len(fields)} fields where the header has "
                            f"{len(header)}: {CSV_ADVICE}."
                        )
                    yield number, line, dict(zip(header, fields, strict=True))
                line = rows.line_num + 1
    except UnicodeDecodeError as err:
        raise UserError(f"{path} is not UTF-8 text ({err}): save it as UTF-8.") from err
    except csv.Error as err:
        raise UserError(f"{path}, line {rows.line_num} is not valid CSV ({err}): {CSV_ADVICE}.") from err
    except OSError as err:
        raise UserError(f"{path} cannot be read: {err.strerror or err}. Put the file there.") from err
