"""Which files in a model's folder a run of this program wrote: they alone are ever replaced or removed.

`.saved_files.json` inside the folder lists them. A folder that an earlier version saved has no such list; there, the
names of the saved format count as the run's if its `run.json` is there. All other files are somebody else's, and so is
one of the run's that was changed since: they stay, and one that has to make way for a new file is renamed, not lost.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable

from utils.files import RUN_FILE, read_run_file, sync, sync_tree, write_json
from utils.logging.console import say
from utils.logging.loss_curve import PICTURE
from utils.model.fingerprint import files_fingerprint

LIST = ".saved_files.json"
FORMAT = 1
CARD = "README.md"
CARD_MARKS = ("library_name: transformers", "after supervised fine-tuning on", "## Settings")
ADAPTER_FOLDER = "adapter"  # below the folder of the merged model
# What saving writes, and what loaders would read beside it.
WEIGHT_NAMES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
TOKENIZER_NAMES = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|tokenizer\.model|(spiece|sentencepiece\.bpe|sentencepiece)\.model|tekken\.json|chat_template\.(jinja|json)"
    r"|additional_chat_templates/[^/]+\.jinja"
)
SAVED_NAMES = re.compile(
    rf"config\.json|generation_config\.json|README\.md|loss\.png|{ADAPTER_FOLDER}/adapter_(config\.json|model\.safetensors)"
    rf"|{WEIGHT_NAMES.pattern}|{TOKENIZER_NAMES.pattern}"
)
# An adapter beside a whole model: transformers would load it on top.
STRAY_ADAPTER = re.compile(r"adapter_config\.json|adapter_model\.(safetensors|bin)")


def list_files(folder: str) -> list[str]:
    """List the files below `folder` by their path within it, links to folders as one file each; sorted."""
    found = []
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        found += [os.path.relpath(os.path.join(parent, name), folder) for name in (*names, *links)]
    return sorted(name for name in found if name != LIST)


def saved_names(folder: str) -> list[str]:
    """List the files in `folder` that have a name of the saved format, whoever wrote them."""
    if not os.path.isdir(folder):
        return []
    names = sorted(os.listdir(folder))
    for inner in ("additional_chat_templates", ADAPTER_FOLDER):
        place = os.path.join(folder, inner)
        names += [f"{inner}/{name}" for name in sorted(os.listdir(place))] if os.path.isdir(place) else []
    return [name for name in names if SAVED_NAMES.fullmatch(name)]


def owned_files(folder: str) -> set[str]:
    """Return the files in `folder` that runs of this program wrote, by their path within it."""
    if not is_run_folder(folder):
        return set()
    listed = _read_list(folder)
    if listed is not None:
        names = {*listed["files"]} - {*_changed(folder, listed)}
    else:
        names = {name for name in saved_names(folder) if name != CARD or _is_own_card(os.path.join(folder, CARD))}
    return names | {PICTURE}  # drawn whenever a run ends, before it is saved with a model


def changed_files(folder: str) -> list[str]:
    """Return the files in `folder` that a run wrote and somebody has changed or replaced since; sorted."""
    listed = _read_list(folder)
    return [] if listed is None else _changed(folder, listed)


def _changed(folder: str, listed: dict) -> list[str]:
    """Return what is listed and is not as it was written; lists of earlier versions know it of the card alone."""
    changed = [
        name
        for name, marks in listed.get("marks", {}).items()
        if name != PICTURE and os.path.isfile(os.path.join(folder, name)) and _mark(folder, name) not in marks
    ]
    if CARD in listed["files"] and _card_checksum(folder) not in listed["cards"]:
        changed.append(CARD)
    return sorted(changed)


def _mark(folder: str, name: str) -> str:
    """Return a hash of a file's size and of samples of its bytes: enough to tell another save of it."""
    return files_fingerprint([os.path.join(folder, name)])


def is_run_folder(folder: str) -> bool:
    """Whether a run of this program wrote into `folder`: its list is there, or its run.json."""
    return _read_list(folder) is not None or {"status", "arguments", "starts"} <= read_run_file(folder).keys()


def record_files(folder: str, names: Iterable[str], work: str | None = None) -> None:
    """Write the list of what runs have written in `folder`, or are about to move there from `work`."""
    places = [place for place in (folder, work) if place is not None]
    cards = [_card_checksum(place) for place in places]
    marks = {
        name: [_mark(place, name) for place in places if os.path.isfile(os.path.join(place, name))]
        for name in sorted(names)
        if name not in (CARD, PICTURE)
    }
    content = {"format": FORMAT, "files": sorted(names), "cards": cards, "marks": marks}
    write_json(os.path.join(folder, LIST), content)


def withdraw_list(folder: str) -> None:
    """Remove the list of a folder in which no run has written anything."""
    listed = _read_list(folder)
    if listed is not None and not {*listed["files"]} - {PICTURE} and not os.path.exists(os.path.join(folder, RUN_FILE)):
        os.remove(os.path.join(folder, LIST))


