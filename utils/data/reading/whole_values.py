"""Keeps values whole, with every field they have: as JSON text, the same from every kind of file.

Rows of one column may have different fields (a tool call's arguments), which no type of Arrow holds without filling in
nulls. So a column of kind `object` is text; `utils.data.reading.messages` reads such text as conversations and tools.
In a column of kind `TextOrValue`, where a text may look like JSON and be a text all the same, other values begin with
`VALUE`.
"""

import json
from typing import Any

VALUE = "\x00json:"


def encoded(value: Any) -> str | None:
    """Return a value as JSON text, without the nulls that parquet fills in; a text stays as it is."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(without_nulls(value), ensure_ascii=False, default=str)


def marked(value: Any) -> str | None:
    """Return a text as it is, and any other value so that `unmarked` tells them apart."""
    return value if value is None or isinstance(value, str) else f"{VALUE}{encoded(value)}"


def unmarked(value: Any) -> Any:
    """Return what `marked` was given."""
    return json.loads(value[len(VALUE) :]) if isinstance(value, str) and value.startswith(VALUE) else value


def without_nulls(value: Any) -> Any:
    """Return the value without the fields of its objects that are null."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
