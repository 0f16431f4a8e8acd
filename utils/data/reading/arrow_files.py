"""Loads the splits of a data set from disk, checked, as memory-mapped Arrow.

The source is a folder made by `save_to_disk`, or a folder (or one file) of parquet, JSON or CSV. The latter is
converted once to an Arrow file below the output folder. Its name is a hash of the content, so an edited file is
noticed, and processes that need the same data share one copy.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from utils.data.reading.find_files import CSV_SUFFIXES, PARQUET_SUFFIXES, find_data_files, name_parts, pick_split
from utils.data.reading.records import CSV_ADVICE, SHAPE_ADVICE, iter_csv_records, iter_json_records
from utils.data.reading.schema import Schema, arrow_type, check_columns, check_dataset, conversation_fault, record_fault
from utils.errors import UserError
from utils.files import checksum, write_aside
from utils.logging.console import say

ROWS_PER_BATCH = 1000
ARROW_FOLDER = "arrow"


class SplitData(NamedTuple):
    """One split of a data set."""

    dataset: datasets.Dataset
    fingerprint: str  # a hash of the content, the same in every process and run; empty for a stream


def load_from_path(
    path: str, splits: Iterable[str], schema: Schema, output_path: str, config: str | None = None
) -> dict[str, SplitData]:
    """Load the wanted splits of a `save_to_disk` folder, or of parquet, JSON or CSV files (found recursively).

    Args:
        path: the folder, or one data file.
        splits: the names of the wanted splits.
        schema: the columns that are read and checked.
        output_path: Arrow files are kept in a folder below it.
        config: the configuration to read, where the data set has several.

    Raises:
        UserError: there is nothing to read, a split or column is missing, or the content does not fit the schema.
    """
    if is_saved(path):
        return load_saved(path, splits, schema)
    files_of = find_data_files(path, config)
    loaded = {}
    for split in splits:
        name = pick_split(files_of, split, path)
        loaded[split] = load_files(files_of[name], schema, output_path, root=path)
    return loaded


def load_files(files: list[str], schema: Schema, output_path: str, root: str) -> SplitData:
    """Convert parquet, JSON or CSV files to one memory-mapped data set, or open the Arrow file of an earlier run.

    Raises:
        UserError: a file, row or column does not fit the schema, or there are no rows.
    """
    content = hash_files(files, root)
    key = hashlib.sha256(f"{content} {schema}".encode()).hexdigest()[:32]
    target = os.path.join(output_path, ARROW_FOLDER, f"{key}.arrow")
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        # One process converts; the others wait and then open the same file.
        with FileLock(f"{target}.lock"):
            if not _is_whole(target):
                say(f"{root}: new or changed data, converted to {target}")
                _write_arrow(target, files, schema)
                with write_aside(f"{target}.crc") as file:
                    file.write(str(checksum(target)).encode())
    except OSError as err:
        raise UserError(
            f"{target} cannot be written: {err}. Make the folder writable or free some space, or choose "
            "another with --data_output_path."
        ) from err
    dataset = datasets.Dataset.from_file(target)
    check_dataset(dataset, schema, root)
    return SplitData(dataset, content)


def hash_files(files: list[str], root: str) -> str:
    """Return a hash of the bytes of these files and of their names below `root`."""
    digest = hashlib.sha256()
    for file in sorted(files):
        try:
            digest.update(f"{name_parts(file, root)} {os.path.getsize(file)}".encode())
            with open(file, "rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        except OSError as err:
            raise UserError(f"{file} cannot be read: {err.strerror or err}.") from err
    return digest.hexdigest()


def _is_whole(path: str) -> bool:
    """Whether the Arrow file exists and has the content that was written."""
    try:
        with open(f"{path}.crc", encoding="ascii") as file:
            return int(file.read()) == checksum(path)
    except (OSError, ValueError):
        return False


def read_batches(files: list[str], schema: Schema) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Return schema and batches of parquet, JSON or CSV files; reading a bad record raises UserError."""
    is_parquet = files[0].lower().endswith(PARQUET_SUFFIXES)
    return _parquet_batches(files, schema) if is_parquet else _record_batches(files, schema)


def _write_arrow(target: str, files: list[str], schema: Schema) -> None:
    arrow_schema, batches = read_batches(files, schema)
    with write_aside(target) as sink, pa.ipc.new_stream(sink, arrow_schema) as writer:
        for batch in batches:
            writer.write(batch)


def _record_batches(files: list[str], schema: Schema) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    arrow_schema = pa.schema([(name, arrow_type(kind)) for name, kind in schema.columns.items()])

    def batches() -> Iterator[pa.RecordBatch]:
        for file in files:
            records = _checked_records(file, schema)
            while rows := list(islice(records, ROWS_PER_BATCH)):
                yield pa.RecordBatch.from_pylist(rows, schema=arrow_schema)

    return arrow_schema, batches()


def _iter_records(file: str) -> Iterator[tuple[int, int, dict]]:
    return iter_csv_records(file) if file.lower().endswith(CSV_SUFFIXES) else iter_json_records(file)


