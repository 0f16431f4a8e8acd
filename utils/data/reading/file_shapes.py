"""Tells what a file is that holds no records: one object, as pandas and other programs write JSON, or other CSV."""

from typing import Any

from utils.data.reading.csv_records import CSV_ADVICE, csv_columns
from utils.data.reading.data_files import is_csv
from utils.data.reading.find_files import find_data_files
from utils.data.reading.records import iter_json_records
from utils.data.reading.text_files import DATA_SUFFIXES, JSON_SUFFIXES
from utils.errors import UserError

_LINES = 'df.to_json(path, orient="records", lines=True)'


def shape_advice(path: str, is_certain: bool = False) -> str:
    """Return what the first file at `path` is instead of records, and how to export it; empty where it holds some.

    Args:
        is_certain: leave out what might be a record of some format after all.
    """
    try:
        file = path if path.lower().endswith(DATA_SUFFIXES) else next(iter(find_data_files(path).values()))[0]
        if is_csv(file):
            return _separator_advice(file)
        if not file.lower().endswith(JSON_SUFFIXES):
            return ""
        records = iter_json_records(file)
        (*_, record), further = next(records), next(records, None)
    except (UserError, StopIteration, OSError):
        return ""
    shape = None if further else _pandas_shape(record) or (None if is_certain else _wrapped_shape(record))
    return f"{file} is one object, {shape}." if shape else ""


def _separator_advice(file: str) -> str:
    names = csv_columns(file)
    marks = [mark for mark in ";\t|" if len(names) == 1 and mark in names[0]]
    if not marks:
        return ""
    advice = f"end its name in .tsv, or {CSV_ADVICE}" if marks[0] == "\t" else CSV_ADVICE
    return f"{file}: the columns are separated by {marks[0]!r}, not by commas: {advice}."


def _pandas_shape(record: dict[str, Any]) -> str | None:
    values = list(record.values())
    if {"columns", "data"} <= set(record) and isinstance(record["data"], list):
        return f'as pandas writes it with orient="split": write it again with {_LINES}'
    if {"schema", "data"} == set(record) and isinstance(record["schema"], dict):
        return f'as pandas writes it with orient="table": write it again with {_LINES}'
    if values and all(isinstance(value, dict) for value in values):
        if all(name.isdigit() for name in record):
            return f'as pandas writes it with orient="index": write it again with {_LINES}'
        by_column = f"as pandas writes it by default, a column after the other: write it again with {_LINES}"
        if all(map(_is_column, values)):
            return by_column if all(name.isdigit() for value in values for name in value) else _named_shape(record)
        return None
    if len(values) > 1 and all(isinstance(value, list) and _is_texts(value) for value in values):
        return f"a list for each column: write it again with {_LINES}, or one object per line"
    return None


def _named_shape(record: dict[str, Any]) -> str:
    """Return what to do with an object of objects, which are records or columns."""
    return (
        f'which holds an object for each of {len(record)} names ("{next(iter(record))}", ...): if these are records, '
        f"write them alone, for example with `jq -c '.[]' in.json > out.jsonl`; if they are columns, with {_LINES}"
    )


def _wrapped_shape(record: dict[str, Any]) -> str | None:
    for name, value in record.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            return (
                f'and the records are in its field "{name}": write that list alone, for example with '
                f"`jq -c '.{name}[]' in.json > out.jsonl`"
            )
    return None


def _is_column(value: dict[str, Any]) -> bool:
    return bool(value) and not any(isinstance(item, (dict, list)) for item in value.values())


def _is_texts(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(item, str) for item in value)
