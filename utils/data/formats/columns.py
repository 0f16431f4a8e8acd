"""Decides from the columns of the user's own data, and from their first rows, what each column is."""

import re
from itertools import islice
from typing import Any

import pyarrow.parquet as pq

from utils.data.formats.conversations import ANSWER_ROLES, INPUT_ROLES, OF_TOKENS, PROMPT_ROLES, TALK_ROLES, Rows
from utils.data.formats.roles import BESIDE, OPTIONAL
from utils.data.reading.data_files import is_parquet, iter_records
from utils.data.reading.messages import Malformed, conversation_fault, to_messages
from utils.data.reading.schema import Kind, Schema, TextOrValue
from utils.errors import UserError

ROWS_TRIED = 100
# What the names of columns tell, for advice alone.
_ABOUT_ROW = re.compile(
    r"^(.*_)?(id|idx|index|uuid|source|url|context|lang|language|score|split|title)$|^$", re.IGNORECASE
)
_ASKS = re.compile(r"prompt|instruct|question|query|task|input|human|user|problem", re.IGNORECASE)
_ANSWERS = re.compile(
    r"answer|response|output|completion|reply|chosen|target|solution|assistant|summary", re.IGNORECASE
)
# Names in the data of others for what is only one thing: WildChat's, OpenAI's first, OpenOrca's, TRL's.
_OTHER_NAMES = {
    "conversations": ("conversation",),
    "tools": ("functions",),
    "system": ("system_prompt",),
    "loss_mask": ("completion_mask", "assistant_masks"),
}
_LIST_OF_OBJECTS = re.compile(r"\s*\[\s*\{")
_TALKS = tuple(((role,), ("tools", "system")) for role in TALK_ROLES)


def _pair(prompt: str, answer: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    of_answer = ("rejected",) if answer == "chosen" else ()
    of_prompt = INPUT_ROLES if prompt in ("instruction", "question") else ()
    return (prompt, answer), (*of_answer, *of_prompt, *BESIDE)


# (needed roles, optional roles); the first format whose columns exist is used.
_FIRST = [("prompt", "chosen"), ("prompt", "response"), ("prompt", "completion"), ("instruction", "output")]
_PAIRS = [*_FIRST, *((prompt, answer) for prompt in PROMPT_ROLES for answer in ANSWER_ROLES)]
FORMATS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    _TALKS[0],
    *(_pair(*roles) for roles in _FIRST),
    _TALKS[1],
    *(_pair(*roles) for roles in dict.fromkeys(_PAIRS) if roles not in _FIRST),
    (("chosen",), ("rejected", *BESIDE)),
    (("input_ids", "labels"), ("attention_mask",)),
    (("input_ids",), ("loss_mask", "attention_mask")),
    (("text",), ()),
)
_SHOWN = (
    "messages, (tools), (system); conversations, (tools), (system); prompt, chosen, (rejected); prompt, response; "
    "prompt, completion; instruction, output, (input); question, answer; text; input_ids, (labels)"
)


def column_roles(found: list[str], given: dict[str, str], origin: str) -> dict[str, str]:
    """Return the column of each role of the format that the columns fit; optional roles are always included.

    Args:
        found: the columns of the data.
        given: columns by role, from `--columns`.

    Raises:
        UserError: the columns fit no known format.
    """
    for needed, optional in FORMATS:
        roles = {role: given.get(role) or _usual_name(role, found) for role in (*needed, *optional)}
        if set(given) <= set(roles) and all(roles[role] in found for role in (*needed, *given)):
            return roles
    asked = f" with --columns {','.join(f'{role}={column}' for role, column in given.items())}" if given else ""
    raise UserError(
        f"{origin} has the columns {', '.join(found) or 'none'}{asked}: they are none of these formats: {_SHOWN}. "
        f"{_advice(found, given)}"
    )


