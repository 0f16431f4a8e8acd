"""Reads the records of a CSV file one by one, strictly, and says in which record and line a fault is."""

import csv
from collections.abc import Iterator

from utils.errors import UserError

CSV_ADVICE = "write one record per line below a line of column names, texts with commas or line breaks in double quotes"
LONGEST_FIELD = 1 << 30  # the module's own limit, 128 KiB, is less than a long document


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
