"""Keeps values whole, with every field they have: as JSON text, the same from every kind of file.

Rows of one column may have different fields (a tool call's arguments), which no type of Arrow holds without filling in
nulls. So a column of kind `object` is text; `utils.data.reading.messages` reads such text as conversations and tools.
"""

import json
from typing import Any


def encoded(value: Any) -> str | None:
    """Return a value as JSON text, without the nulls that parquet fills in; a text stays as it is."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(without_nulls(value), ensure_ascii=False, default=str)


def without_nulls(value: Any) -> Any:
    """Return the value without the fields of its objects that are null."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
