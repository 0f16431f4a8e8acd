"""Reads the records of CSV and TSV files one by one, strictly; errors name the record and the line."""

import csv
from collections.abc import Iterator

from utils.data.reading.text_files import TAB_SUFFIXES, read_text
from utils.errors import UserError

LONGEST_FIELD = 1 << 30  # the csv module's default limit, 128 KiB, is less than a long document
CSV_ADVICE = "write one record per line below a line of column names, texts with commas or line breaks in double quotes"


def iter_csv_records(path: str) -> Iterator[tuple[int, int, dict[str, str]]]:
    """Yield `(record number from 1, line number from 1, record)` for every row below the header.

    White space around the names of columns is no part of them. Where the header has spaces after its commas, those
    after the commas of the rows are no part of the texts either.

    Raises:
        UserError: the file is missing, empty, not UTF-8, or a row has more or fewer fields than the header.
    """
    csv.field_size_limit(LONGEST_FIELD)
    before, mark = 0, _separator(path)
    try:
        with read_text(path, newline="") as stream:
            # Files that were put together from several have a byte order mark at the beginning of each.
            lines = (line.removeprefix("\ufeff") for line in stream)
            rows = csv.reader(lines, strict=True, delimiter=mark)
            names = next(rows, None)
            if names is None:
                raise UserError(f"{path} is empty: {CSV_ADVICE}.")
            before = rows.line_num
            is_spaced, header = _header(names, path)
            rows = csv.reader(lines, strict=True, delimiter=mark, skipinitialspace=is_spaced)
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
    except csv.Error as err:
        raise UserError(f"{path}, line {before + rows.line_num} is not valid CSV ({err}): {CSV_ADVICE}.") from err


def csv_columns(path: str) -> list[str]:
    """Return the columns of a CSV file, also where no row follows; raises UserError."""
    return _read_header(path)[1]


def csv_has_spaces(path: str) -> bool:
    """Whether spaces follow the commas of a CSV file's header, so that they are left out everywhere."""
    return _read_header(path)[0]


def _read_header(path: str) -> tuple[bool, list[str]]:
    try:
        with read_text(path, newline="") as stream:
            return _header(next(csv.reader(stream, delimiter=_separator(path)), []), path)
    except csv.Error as err:
        raise UserError(f"{path}, line 1 is not valid CSV ({err}): {CSV_ADVICE}.") from err


def _separator(path: str) -> str:
    return "\t" if path.lower().endswith(TAB_SUFFIXES) else ","


def _header(names: list[str], path: str) -> tuple[bool, list[str]]:
    """Return whether spaces follow the commas, and the names of the columns."""
    is_spaced = any(name != name.lstrip() for name in names[1:])
    if is_spaced:  # quotes after a space were read as letters
        mark = _separator(path)
        names = next(csv.reader([mark.join(names)], delimiter=mark, skipinitialspace=True))
    header = [name.strip() for name in names]
    if names[:1] and names[0].lower().startswith("sep="):
        raise UserError(f"{path}: the first line, {names[0]}..., is for spreadsheets alone: remove it.")
    named = [name for name in header if name]  # spreadsheets leave columns without a name at the end
    if len(set(named)) < len(named):
        raise UserError(f"{path} has two columns of the same name ({', '.join(header)}): rename one.")
    return is_spaced, header
