"""What became of rows: why some gave no sample, and what is to be said of the others; counted over all of them.

Tokenization gives every row one entry, or one for each of its samples. An entry without a sample has no ids and the
number of a reason; the columns of `BOOKS` hold these numbers until they are counted, so that counts of several
processes, of a stream's windows and of a cache's parts come from the rows themselves.
"""

from collections import Counter
from collections.abc import Iterable
from enum import IntEnum
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

BOOKS = {
    "truncated": datasets.Value("bool"),
    "dropped": datasets.Value("int8"),  # a `Reason`, or 0 for a sample
    "notes": datasets.List(datasets.Value("int8")),  # `Note`s
    "special": datasets.List(datasets.Value("int32")),  # special tokens inside the texts that the row brings
}


class Reason(IntEnum):
    """Why a row, or one of its answers, gives no sample."""

    NO_TEXT = 1
    NO_ANSWER = 2
    NO_LABEL = 3
    CUT = 4
    SHORT = 5
    LONG = 6
    NO_REJECTED = 7


class Note(IntEnum):
    """What is to be said of a row that gives samples."""

    BLANK_ANSWER = 1
    BLANK_TURN = 2
    UNANSWERED = 3
    RENDERED = 4
    BESIDE = 5
    OWN_BOS = 6
    SPLIT_ROW = 7  # on the first of its samples
    SPLIT_SAMPLE = 8  # on each of them


REASON_WORDS = {
    Reason.NO_TEXT: "blank text",
    Reason.NO_ANSWER: "no answer",
    Reason.NO_LABEL: "nothing to label",
    Reason.CUT: "answer cut off entirely by --max_seq_len",
    Reason.SHORT: "fewer than 2 tokens",
    Reason.LONG: "longer than --max_seq_len",
    Reason.NO_REJECTED: "no worse answer",
}
_NO_LABEL = (
    "With --completion_only_loss only answers are labelled: see that the rows have answers that are to be learned."
)
ADVICE = {
    Reason.NO_TEXT: "Correct the data, or name other columns with --columns.",
    Reason.NO_ANSWER: "Correct the data, or name the column of the answers with --columns.",
    Reason.NO_LABEL: "--completion_only_loss labels answers alone: give rows whose answers are to be learned.",
    Reason.CUT: "Give a larger --max_seq_len.",
    Reason.SHORT: "Correct the data: a sample needs at least two tokens.",
    Reason.LONG: "Give a larger --max_seq_len.",
    Reason.NO_REJECTED: "This phase needs a worse answer in every row.",
}
NOTE_WORDS = {
    Note.BLANK_ANSWER: "have a blank answer before the last: it is never labelled by --completion_only_loss",
    Note.BLANK_TURN: "have a blank turn that is no answer",
    Note.UNANSWERED: "have turns after the last answer: not used",
    Note.RENDERED: "have a prompt that is rendered already: prompt and answer are used as they stand",
    Note.BESIDE: "have a system text, history or tools beside a prompt that is used as it stands: not used",
    Note.OWN_BOS: "begin with BOS in the text: no other is added",
}


def settled(table: datasets.Dataset, id_columns: list[str]) -> tuple[datasets.Dataset, dict[str, Any]]:
    """Return the samples of tokenized rows, without the columns of `BOOKS`, and the counts of `count`."""
    counts = count(table.with_format("arrow")[:] if len(table) else None, id_columns)
    if counts["dropped"]:
        kept = np.flatnonzero(np.asarray(table.with_format("arrow")[:]["dropped"]) == 0)
        table = table.select(kept)
    return table.remove_columns(list(BOOKS)), counts


def count(table: pa.Table | None, id_columns: list[str]) -> dict[str, Any]:
    """Count rows, samples, tokens, and what became of the rows; None counts as no row."""
    counts: dict[str, Any] = {"rows": 0, "samples": 0, "tokens": 0, "longest": 0, "truncated": 0, "special_rows": 0}
    counts |= {"dropped": {}, "notes": {}, "special": {}}
    if table is None:
        return counts
    is_sample = pc.equal(table["dropped"], 0)
    lengths = [pc.list_value_length(table[name]).to_numpy() for name in id_columns]
    notes = _tally(table["notes"])
    special = table["special"].combine_chunks()
    counts |= {
        "rows": len(table) - notes.get(Note.SPLIT_SAMPLE, 0) + notes.get(Note.SPLIT_ROW, 0),
        "samples": pc.sum(is_sample).as_py(),
        "tokens": int(sum(part.sum() for part in lengths)),
        "longest": int(max(part.max(initial=0) for part in lengths)),
        "truncated": pc.sum(table["truncated"]).as_py(),
        "dropped": {Reason(number).name: found for number, found in _tally(table["dropped"]).items() if number},
        "notes": {Note(number).name: found for number, found in notes.items()},
        "special": {str(token): found for token, found in _tally(table["special"]).items()},
        "special_rows": pc.sum(pc.greater(pc.list_value_length(special), 0)).as_py() or 0,
    }
    return counts


def _tally(column: pa.ChunkedArray) -> dict[int, int]:
    flat = pc.list_flatten(column) if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) else column
    return {pair["values"]: pair["counts"] for pair in pc.value_counts(flat).to_pylist()}


def added(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts of several parts together."""
    total = count(None, [])
    for part in parts:
        for name, value in part.items():
            if isinstance(value, dict):
                total[name] = dict(Counter(total[name]) + Counter(value))
            else:
                total[name] = max(total[name], value) if name == "longest" else total[name] + value
    return total


def dropped_words(counts: dict[str, Any]) -> str:
    """Return how many rows were dropped for which reason, as "3 no answer, 1 blank text"; empty where none was."""
    found = sorted((-number, Reason[name]) for name, number in counts["dropped"].items())
    return ", ".join(f"{-number} {REASON_WORDS[reason]}" for number, reason in found)


def advice_on(counts: dict[str, Any]) -> str:
    """Return what to do where rows were dropped for these reasons and nothing is left."""
    return ADVICE[min((-number, Reason[name]) for name, number in counts["dropped"].items())[1]]


def notes_on(counts: dict[str, Any], special: dict[str, int]) -> list[str]:
    """Return a line for each thing that is to be said of rows, with how many of how many rows.

    Args:
        special: the id of each special token by its text.
    """
    tokens = {number: text for text, number in special.items()}
    rows, notes = counts["rows"], counts["notes"]
    lines = [f"{notes[note.name]} of {rows} rows {words}" for note, words in NOTE_WORDS.items() if notes.get(note.name)]
    if rows and not counts["samples"]:
        lines.append(f"none of its {rows} rows gave a sample ({dropped_words(counts)})")
    if notes.get(Note.SPLIT_ROW.name):
        lines.append(
            f"{notes[Note.SPLIT_ROW.name]} of {rows} rows became {notes[Note.SPLIT_SAMPLE.name]} samples, one for each "
            "answer: the template writes earlier turns in another way once later ones are there"
        )
    if counts["special_rows"]:
        found = sorted(counts["special"].items(), key=lambda pair: -pair[1])
        names = ", ".join(f"{tokens.get(int(token), token)} (in {number})" for token, number in found)
        lines.append(
            f"{counts['special_rows']} of {rows} rows have special tokens inside their own texts, which the tokenizer "
            f"reads as such: {names}"
        )
    return lines
