"""Finds the data files of a folder, and the split of each from its name."""

import os
import re
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from utils.data.reading.data_files import is_parquet, iter_records
from utils.data.reading.records import is_blank, lone_object_names
from utils.data.reading.text_files import (
    CSV_SUFFIXES,
    DATA_SUFFIXES,
    JSON_SUFFIXES,
    OTHER_SUFFIXES,
    PACKED_SUFFIXES,
    PARQUET_SUFFIXES,
    SHOWN_SUFFIXES,
)
from utils.errors import UserError

# `datasets` writes these beside the data; they hold no records.
_METADATA_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_VALIDATION_NAMES = ("validation", "valid", "val", "dev")
# The user's own data are evaluated on the first of these that exists.
EVAL_NAMES = ("eval", "evaluation", *_VALIDATION_NAMES, "test", "testing")
_SPLIT_WORDS = {"train", "training", "test", "testing", "eval", "evaluation", *_VALIDATION_NAMES}
_ABOUT_DATA = {"metadata", "meta", "info", "infos", "config", "stats", "schema", "index", "manifest", "readme"}
_SHARD_NAME = re.compile(r"(.+?)-\d{5}-of-\d{5}")


def pick_split(found: Iterable[str], wanted: str, origin: str) -> str:
    """Return the name of the wanted split among those found; a validation split has several usual names.

    Raises:
        UserError: there is no such split.
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
    """Return the data files below `path` by split name: parquet if there is any, else JSON, else CSV.

    The split is read from the file name (train-00000-of-00001.parquet, dev.jsonl), else from the names of the folders
    (train/0000.parquet). Where no name contains a split, all files are the train split.

    Raises:
        UserError: there are no data files.
    """
    chosen = _files_by_kind(path)[0]
    if config is not None:
        # The configurations of a data set may overlap: all of them together would repeat rows.
        chosen = [file for file in chosen if config in name_parts(file, path)] or chosen
    by_split = _by_split(chosen, path)
    if list(by_split) == [""]:
        return {"train": by_split[""]}
    by_split.pop("", None)
    return by_split


def _files_by_kind(path: str) -> list[list[str]]:
    """Return the data files below a folder: parquet, JSON and CSV, as far as there are any."""
    found = list(_walk(path))
    files = sorted(file for file in found if file.lower().endswith(DATA_SUFFIXES) and not _unpacked_beside(file))
    stray = _stray_files(files)
    kinds = [
        [file for file in files if file.lower().endswith(suffixes) and file not in stray]
        for suffixes in (PARQUET_SUFFIXES, JSON_SUFFIXES, CSV_SUFFIXES)
    ]
    if any(kinds):
        return [kind for kind in kinds if kind]
    raise UserError(
        f"{path} holds no data: a folder made by save_to_disk is needed, or files ending in {SHOWN_SUFFIXES}"
        f"{_other_kinds(found)}."
    )


def _unpacked_beside(file: str) -> str | None:
    """Return the file that a compressed one was made from (or unpacked to), where it lies beside it."""
    stem, ending = os.path.splitext(file)
    return stem if ending.lower() in PACKED_SUFFIXES and os.path.isfile(stem) else None


def _other_kinds(files: list[str]) -> str:
    """Return the end of a message that names a file of data in a form that is not read."""
    names = sorted(os.path.basename(file) for file in files if file.lower().endswith(OTHER_SUFFIXES))
    return f"; {names[0]} is none of these: export it to one of them" if names else ""


def _stray_files(files: list[str]) -> set[str]:
    """Return the .json files that tell about the data and are none: one object, with no field that records have."""
    if len(files) < 2:
        return set()
    objects = {file: names for file in files if (names := lone_object_names(file))}
    records = [_names_in(file) for file in files if file not in objects] if objects else []
    stray = set()
    for file, names in objects.items():
        others = records or [objects[other] for other in objects if other != file]
        if not any(names & found for found in others) and not _is_named_as_data(file):
            stray.add(file)
    return set() if len(stray) == len(files) else stray


def _names_in(file: str) -> set[str]:
    """Return the columns of a data file, of JSON those of its first record; none of a file that can't be read."""
    try:
        return set(pq.read_schema(file).names if is_parquet(file) else next(iter_records(file), (0, 0, {}))[2])
    except (pa.ArrowException, OSError, UserError):
        return set()


def _is_named_as_data(file: str) -> bool:
    """Whether a file's own name says that it is training or evaluation data, and not that it tells about them."""
    stem = os.path.basename(file).split(".")[0]
    words = re.findall("[a-z]+", stem.lower())
    return _split_of([stem]) != "" and not _ABOUT_DATA.intersection(words)


def _by_split(files: list[str], root: str) -> dict[str, list[str]]:
    """Return the files of each split, every real file of a split once, whatever links lead to it."""
    found: dict[str, dict[str, str]] = {}
    # A file before the links to it; otherwise in the order of their names.
    for file in sorted(files, key=lambda file: os.path.realpath(file) != os.path.abspath(file)):
        found.setdefault(_split_of(name_parts(file, root)), {}).setdefault(os.path.realpath(file), file)
    return {split: _with_rows(sorted(of_split.values())) for split, of_split in found.items()}


def _with_rows(files: list[str]) -> list[str]:
    """Leave out files that hold nothing, which some programs write as shards, unless all of them do."""
    return [file for file in files if is_parquet(file) or not is_blank(file)] or files


