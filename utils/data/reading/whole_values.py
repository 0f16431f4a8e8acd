"""Keeps values whole, with every field they have: as JSON text, the same from every kind of file.

Rows of one column may have different fields (a tool call's arguments), which no type of Arrow holds without filling in
nulls. So a column of kind `object` is text; `utils.data.reading.messages` reads such text as conversations and tools.
In a column of kind `TextOrValue`, where a text may look like JSON and be a text all the same, other values begin with
`VALUE`.
"""

import json
from decimal import Decimal
from typing import Any

VALUE = "\x00json:"


class RepeatedName(ValueError):
    """A name that stands twice in one object of JSON, with different values."""


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; raises RepeatedName where only one of two values could be kept."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for name, value in pairs:
            if found[name] != value:
                raise RepeatedName(f'"{name}" stands twice in one object, with different values')
    return found


def encoded(value: Any) -> str | None:
    """Return a value as JSON text, without the nulls that parquet fills in; a text stays as it is."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(without_nulls(value), ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    """Return a value of Arrow in the type that JSON has for it, as text where there is none."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return str(value)


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
