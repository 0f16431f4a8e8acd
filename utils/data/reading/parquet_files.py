"""Reads parquet files batch by batch, in the columns and types of a schema, whatever those of single files are.

Writers and shards differ: texts are large strings, views, categories, bytes or (where all are null) of no type at all;
a column or a field may be missing. The result is the same.
"""

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from utils.data.reading.schema import Kind, Schema, TextOrValue, arrow_type, check_columns, conversation_fault
from utils.data.reading.whole_values import encoded, marked
from utils.errors import UserError

ROWS_PER_BATCH = 1000
_ADVICE = "Correct or remove it and others like it."


def parquet_schema(file: str) -> pa.Schema:
    """Return the columns of a parquet file; raises UserError."""
    try:
        return pq.read_schema(file)
    except (pa.ArrowException, OSError) as err:
        raise UserError(f"{file} is no complete parquet file: {err}. Copy it again.") from err


def _with_empty_columns(file: str, found: pa.Schema) -> pa.Schema:
    """Return the columns of a file, those of numbers that are null in every row with no type.

    pandas keeps a column of missing texts as numbers.
    """
    numbers = [name for name in found.names if pa.types.is_floating(found.field(name).type)]
    if not numbers:
        return found
    about = pq.read_metadata(file)
    places = {about.schema.column(place).path: place for place in range(about.num_columns)}
    for name in numbers:
        groups = [about.row_group(number) for number in range(about.num_row_groups)]
        parts = [(group.num_rows, group.column(places[name]).statistics) for group in groups]
        if all(stats is not None and stats.null_count == rows for rows, stats in parts):
            found = found.set(found.get_field_index(name), pa.field(name, pa.null()))
    return found


def parquet_batches(files: list[str], schema: Schema) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Return the schema of parquet files and their batches; a column that no file has is left out.

    Raises:
        UserError: a needed column is missing in a file, or a type is wrong; while reading: a row is bad.
    """
    found = {file: parquet_schema(file) for file in files}
    for file, file_schema in found.items():
        check_columns(_with_empty_columns(file, file_schema), schema, file)
    there = {name for file_schema in found.values() for name in file_schema.names}
    target = pa.schema([(name, arrow_type(kind)) for name, kind in schema.columns.items() if name in there])

    def batches() -> Iterator[pa.RecordBatch]:
        for file in files:
            names = [name for name in target.names if name in found[file].names]
            rows = 0
            try:
                with pq.ParquetFile(file) as parquet:
                    for batch in parquet.iter_batches(batch_size=ROWS_PER_BATCH, columns=names):
                        yield checked_batch(batch, target, schema, f"{file}, record", rows)
                        rows += len(batch)
            except (pa.ArrowException, OSError) as err:
                raise UserError(f"{file} cannot be read: {err}. Copy it again, or write it anew.") from err

    return target, batches()


def checked_batch(
    batch: pa.RecordBatch | pa.Table, target: pa.Schema, schema: Schema, where: str, before: int = 0
) -> pa.RecordBatch:
    """Return the batch in the target's columns and types; columns it lacks are null.

    Args:
        where: what a row is called in a message, before its number.
        before: rows before this batch.

    Raises:
        UserError: a row has a forbidden null, a text that is not UTF-8, or a malformed conversation.
    """
    check_rows(batch, schema, where, before)
    columns = []
    for field in target:
        if field.name not in batch.schema.names:
            columns.append(pa.nulls(len(batch), field.type))
        elif form := _form_of(schema.columns[field.name], batch.column(field.name).type):
            values = _values(batch.column(field.name), field.name, where)
            columns.append(pa.array(map(form, values), field.type, size=len(values)))
        else:
            columns.append(_converted(batch.column(field.name), field.type))
    return pa.RecordBatch.from_arrays(columns, schema=target)


def _values(column: pa.Array | pa.ChunkedArray, name: str, where: str) -> list[Any]:
    """Return the values of a column, maps as dicts and bytes as text."""
    try:
        values = column.to_pylist(maps_as_pydicts="strict")
        return [_as_text(value) for value in values] if _holds_bytes(column.type) else values
    except KeyError as err:
        raise UserError(f'{where}s: "{name}" holds a map with one key twice ({err}). {_ADVICE}') from err


def _form_of(kind: Kind, found: pa.DataType) -> Callable[[Any], str | None] | None:
    """Return how values of a column are written as text where they are kept whole."""
    if kind is TextOrValue and pa.types.is_nested(found) and not pa.types.is_dictionary(found):
        return marked
    return encoded if kind is object else None


def _converted(column: pa.Array, wanted: pa.DataType) -> pa.Array:
    """Return the column in the wanted type; fields of objects that it lacks are null."""
    if column.type == wanted:
        return column
    if not pa.types.is_nested(wanted):
        try:
            return column.cast(wanted)
        except pa.ArrowNotImplementedError:  # no such cast: go by way of Python's values
            pass
    values = [_as_text(value) for value in column.to_pylist()]
    return pa.array(values, wanted)


def _as_text(value: object) -> object:
    """Return a value with its bytes, at any depth, as text."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {name: _as_text(inner) for name, inner in value.items()}
    return [_as_text(item) for item in value] if isinstance(value, list) else value


def check_rows(batch: pa.RecordBatch | pa.Table, schema: Schema, where: str, before: int = 0) -> None:
    """Raise UserError naming the first row with a forbidden null, a text that is not UTF-8, or a bad conversation."""
    for name in schema.columns:
        if name in batch.schema.names:
            _check_text(batch.column(name), name, where, before)
    for name in schema.not_null:
        if batch.column(name).null_count:
            row = before + batch.column(name).is_null().index(True).as_py() + 1
            raise UserError(f'{where} {row}: "{name}" is null. {_ADVICE}')
    for name in schema.conversations:
        for row, value in enumerate(_values(batch.column(name), name, where), before + 1):
            if fault := conversation_fault(value, name):
                raise UserError(f"{where} {row}: {fault}. {_ADVICE}")


def check_texts(dataset: datasets.Dataset, schema: Schema, origin: str) -> None:
    """Raise UserError where texts of a data set that is read as it lies are bytes, or not UTF-8."""
    for name, kind in schema.columns.items():
        if name not in dataset.column_names:
            continue
        column = dataset.data.column(name)
        if (kind is not object or name in schema.conversations) and _holds_bytes(column.type):
            raise UserError(f'{origin}: "{name}" holds {column.type} where text is needed: cast it to strings.')
        _check_text(column, name, f"{origin}, record", 0)


def _check_text(column: pa.Array | pa.ChunkedArray, name: str, where: str, before: int) -> None:
    """Raise UserError naming the first row whose text, at any depth, is not UTF-8."""
    try:
        column.validate(full=True)
        if not _holds_bytes(column.type):
            return
    except pa.ArrowInvalid:
        pass
    for row, value in enumerate(column, before + 1):
        try:
            _as_text(value.as_py())
        except UnicodeDecodeError as err:
            raise UserError(f'{where} {row}: "{name}" is not UTF-8 text ({err}). {_ADVICE}') from err


def _holds_bytes(found: pa.DataType) -> bool:
    """Whether values of this type hold bytes that should be text."""
    if any(check(found) for check in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)):
        return True
    if pa.types.is_dictionary(found):
        return _holds_bytes(found.value_type)
    return any(_holds_bytes(found.field(place).type) for place in range(found.num_fields))