def with_answers_beside(
    roles: dict[str, str], found: list[str], given: dict[str, str], rows: list[dict[str, Any]]
) -> dict[str, str]:
    """Return the roles of rows whose conversations end in a question, where a column `chosen` has their answers.

    Other rows' roles are returned as they are.

    Args:
        roles: as `column_roles` returns them for these `found` columns and `given` roles.
        rows: the first ones.
    """
    talk = next((role for role in TALK_ROLES if role in roles), None)
    if talk is None or given or "chosen" not in found or "prompt" in found or not rows:
        return roles
    if any(_ends_in_answer(row.get(roles[talk])) for row in rows):
        return roles
    return column_roles(found, {"prompt": roles[talk], "chosen": "chosen"}, "")


def _ends_in_answer(value: Any) -> bool:
    try:
        return to_messages(value, "")[-1]["role"] == "assistant"
    except Malformed:
        return True  # which a later check reports


def _usual_name(role: str, found: list[str]) -> str:
    return next((name for name in (role, *_OTHER_NAMES.get(role, ())) if name in found), role)


def _advice(found: list[str], given: dict[str, str]) -> str:
    """Tell how `--columns` would name the columns at hand."""
    absent = [column for column in given.values() if column not in found]
    if absent:
        return f"There is no column {', '.join(absent)}: correct --columns."
    telling = [column for column in found if not _ABOUT_ROW.search(column)] or found
    if len(telling) >= 2:
        prompt = next((column for column in telling if _ASKS.search(column)), telling[0])
        others = [column for column in telling if column != prompt]
        answer = next((column for column in others if _ANSWERS.search(column)), others[0])
        return f"Name them with --columns, for example --columns prompt={prompt},response={answer}."
    if telling:
        name = telling[0]
        return f"If {name} holds whole texts, give --columns text={name}; if conversations, messages={name}."
    return "Write columns with one of these names."


# ------------------------------------------------------------------------------------------------- kinds


def first_rows(files: list[str]) -> list[dict[str, Any]]:
    """Return the first rows of data files as they stand; none where they can't be read, which a later check reports."""
    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            rows += islice(_rows_of(file), ROWS_TRIED - len(rows))
        except Exception:  # whatever is wrong with a file, reading it whole says it with its place
            break
        if len(rows) >= ROWS_TRIED:
            break
    return rows


def _rows_of(file: str) -> Any:
    if is_parquet(file):
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=ROWS_TRIED):
                yield from batch.to_pylist(maps_as_pydicts="strict")
        return
    for *_, record in iter_records(file):
        yield record


def read_as(roles: dict[str, str], rows: list[dict[str, Any]]) -> tuple[Rows, Schema]:
    """Return how rows are read, and the columns with their kinds, from the first rows.

    A column beside the needed ones that does not hold what its name says is left out: it means something else here.
    """
    kinds: dict[str, Kind] = {}
    for role, column in roles.items():
        values = [row[column] for row in rows if row.get(column) not in (None, "")]
        kind = _kind(role, values)
        if kind is not None:
            kinds[role] = kind
    roles = {role: column for role, column in roles.items() if role in kinds}
    columns = {column: kinds[role] for role, column in roles.items()}
    optional = tuple(column for role, column in roles.items() if role in OPTIONAL)
    may_be_null = ("instruction",) if any(role in roles for role in INPUT_ROLES) else ()
    not_null = tuple(
        column for role, column in roles.items() if column not in optional and role not in may_be_null
    )  # fmt: skip
    talks = tuple(roles[role] for role in TALK_ROLES if role in roles)
    whole = frozenset(column for column, kind in columns.items() if kind is object)
    return Rows(roles, whole), Schema(columns, optional, not_null, talks)


def _kind(role: str, values: list[Any]) -> Kind | None:
    """Return the kind of a column from its first values that are not null; None where it can't have the role."""
    if role in (*TALK_ROLES, "history", "tools"):
        return object
    if role in ("input_ids", *OF_TOKENS):
        return [int]
    if role not in (*PROMPT_ROLES, *ANSWER_ROLES, "rejected"):
        is_text = not values or any(isinstance(value, str) for value in values)
        return str if is_text or role not in (*BESIDE, *INPUT_ROLES) else None
    return object if any(isinstance(value, str) and _is_talk(value) for value in values) else TextOrValue


def _is_talk(text: str) -> bool:
    return _LIST_OF_OBJECTS.match(text) is not None and not conversation_fault(text, "")
