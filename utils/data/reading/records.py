"""Reads the records of JSON files one by one, strictly; errors name the record and the line.

A JSON file is a list of objects, or one object per line (JSON Lines); either may be compressed. It is read in blocks,
so a large file takes little memory.
"""

import json
import os
import re
from collections.abc import Iterator
from typing import Any, TextIO

from utils.data.reading.text_files import BAD_FILES, LIST_SUFFIXES, open_text, read_text
from utils.data.reading.whole_values import RepeatedName, object_of
from utils.errors import UserError

BLOCK_CHARS = 1 << 20
_LARGEST_BLANK = 4096  # bytes
SHAPE_ADVICE = 'write a list of objects, [{"...": "..."}, ...], or one object per line (JSON Lines)'

# Files that were put together from several have a byte order mark at the beginning of each.
_SPACE = re.compile(r"[ \t\r\n\ufeff]*")
# A missing number, as Python and pandas write it, is a missing value.
_DECODER = json.JSONDecoder(
    object_pairs_hook=object_of, parse_constant=lambda name: None if name == "NaN" else float(name)
)
_JSON_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}


def json_kind(value: Any) -> str:
    """Name the kind of a JSON value for a message: "a list", "a number", ..."""
    return _JSON_NAMES.get(type(value), "a number")


def iter_json_records(path: str) -> Iterator[tuple[int, int, dict]]:
    """Yield `(record number from 1, line number from 1, record)` for every object in the file.

    Raises:
        UserError: the file is missing, empty, not UTF-8, not JSON, cut off, or holds something but objects.
    """
    with read_text(path) as stream:
        yield from _records(_Reader(stream), path)


def lone_object_names(path: str) -> set[str]:
    """Return the fields of the one object that is all a .json file holds; none of any other file."""
    if not path.lower().endswith(LIST_SUFFIXES):
        return set()
    try:
        with open_text(path) as stream:
            reader = _Reader(stream)
            value = reader.value() if reader.peek() == "{" else None
            return set(value) if isinstance(value, dict) and reader.peek() == "" else set()
    except (*BAD_FILES, OSError, ValueError, RecursionError):
        return set()


def is_blank(path: str) -> bool:
    """Whether a JSON or CSV file, compressed or not, holds no record, not even a header: a shard without rows."""
    try:
        if os.path.getsize(path) > _LARGEST_BLANK:
            return False
        with open_text(path) as stream:
            return stream.read().strip(" \t\r\n\ufeff") in ("", "[]")
    except (*BAD_FILES, OSError, ValueError):
        return not os.path.exists(path) or os.path.getsize(path) == 0


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
        if found == ",":
            raise UserError(
                f"{where}: remove the comma before it; only a list, in [ ], has commas between records."
            ) from err
        if err.msg.startswith("Invalid control character"):
            raise UserError(f"{where}: a line break or tab inside a text must be written as \\n or \\t.") from err
        if found == "\0":
            raise UserError(f"{where}: zero bytes. If it is UTF-16, save it as UTF-8; else copy it again.") from err
        raise UserError(
            f"{where}: {err.msg}. Correct that line; if it is the last one, the file was cut off and must be copied "
            "again."
        ) from err
    except RepeatedName as err:
        raise UserError(f"{path}, record {number} (line {reader.line}): {err}. Remove or rename one of them.") from err
    except RecursionError as err:
        raise UserError(f"{path}, record {number} (line {reader.line}) is nested too deeply: flatten it.") from err
