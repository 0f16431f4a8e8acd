"""Checks of the places that a run reads and writes: output folder, temporary files, model folder."""

import errno
import os
import tempfile

from transformers import PretrainedConfig

from utils.distributed.launchers import launched_rank
from utils.errors import UserError
from utils.files import similar_folder
from utils.logging.console import say
from utils.model.model_folder import check_files
from utils.model.model_utils import has_weights, load_model_config
from utils.model.other_formats import folder_below, weights_of_another_kind

TEMPORARY_BYTES = 50 * 10**6


def check_writable(folder: str, argument: str) -> bool:
    """Try to write where `folder` is or would be made."""
    _check_name(folder, argument)
    existing = os.path.abspath(folder)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    try:
        with tempfile.TemporaryFile(dir=existing):
            return True
    except OSError as err:
        raise UserError(f"{argument} {folder} can't be written ({err}): give a folder you may write to.") from err


def _check_name(folder: str, argument: str) -> None:
    """Check that a folder's name is what its user meant: no ~ that the shell left, no link that leads nowhere."""
    first = folder.split("/")[0]
    if first.startswith("~") and not os.path.exists(first):
        raise UserError(
            f"{argument} {folder}: the shell has not put a home folder in place of {first}, which it does at the "
            f"beginning of a word only: give {os.path.expanduser(folder)}."
        )
    if os.path.islink(folder) and not os.path.exists(folder):
        raise UserError(f"{argument} {folder} is a link to {os.readlink(folder)}, which is not there.")
    try:
        folder.encode()
    except UnicodeEncodeError as err:
        name = os.fsencode(folder)
        try:
            name.decode()
            advice = "with this locale Python can't read it: set LC_ALL=C.UTF-8 (or PYTHONUTF8=1), or give another name"
        except UnicodeDecodeError:
            advice = "it is no UTF-8 text: give another name"
        raise UserError(f"{argument} {name!r}: {advice}.") from err


def check_temporary_folder() -> bool:
    """Try to reserve as much in the folder of temporary files as the largest tokenizers take there; returns True."""
    wanted = os.environ.get("TMPDIR", "/tmp")
    try:
        with tempfile.TemporaryFile() as file:
            _reserve(file.fileno(), TEMPORARY_BYTES)
        folder = tempfile.gettempdir()
    except OSError as err:
        raise UserError(
            f"the folder of temporary files, {wanted}, can't take {TEMPORARY_BYTES // 10**6} MB ({err}): make room, or "
            "set the variable TMPDIR to another folder."
        ) from err
    if launched_rank() == 0 and os.path.realpath(folder) != os.path.realpath(wanted):
        say(f"Temporary files: in {folder}, since TMPDIR {wanted} can't be written")
    return True


def _reserve(file: int, size: int) -> None:
    """Reserve so many bytes in an open file, where the system can; raises OSError where there is no room."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as err:
        if err.errno != errno.EFBIG:  # a limit on the size of one file, which most tokenizers stay below
            raise


def check_model_folder(name: str, needs_weights: bool) -> PretrainedConfig:
    """Return the model's configuration; UserError where its folder is not complete or its name is not known."""
    if os.path.isdir(name):
        check_files(name)
        files = os.listdir(name)
        if "config.json" not in files:
            raise UserError(
                f"no config.json in the model folder {name}: give a complete model folder or a hub name.{_hint(name)}"
            )
        if needs_weights and not has_weights(name):
            found = weights_of_another_kind(name) or ": it is not complete"
            raise UserError(f"no weights (*.safetensors or *.bin) in the model folder {name}{found}.")
        return load_model_config(name)
    try:
        return load_model_config(name)
    except UserError as err:
        raise UserError(f"{name} is no folder{similar_folder(name)}, and as a name on the hub: {err}") from err


def _hint(folder: str) -> str:
    """Return a sentence on the model below a folder, or on the files in it; nothing where there is none."""
    below = folder_below(folder)
    if below is not None:
        return f" There is one in {below}."
    found = weights_of_another_kind(folder)
    return f" The{found.removeprefix(': the')}." if found else ""
