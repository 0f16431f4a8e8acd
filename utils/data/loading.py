"""Brings the splits of a data set from disk, checked, as memory-mapped Arrow.

Two sources: a folder made by `save_to_disk`, and a folder (or one file) of parquet or JSON. The second is
turned once into an Arrow file below the output folder, whose name is a hash of the content: an edited file is
noticed, and processes that need the same data share it.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from utils.data.cache import checksum
from utils.data.columns import Schema, arrow_type, check_columns, check_dataset, value_fault
from utils.data.json_records import SHAPE_ADVICE, iter_json_records
from utils.data.splits import write_aside
from utils.errors import UserError

PARQUET_SUFFIXES = (".parquet",)
JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
ROWS_PER_BATCH = 1000
ARROW_FOLDER = "arrow"

# Written beside the data by `datasets` itself: they hold no records.
_METADATA_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_VALIDATION_NAMES = ("validation", "valid", "val", "dev")
_SPLIT_WORDS = {"train", "training", "test", "testing", "eval", "evaluation", *_VALIDATION_NAMES}
_SHARD_NAME = re.compile(r"(.+?)-\d{5}-of-\d{5}")


class SplitData(NamedTuple):
    """One split: its rows, and a hash of its content that is the same in every process and run."""

    dataset: datasets.Dataset
    fingerprint: str


def load_from_path(
    path: str, splits: Iterable[str], schema: Schema, output_path: str, config: str | None = None
) -> dict[str, SplitData]:
    """Read the wanted splits from a `save_to_disk` folder, or from parquet or JSON files (found recursively).

    Args:
        path: the folder, or one data file.
        splits: the names of the wanted splits.
        schema: which columns are read and checked.
        output_path: Arrow files are kept in a folder below.
        config: where the data set has several configurations, the name of the one to read.

    Raises:
        UserError: nothing to read, a split or column is missing, or the content is not what the schema says.
    """
    if any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json")):
        return _load_saved(path, splits, schema)
    files_of = find_data_files(path, config)
    loaded = {}
    for split in splits:
        name = pick_split(files_of, split, path)
        loaded[split] = load_files(files_of[name], schema, output_path, root=path)
    return loaded


def pick_split(found: Iterable[str], wanted: str, origin: str) -> str:
    """The name under which the wanted split is there: the validation split goes by several names.

    Raises:
        UserError: it is not there.
    """
    found = list(found)
    names = (wanted, *_VALIDATION_NAMES) if wanted in _VALIDATION_NAMES else (wanted,)
    for name in names:
        if name in found:
            return name
    raise UserError(
        f'{origin} has no split "{wanted}"; found: {", ".join(sorted(found)) or "none"}. Add its files, '
        f"named for example {wanted}.jsonl or {wanted}-00000-of-00001.parquet."
    )


def find_data_files(path: str, config: str | None = None) -> dict[str, list[str]]:
    """The data files below `path` by split name; parquet if there is any, else JSON.

    The split is read off the file name (train-00000-of-00001.parquet, dev.jsonl), else off the folders in
    between (train/0000.parquet). Where no name says anything, all files are the train split.

    Raises:
        UserError: there are no data files.
    """
    files = sorted(_walk(path))
    for suffixes in (PARQUET_SUFFIXES, JSON_SUFFIXES):
        chosen = [file for file in files if file.lower().endswith(suffixes)]
        if chosen:
            break
    else:
        raise UserError(
            f"{path} holds no data: a folder made by save_to_disk is needed, or files ending in "
            f"{', '.join(PARQUET_SUFFIXES + JSON_SUFFIXES)}."
        )
    if config is not None:
        # The configurations of a data set may overlap: all of them together would repeat rows.
        chosen = [file for file in chosen if config in _name_parts(file, path)] or chosen
    by_split: dict[str, list[str]] = {}
    for file in chosen:
        by_split.setdefault(_split_of(_name_parts(file, path)), []).append(file)
    if list(by_split) == [""]:
        return {"train": by_split[""]}
    by_split.pop("", None)
    return by_split


def _walk(path: str) -> Iterator[str]:
    if os.path.isfile(path):
        yield path
    for folder, subfolders, names in os.walk(path, followlinks=True):
        # Hidden folders hold download bookkeeping and notebook copies.
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (
            os.path.join(folder, name) for name in names if not name.startswith(".") and name not in _METADATA_FILES
        )


def _name_parts(file: str, root: str) -> list[str]:
    """The names from the file's own (without suffixes) up to the folder below `root`."""
    relative = os.path.basename(file) if file == root else os.path.relpath(file, root)
    *folders, name = relative.split(os.sep)
    return [name.split(".")[0], *reversed(folders)]


def _split_of(name_parts: list[str]) -> str:
    shard = _SHARD_NAME.match(name_parts[0])
    if shard:
        return shard[1]
    for part in name_parts:
        for word in re.findall("[a-z]+", part.lower()):
            if word in _SPLIT_WORDS:
                return word
    return ""


