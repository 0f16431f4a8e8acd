"""Texts that a known data set reads from a column, or from a value inside one, with fixed words around them."""

from dataclasses import dataclass
from typing import Any

from utils.data.reading.schema import Columns, Kind

Sample = dict[str, Any]
Span = tuple[int, int]  # a range [start, end) of characters or tokens


@dataclass(frozen=True)
class Text:
    """Reads the text at a path inside a sample and puts fixed words around it; None where the sample has no value."""

    path: tuple[str | int, ...]
    before: str = ""
    after: str = ""

    def __call__(self, sample: Sample) -> str | None:
        value: Any = sample
        for step in self.path:
            if value is None or (isinstance(step, int) and len(value) <= step):
                return None
            value = value[step]
        return around(value, self.before, self.after)

    def column(self) -> Columns:
        """Return the column that this text is read from, with the kind it must have."""
        kind: Kind = str
        for step in reversed(self.path[1:]):
            kind = [kind] if isinstance(step, int) else {step: kind}
        return {self.path[0]: kind}


def around(text: str | None, before: str, after: str = "") -> str | None:
    """Return `before + text + after`, or None for None."""
    return None if text is None else before + text + after


def human(*path: str | int) -> Text:
    """Make a question of the value at this path: ` Human: ... Assistant:`."""
    return Text(path, " Human: ", " Assistant:")


def reply(*path: str | int) -> Text:
    """Make an answer of the value at this path, with the space that follows `Assistant:`."""
    return Text(path, " ")


def as_is(*path: str | int) -> Text:
    """Use the value at this path as it is."""
    return Text(path)


def joined(prompt: str | None, response: str | None) -> str | None:
    """Join prompt and response, or return None when one of them is None."""
    return None if prompt is None or response is None else prompt + response
