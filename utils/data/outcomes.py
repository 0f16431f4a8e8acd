"""What became of rows: why some gave no sample, and what is to be said of the others; counted over all of them.

Tokenization gives every row one entry, or one for each of its samples. An entry without a sample has no ids. The
column `BOOKS` holds a list of numbers for each entry, an empty one for most, until these are counted: so the counts
of several processes, of a stream's windows and of a cache's parts come from the rows themselves. `UNREAD` holds the
names of fields that nothing reads, in the same way.
"""

from collections import Counter
from collections.abc import Iterable
from enum import IntEnum
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

BOOKS = "books"
BOOKS_FEATURE = datasets.List(datasets.Value("int32"))
UNREAD = "unread"
UNREAD_FEATURE = datasets.List(datasets.Value("string"))
READ = "+"  # before a name: some row's text depends on this field, so that it is used after all
FIRST_TOKEN = 256  # from here on, special tokens: the number minus this is the token's id


class Reason(IntEnum):
    """Why a row, or one of its answers, gives no sample: the first of the entry's numbers."""

    NO_TEXT = 1
    NO_ANSWER = 2
    NO_LABEL = 3
    CUT = 4
    SHORT = 5
    LONG = 6
    NO_REJECTED = 7


class Note(IntEnum):
    """What is to be said of a row that gives samples."""

    TRUNCATED = 32
    BLANK_ANSWER = 33
    BLANK_TURN = 34
    UNANSWERED = 35
    RENDERED = 36
    BESIDE = 37
    OWN_BOS = 38
    SPLIT_ROW = 39  # on the first of its samples
    SPLIT_SAMPLE = 40  # on each of them
    LEFT_REASONING = 41
    LEFT_SYSTEM = 42
    LEFT_USER = 43
    LEFT_TOOL = 44
    LEFT_ANSWER = 45
    LEFT_CALL = 46
    DEVELOPER = 47
    OTHER_ANSWERS = 48
    NO_VALUE = 49
    OTHER_PROMPT = 50


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
    Note.LEFT_REASONING: "have reasoning that the chat template leaves out",
    Note.LEFT_SYSTEM: "have a system turn that the chat template leaves out",
    Note.LEFT_USER: "have a user turn that the chat template leaves out",
    Note.LEFT_TOOL: "have a result of a tool that the chat template leaves out",
    Note.LEFT_ANSWER: "have an answer that the chat template leaves out",
    Note.LEFT_CALL: "have a call of a tool that the chat template leaves out",
    Note.DEVELOPER: "have a turn of the role developer, which is written as system: the format has no place for it",
    Note.OTHER_ANSWERS: "have other answers than the first: not used",
    Note.OTHER_PROMPT: "have a prompt or a history that the whole conversation beside it does not hold: not used",
    Note.NO_VALUE: "have an answer that is the word nan, None or null alone, as programs write a missing value",
}


def settled(table: datasets.Dataset, id_columns: list[str]) -> tuple[datasets.Dataset, dict[str, Any]]:
    """Return the samples of tokenized rows, without what is to be said of them, and the counts of `count`."""
    if len(table) == 0:
        return table.remove_columns([BOOKS, UNREAD]), count(None, id_columns)
    columns = table.with_format("arrow")[:]
    counts = count(columns, id_columns)
    if counts["dropped"]:
        table = table.select(np.flatnonzero(pc.list_value_length(columns[id_columns[0]]).to_numpy()))
    return table.remove_columns([BOOKS, UNREAD]), counts


def count(table: pa.Table | None, id_columns: list[str]) -> dict[str, Any]:
    """Count rows, samples, tokens, and what became of the rows; None counts as no row."""
    counts: dict[str, Any] = {"rows": 0, "samples": 0, "tokens": 0, "longest": 0, "truncated": 0, "special_rows": 0}
    counts |= {"dropped": {}, "notes": {}, "special": {}, "unread": {}}
    if table is None:
        return counts
    lengths = [pc.list_value_length(table[name]).to_numpy() for name in id_columns]
    books = table[BOOKS].combine_chunks()
    numbers = pc.list_flatten(books).to_numpy()
    found = dict(zip(*(part.tolist() for part in np.unique(numbers, return_counts=True)), strict=True))
    of_entry = pc.list_parent_indices(books).to_numpy()
    notes = {Note(number).name: times for number, times in found.items() if Note.TRUNCATED < number < FIRST_TOKEN}
    return {
        "rows": len(table) - notes.get(Note.SPLIT_SAMPLE.name, 0) + notes.get(Note.SPLIT_ROW.name, 0),
        "samples": int(np.count_nonzero(lengths[0])),
        "tokens": int(sum(part.sum() for part in lengths)),
        "longest": int(max(part.max(initial=0) for part in lengths)),
        "truncated": found.get(Note.TRUNCATED, 0),
        "special_rows": len(np.unique(of_entry[numbers >= FIRST_TOKEN])),
        "dropped": {Reason(number).name: times for number, times in found.items() if number < Note.TRUNCATED},
        "notes": notes,
        "special": {str(number - FIRST_TOKEN): times for number, times in found.items() if number >= FIRST_TOKEN},
        "unread": {one["values"]: one["counts"] for one in pc.list_flatten(table[UNREAD]).value_counts().to_pylist()},
    }


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


def notes_on(counts: dict[str, Any], special: dict[str, int], columns: Iterable[str] = ()) -> list[str]:
    """Return a line for each thing that is to be said of rows, with how many of how many rows.

    Args:
        special: the id of each special token by its text.
        columns: those that nothing reads.
    """
    unread = [name for name in counts["unread"] if not name.startswith(READ) and READ + name not in counts["unread"]]
    names = [*columns, *sorted(unread)]
    lines = [f"not used: {', '.join(names)}"] if names else []
    tokens = {number: text for text, number in special.items()}
    rows, notes = counts["rows"], counts["notes"]
    lines += [
        f"{notes[note.name]} of {rows} rows {words}" for note, words in NOTE_WORDS.items() if notes.get(note.name)
    ]
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