def place_files(work: str, folder: str, last: str) -> None:
    """Move the complete files of `work` into `folder`, in place of what runs wrote there before; `work` is removed.

    What an earlier save left and this one lacks (another tokenizer's files, further shards, an adapter) is removed.

    Args:
        last: the file without which no reader takes the folder: removed first, moved in last.
    """
    sync_tree(work)
    new, owned = list_files(work), owned_files(folder)
    _clear_the_way(folder, new, owned)
    record_files(folder, owned.union(new), work)  # a run that is killed here leaves a list that has both
    for name in sorted(owned, key=lambda name: name != last):
        if name == last or name not in (*new, PICTURE):
            _remove(folder, name)
    _move_in(work, folder, new, last)
    record_files(folder, new)


def place_over(work: str, folder: str, last: str) -> None:
    """Move the complete files of `work` over those of their names in `folder`, weights over weights; makes no list.

    For folders that a caller fills in several steps. A list that is there is kept up to date.
    """
    sync_tree(work)
    new = list_files(work)
    present = [name for name in saved_names(folder) if WEIGHT_NAMES.fullmatch(name)]
    stale = {name for name in present if name not in new} if any(map(WEIGHT_NAMES.fullmatch, new)) else set()
    if _read_list(folder) is not None:
        record_files(folder, owned_files(folder) - stale | set(new), work)
    for name in (*(name for name in new if name == last), *stale):
        _remove(folder, name)
    _move_in(work, folder, new, last)


def set_aside(path: str) -> str:
    """Rename somebody else's file or folder that is in the way, and print it; returns its new name."""
    kept = _unused_name(path)
    os.rename(path, kept)
    say(f"{path} was not written by this program: it is kept as {os.path.basename(kept)}")
    return kept


def keep_foreign(folder: str, owned: set[str]) -> None:
    """Move what is not `owned` out of a folder that is about to be removed, to `NAME.kept` beside it, and print it."""
    foreign = [name for name in list_files(folder) if name not in owned]
    if not foreign:
        return
    kept = _unused_name(folder)
    for name in foreign:
        os.renames(os.path.join(folder, name), os.path.join(kept, name))
    say(f"Files in {folder} that no run wrote are kept in {os.path.basename(kept)}: {', '.join(foreign[:5])}")


def _unused_name(path: str) -> str:
    """Return `path`.kept, with a number if there is one already."""
    number, kept = 1, f"{path}.kept"
    while os.path.lexists(kept):
        number += 1
        kept = f"{path}.kept-{number}"
    return kept


def _read_list(folder: str) -> dict | None:
    """Return the list of a folder, None where there is none that can be read."""
    try:
        with open(os.path.join(folder, LIST), encoding="utf-8") as file:
            found = json.load(file)
        if not (isinstance(found["files"], list) and isinstance(found["cards"], list)):
            return None
        inside = [name for name in found["files"] if not os.path.isabs(name) and ".." not in name.split("/")]
        marks = found.get("marks", {})
        marks = {name: marks[name] for name in inside if isinstance(marks, dict) and isinstance(marks.get(name), list)}
        return {**found, "files": inside, "marks": marks}  # a list from elsewhere must not reach outside the folder
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _card_checksum(folder: str) -> int | None:
    """Return a checksum of the model card, which people edit: an edited one is theirs. None where there is none."""
    try:
        with open(os.path.join(folder, CARD), "rb") as file:
            return zlib.crc32(file.read())
    except OSError:
        return None


def _is_own_card(path: str) -> bool:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, ValueError):
        return False
    return all(mark in text for mark in CARD_MARKS)


def _clear_the_way(folder: str, new: list[str], owned: set[str]) -> None:
    """Set aside what others put where new files go: a file, or something else in place of a folder."""
    for name in new:
        parent, path = os.path.dirname(name), os.path.join(folder, name)
        place = os.path.join(folder, parent)
        if parent and os.path.lexists(place) and not os.path.isdir(place):
            set_aside(place)
        if os.path.lexists(path) and name not in owned:
            set_aside(path)


def _move_in(work: str, folder: str, new: list[str], last: str) -> None:
    for name in sorted(new, key=lambda name: name == last):
        target = os.path.join(folder, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.lexists(target):  # renaming one link of a file over another would leave both
            os.remove(target)
        os.replace(os.path.join(work, name), target)
    sync(folder)
    shutil.rmtree(work)


def _remove(folder: str, name: str) -> None:
    """Remove one file of ours, and its sub-folder if that is empty then."""
    path = os.path.join(folder, name)
    if os.path.lexists(path):
        os.remove(path)
    parent = os.path.dirname(name)
    place = os.path.join(folder, parent)
    if parent and os.path.isdir(place) and not os.listdir(place):
        os.rmdir(place)