def load_files(files: list[str], schema: Schema, output_path: str, root: str) -> SplitData:
    """Turn parquet or JSON files into one memory-mapped data set, or open the Arrow file made of them before.

    Raises:
        UserError: a file, row or column is not what the schema says, or there are no rows.
    """
    content = hash_files(files, root)
    key = hashlib.sha256(f"{content} {schema}".encode()).hexdigest()[:32]
    target = os.path.join(output_path, ARROW_FOLDER, f"{key}.arrow")
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        # One process converts, the others wait and then open the same file.
        with FileLock(f"{target}.lock"):
            if not _is_whole(target):
                print(f"{root}: new or changed data, turned into {target}", flush=True)
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
    """A hash of the names below `root` and the bytes of these files."""
    digest = hashlib.sha256()
    for file in sorted(files):
        try:
            digest.update(f"{_name_parts(file, root)} {os.path.getsize(file)}".encode())
            with open(file, "rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        except OSError as err:
            raise UserError(f"{file} cannot be read: {err.strerror or err}.") from err
    return digest.hexdigest()


def _is_whole(path: str) -> bool:
    """The Arrow file is there, and as it was written."""
    try:
        with open(f"{path}.crc", encoding="ascii") as file:
            return int(file.read()) == checksum(path)
    except (OSError, ValueError):
        return False


def _write_arrow(target: str, files: list[str], schema: Schema) -> None:
    if files[0].lower().endswith(PARQUET_SUFFIXES):
        arrow_schema, batches = _parquet_batches(files, schema)
    else:
        arrow_schema, batches = _json_batches(files, schema)
    with write_aside(target) as sink, pa.ipc.new_stream(sink, arrow_schema) as writer:
        for batch in batches:
            writer.write(batch)


def _json_batches(files: list[str], schema: Schema) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    arrow_schema = pa.schema([(name, arrow_type(kind)) for name, kind in schema.columns.items()])

    def batches() -> Iterator[pa.RecordBatch]:
        for file in files:
            records = _checked_records(file, schema)
            while rows := list(islice(records, ROWS_PER_BATCH)):
                yield pa.RecordBatch.from_pylist(rows, schema=arrow_schema)

    return arrow_schema, batches()


def _checked_records(file: str, schema: Schema) -> Iterator[dict[str, Any]]:
    for number, line, record in iter_json_records(file):
        for name, kind in schema.columns.items():
            if name not in record and name not in schema.optional:
                fault = f'has no "{name}" (it has {", ".join(record) or "nothing"})'
            elif record.get(name) is None and name in schema.not_null:
                fault = f'has null for "{name}", which every record needs'
            else:
                fault = value_fault(record.get(name), kind, name)
            if fault:
                raise UserError(
                    f"{file}, record {number} (line {line}): {fault}. Correct or remove the record; in all, "
                    f"{SHAPE_ADVICE}."
                )
        yield record


def _parquet_batches(files: list[str], schema: Schema) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    found = {file: _parquet_schema(file) for file in files}
    for file, file_schema in found.items():
        check_columns(file_schema, schema, file)
    first = found[files[0]]
    names = [name for name in schema.columns if name in first.names]
    # Shards may spell the type of a text differently (large strings, all null): plain columns get one type.
    target = pa.schema(
        [
            (name, first.field(name).type if isinstance(kind, (list, dict)) else arrow_type(kind))
            for name, kind in schema.columns.items()
            if name in names
        ]
    )

    def batches() -> Iterator[pa.RecordBatch]:
        for file in files:
            try:
                with pq.ParquetFile(file) as parquet:
                    for batch in parquet.iter_batches(batch_size=ROWS_PER_BATCH, columns=names):
                        yield batch.select(names).cast(target)
            except (pa.ArrowException, OSError) as err:
                raise UserError(f"{file} cannot be read: {err}. Copy it again, or write it anew.") from err

    return target, batches()


def _parquet_schema(file: str) -> pa.Schema:
    try:
        return pq.read_schema(file)
    except (pa.ArrowException, OSError) as err:
        raise UserError(f"{file} is no complete parquet file: {err}. Copy it again.") from err


def _load_saved(path: str, splits: Iterable[str], schema: Schema) -> dict[str, SplitData]:
    try:
        found = datasets.load_from_disk(path)
    except (OSError, ValueError, KeyError) as err:
        raise UserError(f"{path} is no complete save_to_disk folder: {err}. Save or copy it again.") from err
    if isinstance(found, datasets.Dataset):
        found = {str(found.split or "train"): found}
    loaded = {}
    for split in splits:
        dataset = found[pick_split(found, split, path)]
        check_dataset(dataset, schema, path)
        files = [entry["filename"] for entry in dataset.cache_files]
        # Rows taken through an index (select, shuffle) are stored flattened: the Arrow bytes are the content.
        loaded[split] = SplitData(only_columns(dataset, schema), hash_files(files, path))
    return loaded


def only_columns(dataset: datasets.Dataset, schema: Schema) -> datasets.Dataset:
    """The data set with the columns of the schema alone, in the order of the schema."""
    return dataset.select_columns([name for name in schema.columns if name in dataset.column_names])