def _checked_records(file: str, schema: Schema) -> Iterator[dict[str, Any]]:
    advice = CSV_ADVICE if file.lower().endswith(CSV_SUFFIXES) else SHAPE_ADVICE
    for number, line, record in _iter_records(file):
        fault = record_fault(record, schema)
        if fault:
            raise UserError(
                f"{file}, record {number} (line {line}): {fault}. Correct or remove the record; in all, {advice}."
            )
        yield record


def _parquet_batches(files: list[str], schema: Schema) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    found = {file: _parquet_schema(file) for file in files}
    for file, file_schema in found.items():
        check_columns(file_schema, schema, file)
    first = found[files[0]]
    names = [name for name in schema.columns if name in first.names]
    # The type of a text may differ between shards (large strings, all null), so plain columns are cast to one type.
    target = pa.schema(
        [
            (name, first.field(name).type if isinstance(kind, (list, dict)) else arrow_type(kind))
            for name, kind in schema.columns.items()
            if name in names
        ]
    )

    def batches() -> Iterator[pa.RecordBatch]:
        for file in files:
            rows = 0
            try:
                with pq.ParquetFile(file) as parquet:
                    for batch in parquet.iter_batches(batch_size=ROWS_PER_BATCH, columns=names):
                        _check_rows(batch, schema, f"{file}, record", rows)
                        rows += len(batch)
                        yield batch.select(names).cast(target)
            except (pa.ArrowException, OSError) as err:
                raise UserError(f"{file} cannot be read: {err}. Copy it again, or write it anew.") from err

    return target, batches()


def _check_rows(batch: pa.RecordBatch | pa.Table, schema: Schema, where: str, before: int = 0) -> None:
    """Raise UserError naming the first row with a forbidden null or a malformed conversation."""
    for name in schema.not_null:
        if batch.column(name).null_count:
            row = before + batch.column(name).is_null().index(True).as_py() + 1
            raise UserError(f'{where} {row}: "{name}" is null. Correct or remove it and others like it.')
    for name in schema.conversations:
        for row, value in enumerate(batch.column(name).to_pylist(), before + 1):
            if fault := conversation_fault(value, name):
                raise UserError(f"{where} {row}: {fault}. Correct or remove it and others like it.")


def column_names(file: str) -> list[str]:
    """Return the columns of a data file; of JSON and CSV, those of the first record.

    Raises:
        UserError: the file can't be read, or holds no record.
    """
    if file.lower().endswith(PARQUET_SUFFIXES):
        return _parquet_schema(file).names
    first = next(_iter_records(file), None)
    if first is None:
        raise UserError(f"{file} holds no records: at least one is needed.")
    return list(first[2])


def place_of_row(files: list[str], row: int) -> str:
    """Name the file and record of row `row` (from 0) of a split made of `files`, for a message."""
    for file in files:
        is_parquet = file.lower().endswith(PARQUET_SUFFIXES)
        rows = pq.read_metadata(file).num_rows if is_parquet else sum(1 for _ in _iter_records(file))
        if row < rows:
            return f"{file}, record {row + 1}"
        row -= rows
    raise IndexError(f"no such row in {', '.join(files)}")


def _parquet_schema(file: str) -> pa.Schema:
    try:
        return pq.read_schema(file)
    except (pa.ArrowException, OSError) as err:
        raise UserError(f"{file} is no complete parquet file: {err}. Copy it again.") from err


def is_saved(path: str) -> bool:
    """Whether `path` is a folder made by `save_to_disk`."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))


def open_saved(path: str) -> dict[str, datasets.Dataset]:
    """Return the splits of a folder made by `save_to_disk`; a data set without splits is the train split.

    Raises:
        UserError: the folder is not complete.
    """
    try:
        found = datasets.load_from_disk(path)
    except (OSError, ValueError, KeyError) as err:
        raise UserError(f"{path} is no complete save_to_disk folder: {err}. Save or copy it again.") from err
    return {str(found.split or "train"): found} if isinstance(found, datasets.Dataset) else dict(found)


def load_saved(path: str, splits: Iterable[str], schema: Schema) -> dict[str, SplitData]:
    """Load and check the wanted splits of a folder made by `save_to_disk`; raises UserError."""
    found = open_saved(path)
    loaded = {}
    for split in splits:
        dataset = found[pick_split(found, split, path)]
        check_dataset(dataset, schema, path)
        for start in range(0, len(dataset), ROWS_PER_BATCH) if schema.conversations else ():
            _check_rows(dataset.with_format("arrow")[start : start + ROWS_PER_BATCH], schema, f"{path}, record", start)
        files = [entry["filename"] for entry in dataset.cache_files]
        # `save_to_disk` flattens rows selected by an index, so the bytes of the Arrow files are the content.
        loaded[split] = SplitData(only_columns(dataset, schema), hash_files(files, path))
    return loaded


def only_columns(dataset: datasets.Dataset, schema: Schema) -> datasets.Dataset:
    """Return the data set with the schema's columns alone, in the schema's order."""
    return dataset.select_columns([name for name in schema.columns if name in dataset.column_names])
