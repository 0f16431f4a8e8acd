"""Tells what single data files hold: their kind, their columns, their records."""

from collections.abc import Iterator
from itertools import islice

import pyarrow.parquet as pq

from utils.data.reading.csv_records import csv_columns, iter_csv_records
from utils.data.reading.parquet_files import parquet_schema
from utils.data.reading.records import iter_json_records
from utils.data.reading.text_files import CSV_SUFFIXES, PARQUET_SUFFIXES
from utils.errors import UserError

RECORDS_TRIED = 1000  # of each file, to learn which columns its records have


def is_parquet(file: str) -> bool:
    """Whether a data file's name says that it is parquet."""
    return file.lower().endswith(PARQUET_SUFFIXES)


def is_csv(file: str) -> bool:
    """Whether a data file's name says that it is CSV."""
    return file.lower().endswith(CSV_SUFFIXES)


def iter_records(file: str) -> Iterator[tuple[int, int, dict]]:
    """Yield (record number from 1, line number from 1, record) for every record of a JSON or CSV file."""
    return iter_csv_records(file) if is_csv(file) else iter_json_records(file)


def column_names(files: str | list[str]) -> list[str]:
    """Return the columns that any of the files has; of JSON, those of the first thousand records of each.

    Raises:
        UserError: a file can't be read, or none holds a record.
    """
    files = [files] if isinstance(files, str) else files
    names: dict[str, None] = {}
    for file in files:
        if is_parquet(file):
            names |= dict.fromkeys(parquet_schema(file).names)
        elif is_csv(file):
            names |= dict.fromkeys(csv_columns(file))
        else:
            for *_, record in islice(iter_json_records(file), RECORDS_TRIED):
                names |= dict.fromkeys(record)
    if not names:
        raise UserError(f"{', '.join(files)} holds no records: at least one is needed.")
    return list(names)


def place_of_row(files: list[str], row: int) -> str:
    """Name the file and record of row `row` (from 0) of a split made of `files`, for a message."""
    for file in files:
        rows = pq.read_metadata(file).num_rows if is_parquet(file) else sum(1 for _ in iter_records(file))
        if row < rows:
            return f"{file}, record {row + 1}"
        row -= rows
    raise IndexError(f"no such row in {', '.join(files)}")
