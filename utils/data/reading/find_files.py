"""Finds the data files of a folder, and the split of each from its name."""

import os
import re
from collections.abc import Iterable, Iterator

from utils.errors import UserError

PARQUET_SUFFIXES = (".parquet",)
JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
CSV_SUFFIXES = (".csv",)
DATA_SUFFIXES = PARQUET_SUFFIXES + JSON_SUFFIXES + CSV_SUFFIXES

# `datasets` writes these beside the data; they hold no records.
_METADATA_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_VALIDATION_NAMES = ("validation", "valid", "val", "dev")
# The user's own data are evaluated on the first of these that exists.
EVAL_NAMES = ("eval", "evaluation", *_VALIDATION_NAMES, "test", "testing")
_SPLIT_WORDS = {"train", "training", "test", "testing", "eval", "evaluation", *_VALIDATION_NAMES}
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
    chosen = _files_of_one_kind(path)
    if config is not None:
        # The configurations of a data set may overlap: all of them together would repeat rows.
        chosen = [file for file in chosen if config in name_parts(file, path)] or chosen
    by_split = _by_split(chosen, path)
    if list(by_split) == [""]:
        return {"train": by_split[""]}
    by_split.pop("", None)
    return by_split


def _files_of_one_kind(path: str) -> list[str]:
    files = sorted(_walk(path))
    for suffixes in (PARQUET_SUFFIXES, JSON_SUFFIXES, CSV_SUFFIXES):
        chosen = [file for file in files if file.lower().endswith(suffixes)]
        if chosen:
            return chosen
    raise UserError(
        f"{path} holds no data: a folder made by save_to_disk is needed, or files ending in {', '.join(DATA_SUFFIXES)}."
    )


def _by_split(files: list[str], root: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for file in files:
        found.setdefault(_split_of(name_parts(file, root)), []).append(file)
    return found


def own_files(path: str, splits: dict[str, list[str]] | None = None) -> dict[str, list[str]]:
    """Return the files of the user's own data to train on, as "train", and to evaluate on, as "eval" if there are any.

    A single file is trained on whatever its name. Its evaluation file lies beside it: `eval.jsonl` (or test,
    validation, ...) for `train.jsonl`, `chat_eval.jsonl` for `chat_train.jsonl`. In a folder, the names decide.

    Args:
        path: a file or folder.
        splits: files by split, where they are already known.

    Raises:
        UserError: there is no data file, or none to train on.
    """
    if os.path.isfile(path):
        if not path.lower().endswith(DATA_SUFFIXES):
            raise UserError(f"{path} is no data file: its name must end in one of {', '.join(DATA_SUFFIXES)}.")
        beside = _evaluation_file_beside(path)
        return {"train": [path]} | ({"eval": [beside]} if beside else {})
    splits = splits or _by_split(_files_of_one_kind(path), path)
    train = [name for name in splits if name not in EVAL_NAMES]
    if len(train) > 1:
        train = [name for name in train if name in ("train", "training")]
    if len(train) != 1:
        raise UserError(
            f"{path} does not say which of its data to train on (found: {', '.join(sorted(splits))}): name the files, "
            "for example, train.jsonl and eval.jsonl, or give --data_path one file."
        )
    evaluation = next((name for name in EVAL_NAMES if name in splits), None)
    return {"train": splits[train[0]]} | ({"eval": splits[evaluation]} if evaluation else {})


def other_files(path: str, used: dict[str, list[str]]) -> list[str]:
    """Return the data files below a folder that are not used, as paths relative to it."""
    if os.path.isfile(path):
        return []
    taken = {file for files in used.values() for file in files}
    others = (file for file in _walk(path) if file.lower().endswith(DATA_SUFFIXES) and file not in taken)
    return sorted(os.path.relpath(file, path) for file in others)


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
    """Yield all files below a folder, or the file itself."""
    if os.path.isfile(path):
        yield path
    for folder, subfolders, names in os.walk(path, followlinks=True):
        # Hidden folders hold download metadata and notebook copies.
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (
            os.path.join(folder, name) for name in names if not name.startswith(".") and name not in _METADATA_FILES
        )


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
