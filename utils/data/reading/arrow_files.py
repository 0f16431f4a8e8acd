"""Loads the splits of a data set from disk, checked, as memory-mapped Arrow.

The source is a folder made by `save_to_disk`, or a folder (or one file) of parquet, JSON or CSV. The latter is
converted once to an Arrow file below the output folder. Its name is a hash of the content, so an edited file is
noticed, and processes that need the same data share one copy.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
from filelock import FileLock

from utils.data.reading.csv_records import csv_has_spaces
from utils.data.reading.data_files import column_names, is_csv, is_parquet, iter_records
from utils.data.reading.find_files import (
    find_data_files,
    name_parts,
    pick_split,
    unread_note,
)
from utils.data.reading.parquet_files import ROWS_PER_BATCH, check_rows, check_texts, parquet_batches, parquet_schema
from utils.data.reading.schema import Schema, TextOrValue, arrow_type, check_dataset, record_fault
from utils.data.reading.whole_values import encoded, marked
from utils.errors import UserError
from utils.files import checksum, write_aside
from utils.logging.console import say

ARROW_FOLDER = "arrow"
ARROW_FORM = 4  # of the columns in an Arrow file, and how files are read; another form has files of other names


class SplitData(NamedTuple):
    """One split of a data set."""

    dataset: datasets.Dataset
    fingerprint: str  # a hash of the content, the same in every process and run; empty for a stream
    files: tuple[str, ...] = ()  # that rows are read from later on; those of a converted data set are read at once
    root: str = ""  # folder of these files
    columns: tuple[str, ...] = ()  # all that the files have, also those that are not read


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
        loaded[split] = load_files(files_of[name], schema, output_path, path, unread_note(path, files_of))
    return loaded


def load_files(files: list[str], schema: Schema, output_path: str, root: str, note: str = "") -> SplitData:
    """Convert parquet, JSON or CSV files to one memory-mapped data set, or open the Arrow file of an earlier run.

    Args:
        note: added to the line that a conversion prints.

    Raises:
        UserError: a file, row or column does not fit the schema, there are no rows, or a file changes meanwhile.
    """
    content = hash_files(files, root)
    key = hashlib.sha256(f"{ARROW_FORM} {content} {schema}".encode()).hexdigest()[:32]
    target = os.path.join(output_path, ARROW_FOLDER, f"{key}.arrow")
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        # One process converts; the others wait and then open the same file.
        with FileLock(f"{target}.lock"):
            if not _is_whole(target):
                say(f"{root}: new or changed data, converted to {target}{_spaces_note(files)}{note}")
                columns = _write_arrow(target, files, schema)
                if hash_files(files, root) != content:
                    os.remove(target)
                    raise UserError(changed_message(root))
                with write_aside(f"{target}.crc") as file:
                    file.write(json.dumps([checksum(target), columns]).encode())
            columns = tuple(_about(target)[1])
    except OSError as err:
        raise UserError(
            f"{target} cannot be written: {err}. Make the folder writable or free some space, or choose "
            "another with --data_output_path."
        ) from err
    dataset = datasets.Dataset.from_file(target)
    check_dataset(dataset, schema, root)
    return SplitData(dataset, content, columns=columns)


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


def _spaces_note(files: list[str]) -> str:
    """Return the end of a line that says of which CSV files spaces are left out."""
    spaced = [os.path.basename(file) for file in files if is_csv(file) and csv_has_spaces(file)]
    return f"; spaces after the commas of {', '.join(spaced)} left out" if spaced else ""


def changed_message(root: str) -> str:
    """Return the message for data that were written to while they were read."""
    return f"{root} changed while it was read: wait until it is written, then start again."


def _is_whole(path: str) -> bool:
    """Whether the Arrow file exists and has the content that was written."""
    try:
        return _about(path)[0] == checksum(path)
    except (OSError, ValueError, TypeError):
        return False


def _about(path: str) -> tuple[int, list[str]]:
    """Return the checksum with which an Arrow file was written, and the columns of the files it was made from."""
    with open(f"{path}.crc", encoding="ascii") as file:
        sum_of_bytes, columns = json.load(file)
    return sum_of_bytes, columns


def read_batches(
    files: list[str], schema: Schema, names: dict[str, None] | None = None
) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Return schema and batches of parquet, JSON or CSV files; reading a bad record raises UserError.

    Args:
        names: while records of JSON or CSV are read, every column that they have is added.
    """
    if is_parquet(files[0]):
        return parquet_batches(files, schema)
    return _record_batches(files, schema, {} if names is None else names)


def _write_arrow(target: str, files: list[str], schema: Schema) -> list[str]:
    """Write the files' rows; return all columns that the files have."""
    names = dict.fromkeys(column_names(files))
    arrow_schema, batches = read_batches(files, schema, names)
    with write_aside(target) as sink, pa.ipc.new_stream(sink, arrow_schema) as writer:
        for batch in batches:
            writer.write(batch)
    return list(names)


def _record_batches(
    files: list[str], schema: Schema, names: dict[str, None]
) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    arrow_schema = pa.schema([(name, arrow_type(kind)) for name, kind in schema.columns.items()])
    forms = {object: encoded, TextOrValue: marked}
    whole = [(name, forms[kind]) for name, kind in schema.columns.items() if kind in (object, TextOrValue)]

    def batches() -> Iterator[pa.RecordBatch]:
        for file in files:
            records = _checked_records(file, schema, names)
            while rows := list(islice(records, ROWS_PER_BATCH)):
                rows = [row | {name: form(row.get(name)) for name, form in whole} for row in rows] if whole else rows
                yield pa.RecordBatch.from_pylist(rows, schema=arrow_schema)

    return arrow_schema, batches()


def _checked_records(file: str, schema: Schema, names: dict[str, None]) -> Iterator[dict[str, Any]]:
    """Yield the records of a file; every column that they have is added to `names`."""
    for number, line, record in iter_records(file):
        if not record.keys() <= names.keys():
            names.update(dict.fromkeys(record))
        fault = record_fault(record, schema)
        if fault:
            raise UserError(f"{file}, record {number} (line {line}): {fault}. Correct or remove the record.")
        yield record


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
        check_texts(dataset, schema, path)
        for start in range(0, len(dataset), ROWS_PER_BATCH) if schema.conversations else ():
            check_rows(dataset.with_format("arrow")[start : start + ROWS_PER_BATCH], schema, f"{path}, record", start)
        files = [entry["filename"] for entry in dataset.cache_files]
        # `save_to_disk` flattens rows selected by an index, so the bytes of the Arrow files are the content.
        found_columns = tuple(dataset.column_names)
        content = hash_files(files, path)
        loaded[split] = SplitData(only_columns(dataset, schema), content, tuple(files), path, found_columns)
    return loaded


def name_bad_text(path: str) -> None:
    """Raise UserError naming the first row of a `save_to_disk` folder or of parquet whose text is not UTF-8."""
    if is_saved(path):
        for dataset in open_saved(path).values():
            check_texts(dataset, Schema(dict.fromkeys(dataset.column_names, object)), path)
        return
    for files in ([path],) if os.path.isfile(path) else find_data_files(path).values():
        for file in filter(is_parquet, files):
            for _ in parquet_batches([file], Schema(dict.fromkeys(parquet_schema(file).names, object)))[1]:
                pass


def only_columns(dataset: datasets.Dataset, schema: Schema) -> datasets.Dataset:
    """Return the data set with the schema's columns alone, in the schema's order."""
    return dataset.select_columns([name for name in schema.columns if name in dataset.column_names])