def own_files(path: str, splits: dict[str, list[str]] | None = None, evaluates: bool = False) -> dict[str, list[str]]:
    """Return the files of the user's own data to train on, as "train", and to evaluate on, as "eval" if there are any.

    A single file is trained on whatever its name. Its evaluation file lies beside it: `eval.jsonl` (or test,
    validation, ...) for `train.jsonl`, `chat_eval.jsonl` for `chat_train.jsonl`. In a folder, the names decide.

    Args:
        path: a file or folder.
        splits: files by split, where they are already known.
        evaluates: nothing is trained on; files for evaluation alone are then "train" too, of which all is evaluated.

    Raises:
        UserError: there is no data file, or none to train on.
    """
    if os.path.isfile(path):
        if not path.lower().endswith(DATA_SUFFIXES):
            raise UserError(f"{path} is no data file: its name must end in {SHOWN_SUFFIXES}.")
        beside = _evaluation_file_beside(path)
        return {"train": [path]} | ({"eval": [beside]} if beside else {})
    if splits is None:
        kinds = [_by_split(kind, path) for kind in _files_by_kind(path)]
        # The first that holds something to train on; only its files are read.
        splits = next((kind for kind in kinds if evaluates or not set(EVAL_NAMES).issuperset(kind)), kinds[0])
    train = [name for name in splits if name not in EVAL_NAMES]
    evaluation = next((name for name in EVAL_NAMES if name in splits), None)
    if evaluates and evaluation and not train:
        return {"train": splits[evaluation]}
    found = train
    if len(train) > 1:
        train = [name for name in train if name in ("train", "training")]
    if len(train) != 1:
        choice = (
            f"give --data_path one of them, for example {os.path.join(path, found[0])}"
            if found and os.path.isdir(os.path.join(path, found[0]))
            else "name the files, for example, train.jsonl and eval.jsonl, or give --data_path one file"
        )
        raise UserError(
            f"{path} does not say which of its data to train on (found: {', '.join(sorted(splits))}): {choice}."
        )
    return {"train": splits[train[0]]} | ({"eval": splits[evaluation]} if evaluation else {})


def other_files(path: str, used: dict[str, list[str]]) -> list[str]:
    """Return the data files below a folder that are not used, as paths relative to it; links to files that are say so.

    Args:
        used: the files that are, by split.
    """
    if os.path.isfile(path):
        return []
    taken = {file for files in used.values() for file in files}
    real = {os.path.realpath(file): file for file in taken}
    endings = DATA_SUFFIXES + OTHER_SUFFIXES
    others = sorted(file for file in _walk(path) if file.lower().endswith(endings) and file not in taken)
    found = [os.path.relpath(file, path) + _why_unread(file, path, real) for file in others]
    return found + [f"{os.path.relpath(folder, path)} (links to a folder that is read)" for folder in _loops(path)]


def _why_unread(file: str, root: str, used: dict[str, str]) -> str:
    """Return in brackets why a file is not read, where it is known; `used` has files by their real paths."""
    if same := used.get(os.path.realpath(file)):
        return f" (links to {os.path.relpath(same, root)})"
    if (unpacked := _unpacked_beside(file)) in used.values():
        return f" (a compressed copy of {os.path.relpath(unpacked, root)})"
    if not file.lower().endswith(DATA_SUFFIXES):
        return " (another format)"
    return " (empty)" if not is_parquet(file) and is_blank(file) else ""


def unread_note(path: str, used: dict[str, list[str]]) -> str:
    """Return the end of a line that names the data files below a folder which are not used; empty where all are."""
    others = other_files(path, used)
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return f"; not read: {', '.join(others[:3])}{more}" if others else ""


def _evaluation_file_beside(path: str) -> str | None:
    folder, file = os.path.split(path)
    stem, dot, suffix = file.partition(".")
    words = re.findall("[a-z]+|[^a-z]+", stem.lower())
    if "train" not in words:
        return None
    at = sum(map(len, words[: words.index("train")]))
    names = (f"{stem[:at]}{name}{stem[at + len('train') :]}{dot}{suffix}" for name in EVAL_NAMES)
    return next((os.path.join(folder, name) for name in names if os.path.isfile(os.path.join(folder, name))), None)


def _walk(path: str) -> Iterator[str]:
    """Yield all files below a folder, or the file itself; a folder that several links lead to is entered once."""
    if os.path.isfile(path):
        yield path
    for folder, _, names in _folders(path):
        yield from (
            os.path.join(folder, name)
            for name in names
            if not name.startswith(".") and name not in _METADATA_FILES and os.path.exists(os.path.join(folder, name))
        )


def _loops(path: str) -> list[str]:
    """Return the links below a folder that are not followed, since what they lead to is read under another name."""
    return [os.path.join(folder, name) for folder, again, _ in _folders(path) for name in again]


def _folders(path: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield (folder, links in it that are not followed, files in it) for every real folder below `path`, once."""
    entered = {os.path.realpath(path)}
    for folder, subfolders, names in os.walk(path, followlinks=True):
        # Hidden folders hold download metadata and notebook copies.
        there = sorted(name for name in subfolders if not name.startswith("."))
        again = []
        # Folders before links, so that a folder keeps its own name.
        for name in sorted(there, key=lambda name: os.path.islink(os.path.join(folder, name))):
            real = os.path.realpath(os.path.join(folder, name))
            if real in entered:
                again.append(name)
            entered.add(real)
        subfolders[:] = [name for name in there if name not in again]
        yield folder, again, names


def name_parts(file: str, root: str) -> list[str]:
    """Return the file's name without suffixes, then the names of its folders up to `root`."""
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
