"""Streams the rows of a data set as they are needed: nothing is copied, downloaded whole or written.

The counterpart of `utils.data.reading.arrow_files` and `utils.data.reading.hub` for `--streaming`. Every stream is a
`datasets.IterableDataset`, whose `state_dict` holds its position, from which another one can read on.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import datasets

from utils.data.reading.arrow_files import SplitData, is_saved, only_columns, open_saved, read_batches
from utils.data.reading.data_files import column_names
from utils.data.reading.find_files import find_data_files, pick_split
from utils.data.reading.hub import open_on_hub
from utils.data.reading.schema import LATE, Schema, record_fault
from utils.errors import UserError


def stream_from_path(
    path: str, splits: Iterable[str], schema: Schema, config: str | None = None
) -> dict[str, SplitData]:
    """Stream the wanted splits of a `save_to_disk` folder, or of parquet, JSON or CSV files (found recursively).

    Raises:
        UserError: there is nothing to read, a split or column is missing, or the first rows do not fit the schema.
    """
    if is_saved(path):
        return stream_saved(path, splits, schema)
    files_of = find_data_files(path, config)
    return {split: stream_files(files_of[pick_split(files_of, split, path)], schema) for split in splits}


def stream_files(files: list[str], schema: Schema, names_late: bool = False) -> SplitData:
    """Stream the records of parquet, JSON or CSV files, one file after the other; each is checked as it is read.

    Args:
        names_late: add the column `LATE`.

    Raises:
        UserError: there is no record, or the first does not fit the schema.
    """
    arrow_schema, _ = read_batches(files, schema)
    columns = tuple(column_names(files))
    arguments = {
        "files": files, "schema": schema, "names": tuple(arrow_schema.names), "known": columns if names_late else None,
    }  # fmt: skip
    rows = datasets.IterableDataset.from_generator(_rows_of, gen_kwargs=arguments)
    name = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more files"
    return _checked_start(rows, name, files, columns)


def _rows_of(
    files: list[str], schema: Schema, names: tuple[str, ...], known: tuple[str, ...] | None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of some of the files with the columns that any of them all has, and with `LATE`.

    Args:
        files: a list, of which `datasets` gives a part.
        known: columns that need not be named in `LATE`; None: there is no such column.
    """
    found = dict.fromkeys(known or ())
    for file in files:
        _, batches = read_batches([file], schema, found)
        for batch in batches:
            rows = [{name: row.get(name) for name in names} for row in batch.to_pylist()]
            if known is not None:
                late = [name for name in found if name not in known and name not in names]
                rows = [row | {LATE: late if late and at == 0 else None} for at, row in enumerate(rows)]
            yield from rows


def stream_saved(path: str, splits: Iterable[str], schema: Schema) -> dict[str, SplitData]:
    """Stream the wanted splits of a folder made by `save_to_disk`; raises UserError."""
    found = open_saved(path)
    streams = {}
    for split in splits:
        dataset = found[pick_split(found, split, path)]
        rows = only_columns(dataset, schema).to_iterable_dataset()
        files = [entry["filename"] for entry in dataset.cache_files]
        rows = _checked(rows, schema, f'{path}, split "{split}"')
        streams[split] = _checked_start(rows, path, files, dataset.column_names)
    return streams


def stream_from_hub(
    name: str, splits: Iterable[str], schema: Schema, argument: str, config: str | None = None
) -> dict[str, SplitData]:
    """Stream the wanted splits of a data set on the hub; raises UserError."""
    found = open_on_hub(name, argument, config, streaming=True)
    streams = {}
    for split in splits:
        rows = found[pick_split(found, split, f"{name} on the Hugging Face hub")]
        streams[split] = _checked_start(_checked(rows, schema, f'{name}, split "{split}"'), name)
    return streams


def _checked(rows: datasets.IterableDataset, schema: Schema, origin: str) -> datasets.IterableDataset:
    """Return the rows with the schema's columns alone; each row is checked as it is read."""
    arguments = {"schema": schema, "origin": origin}
    found = rows.column_names or list(next(iter(rows), {}))  # JSON on the hub names its columns only in its rows
    return rows.map(_checked_row, with_indices=True, fn_kwargs=arguments, remove_columns=found)


def _checked_row(row: dict[str, Any], number: int, schema: Schema, origin: str) -> dict[str, Any]:
    fault = record_fault(row, schema)
    if fault:
        raise UserError(f"{origin}, record {number + 1}: {fault}. Correct or remove the record.")
    return {name: row.get(name) for name in schema.columns}


def _checked_start(
    rows: datasets.IterableDataset, origin: str, files: Iterable[str] = (), columns: Iterable[str] = ()
) -> SplitData:
    """Return the stream once its first row can be read, so that a bad source is found before the run starts."""
    if next(iter(rows), None) is None:
        raise UserError(f"{origin} holds no records: at least one is needed.")
    return SplitData(rows, "", tuple(files), columns=tuple(columns))
