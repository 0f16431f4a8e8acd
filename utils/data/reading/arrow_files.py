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

from utils.data.reading.find_files import (
    CSV_SUFFIXES,
    PARQUET_SUFFIXES,
    find_data_files,
    name_parts,
    pick_split,
    unread_note,
)
from utils.data.reading.parquet_files import ROWS_PER_BATCH, check_rows, check_texts, parquet_batches, parquet_schema
from utils.data.reading.records import (
    CSV_ADVICE,
    SHAPE_ADVICE,
    csv_columns,
    csv_has_spaces,
    iter_csv_records,
    iter_json_records,
)
from utils.data.reading.schema import Schema, arrow_type, check_dataset, record_fault
from utils.data.reading.whole_values import encoded
from utils.errors import UserError
from utils.files import checksum, write_aside
from utils.logging.console import say

ARROW_FOLDER = "arrow"
ARROW_FORM = 2  # of the columns in an Arrow file; another form has files of other names
RECORDS_TRIED = 1000  # of each file, to learn which columns its records have


class SplitData(NamedTuple):
    """One split of a data set."""

    dataset: datasets.Dataset
    fingerprint: str  # a hash of the content, the same in every process and run; empty for a stream
    files: tuple[str, ...] = ()  # that rows are read from later on; those of a converted data set are read at once
    root: str = ""  # folder of these files


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
                _write_arrow(target, files, schema)
                if hash_files(files, root) != content:
                    os.remove(target)
                    raise UserError(changed_message(root))
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
        with open(f"{path}.crc", encoding="ascii") as file:
            return int(file.read()) == checksum(path)
    except (OSError, ValueError):
        return False


def read_batches(files: list[str], schema: Schema) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Return schema and batches of parquet, JSON or CSV files; reading a bad record raises UserError."""
    if is_parquet(files[0]):
        return parquet_batches(files, schema)
    return _record_batches(files, schema)


def is_parquet(file: str) -> bool:
    """Whether a data file's name says that it is parquet."""
    return file.lower().endswith(PARQUET_SUFFIXES)


def is_csv(file: str) -> bool:
    """Whether a data file's name says that it is CSV."""
    return file.lower().endswith(CSV_SUFFIXES)


def _write_arrow(target: str, files: list[str], schema: Schema) -> None:
    arrow_schema, batches = read_batches(files, schema)
    with write_aside(target) as sink, pa.ipc.new_stream(sink, arrow_schema) as writer:
        for batch in batches:
            writer.write(batch)


def _record_batches(files: list[str], schema: Schema) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    arrow_schema = pa.schema([(name, arrow_type(kind)) for name, kind in schema.columns.items()])
    whole = [name for name, kind in schema.columns.items() if kind is object]

    def batches() -> Iterator[pa.RecordBatch]:
        for file in files:
            records = _checked_records(file, schema)
            while rows := list(islice(records, ROWS_PER_BATCH)):
                rows = [row | {name: encoded(row.get(name)) for name in whole} for row in rows] if whole else rows
                yield pa.RecordBatch.from_pylist(rows, schema=arrow_schema)

    return arrow_schema, batches()


def _iter_records(file: str) -> Iterator[tuple[int, int, dict]]:
    return iter_csv_records(file) if is_csv(file) else iter_json_records(file)


def _checked_records(file: str, schema: Schema) -> Iterator[dict[str, Any]]:
    advice = CSV_ADVICE if is_csv(file) else SHAPE_ADVICE
    for number, line, record in _iter_records(file):
        fault = record_fault(record, schema)
        if fault:
            raise UserError(
                f"{file}, record {number} (line {line}): {fault}. Correct or remove the record; in all, {advice}."
            )
        yield record


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
        rows = pq.read_metadata(file).num_rows if is_parquet(file) else sum(1 for _ in _iter_records(file))
        if row < rows:
            return f"{file}, record {row + 1}"
        row -= rows
    raise IndexError(f"no such row in {', '.join(files)}")


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
        loaded[split] = SplitData(only_columns(dataset, schema), hash_files(files, path), tuple(files), path)
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
