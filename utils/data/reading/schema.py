"""Describes and checks the columns that a data set must have.

A column's kind is written in plain Python: `str`, `int`, `float`, `[kind]` for a list, `{"field": kind}` for an
object. `{"question": {"full_text": str}, "labels": int}` describes two columns. Null is allowed everywhere but in the
columns that a data set names as not null.

`object` is a value that is kept whole, with every field it has, whatever fields other rows have: see
`utils.data.reading.whole_values`. `TextOrValue` is a text in one row and a list or an object, kept whole, in another.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import datasets
import pyarrow as pa

from utils.data.reading.messages import conversation_fault
from utils.data.reading.records import json_kind
from utils.errors import UserError


class TextOrValue:
    """The kind of a column whose rows hold texts, or lists or objects."""


Kind = type | list | dict
Columns = dict[str, Kind]


LATE = "columns that came late"  # of a stream: columns that the records read so far have and its first ones have not


class Schema(NamedTuple):
    """The columns to read."""

    columns: Columns
    optional: tuple[str, ...] = ()  # may be missing
    not_null: tuple[str, ...] = ()  # have a value in every row
    conversations: tuple[str, ...] = ()  # hold lists of messages, see `conversation_fault`


CONVERSATION: Kind = [{"role": str, "content": str}]

_NAMES = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    object: "any value",
    TextOrValue: "a text or a list",
}
_JSON: dict[type, tuple[type, ...]] = {
    str: (str,), int: (int,), float: (int, float), TextOrValue: (str, list, dict),
}  # fmt: skip
_ARROW: dict[type, pa.DataType] = {
    str: pa.string(), int: pa.int64(), float: pa.float64(), object: pa.string(), TextOrValue: pa.string(),
}  # fmt: skip
_ARROW_CHECKS: dict[type, tuple[Callable[[pa.DataType], bool], ...]] = {
    # Writers without a type for texts leave bytes; whether they are UTF-8 is checked row by row.
    str: (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
    ),
    int: (pa.types.is_integer,),
    float: (pa.types.is_floating, pa.types.is_integer),
}
_ARROW_LISTS = (
    pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view,
    pa.types.is_large_list_view,
)  # fmt: skip
_ARROW_CHECKS[TextOrValue] = (*_ARROW_CHECKS[str], *_ARROW_LISTS, pa.types.is_struct)


def arrow_type(kind: Kind) -> pa.DataType:
    """Return the Arrow type of a column of this kind."""
    if isinstance(kind, list):
        return pa.list_(arrow_type(kind[0]))
    if isinstance(kind, dict):
        return pa.struct([(name, arrow_type(inner)) for name, inner in kind.items()])
    return _ARROW[kind]


def kind_name(kind: Kind) -> str:
    """Name a kind for a message: "a list", "a string", ..."""
    if isinstance(kind, list):
        return "a list"
    return "an object" if isinstance(kind, dict) else _NAMES[kind]


def value_fault(value: Any, kind: Kind, where: str) -> str | None:
    """Describe what is wrong with a JSON value that should be of this kind; None if nothing is."""
    if value is None:
        return None
    if kind is object:
        return None if _is_encodable(str(value)) else f'"{where}" holds half of a two-part character (a lone surrogate)'
    if isinstance(kind, list):
        if isinstance(value, list):
            faults = (value_fault(item, kind[0], f"{where}[{place}]") for place, item in enumerate(value))
            return next(filter(None, faults), None)
    elif isinstance(kind, dict):
        if isinstance(value, dict):
            faults = (_field_fault(value, name, inner, where) for name, inner in kind.items())
            return next(filter(None, faults), None)
    elif isinstance(value, _JSON[kind]) and not isinstance(value, bool):
        if kind in (str, TextOrValue) and not _is_encodable(str(value)):
            return f'"{where}" holds half of a two-part character (a lone surrogate)'
        return None
    return f'"{where}" is {json_kind(value)} where {kind_name(kind)} is needed'


def record_fault(record: dict[str, Any], schema: Schema) -> str | None:
    """Describe what is wrong with a record of a file; None if nothing is."""
    for name, kind in schema.columns.items():
        if name not in record and name not in schema.optional:
            return f'has no "{name}" (it has {", ".join(record) or "nothing"})'
        if record.get(name) is None and name in schema.not_null:
            return f'has null for "{name}", which every record needs'
        fault = value_fault(record.get(name), kind, name)
        if fault is None and name in schema.conversations:
            fault = conversation_fault(record.get(name), name)
        if fault:
            return fault
    return None


def _field_fault(value: dict, name: str, kind: Kind, where: str) -> str | None:
    if name not in value:
        return f'"{where}.{name}" is missing'
    return value_fault(value[name], kind, f"{where}.{name}")


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def type_fault(found: pa.DataType, kind: Kind, where: str) -> str | None:
    """Describe what is wrong with an Arrow type that should be of this kind; None if nothing is."""
    if pa.types.is_dictionary(found):
        found = found.value_type
    if pa.types.is_null(found) or kind is object:
        return None
    if isinstance(kind, list):
        if any(check(found) for check in _ARROW_LISTS):
            return type_fault(found.value_type, kind[0], f"{where}[]")
    elif isinstance(kind, dict):
        if pa.types.is_struct(found):
            fields = {found.field(place).name: found.field(place).type for place in range(found.num_fields)}
            faults = (
                type_fault(fields[name], inner, f"{where}.{name}")
                if name in fields
                else f'"{where}" has no field "{name}"'
                for name, inner in kind.items()
            )
            return next(filter(None, faults), None)
    elif any(check(found) for check in _ARROW_CHECKS[kind]):
        return None
    return f'"{where}" holds {found} where {kind_name(kind)} is needed'


def check_dataset(dataset: datasets.Dataset, schema: Schema, origin: str) -> None:
    """Raise UserError unless there are rows, and the needed columns with the right types and no forbidden nulls."""
    if len(dataset) == 0:
        raise UserError(f"{origin} holds no records{_in_split(dataset)}: at least one is needed.")
    check_columns(dataset.features.arrow_schema, schema, f"{origin}{_in_split(dataset)}")
    for name in schema.not_null:
        column = dataset.data.column(name)
        if column.null_count:
            row = column.is_null().index(True).as_py() + 1
            raise UserError(
                f'{origin}{_in_split(dataset)}, record {row}: "{name}" is null ({column.null_count} records '
                "in all). Correct or remove them."
            )


def _in_split(dataset: datasets.Dataset) -> str:
    return f' (split "{dataset.split}")' if dataset.split else ""


def check_columns(found: pa.Schema, schema: Schema, origin: str) -> None:
    """Raise UserError unless all needed columns exist and have the right types."""
    missing = [name for name in schema.columns if name not in found.names and name not in schema.optional]
    if missing:
        raise UserError(
            f"{origin} lacks the columns {', '.join(missing)}; found: {', '.join(found.names) or 'none'}. "
            "Rename or add columns, or use local/jsonfile for data of your own."
        )
    present = [name for name in schema.columns if name in found.names]
    faults = (type_fault(found.field(name).type, schema.columns[name], name) for name in present)
    fault = next(filter(None, faults), None)
    if fault:
        raise UserError(f"{origin}: the column {fault}. Write the data again with that type.")
