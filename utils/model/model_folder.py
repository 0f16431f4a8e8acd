"""What can be seen of a model's folder without reading its configuration or its weights."""

from __future__ import annotations

import json
import os

from transformers.utils import cached_file

from utils.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
# Adapters of PEFT that stand before the model or between its layers, and change no weight.
NO_WEIGHTS = (
    "PREFIX_TUNING", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
)  # fmt: skip
LFS_POINTER = b"version https://git-lfs"


def check_files(name: str) -> None:
    """Check what can be seen of a folder without reading its configuration; a name on the hub is not looked up.

    Raises:
        UserError: files are git-lfs pointers, or the folder is an adapter.
    """
    if not os.path.isdir(name):
        return
    pointers = [file for file in sorted(os.listdir(name)) if _is_lfs_pointer(os.path.join(name, file))]
    if pointers:
        raise UserError(
            f"{len(pointers)} of the files in {name} are git-lfs pointers, a few lines of text in place of their "
            f"content ({', '.join(pointers[:3])}): run `git lfs install && git lfs pull` in that folder."
        )
    _check_generation(name)
    if os.path.isfile(os.path.join(name, ADAPTER_CONFIG)):
        raise adapter_error(name, os.path.join(name, ADAPTER_CONFIG))


def _check_generation(folder: str) -> None:
    """Refuse a generation_config.json that is no JSON object, which transformers passes over, or that it can't take."""
    path = os.path.join(folder, "generation_config.json")
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as err:
        raise UserError(f"{path} can't be read as JSON ({err}): mend it, or take it away.") from err
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: mend it, or take it away.")
    from transformers import GenerationConfig  # imports what most checks do without

    try:
        GenerationConfig.from_dict(content)
    except Exception as err:  # of many kinds, by the value
        reason = " ".join(str(err).split())[:300]
        raise UserError(f"{path} can't be used ({reason}): mend it, or take it away.") from err


def adapter_error(name: str, path: str) -> UserError:
    """Return the error for an adapter given as a model; `path` is its configuration."""
    try:
        with open(path, encoding="utf-8") as file:
            adapter = json.load(file)
        base, kind = adapter.get("base_model_name_or_path"), str(adapter.get("peft_type"))
        base = base if isinstance(base, str) else None
    except (OSError, ValueError, AttributeError):
        base, kind = None, ""
    words = f"{name} is a PEFT adapter of {base or 'a base model that it does not name'}, not a model"
    if kind in NO_WEIGHTS:
        return UserError(
            f"{words}: it is of the kind {kind}, learned inputs that can't be merged into weights, so that training "
            "can't go on from it here. Give the base model."
        )
    source = "" if base else ', with the model it was trained on as "base_model_name_or_path" in its configuration'
    if base and base.startswith(("/", ".", "~")) and not os.path.isdir(base):
        source = f', once "base_model_name_or_path" in {ADAPTER_CONFIG} says where that is now: {base} is not there'
    return UserError(
        f"{words}: merge it into a folder of its own and give that{source}. "
        f"`pip install peft`, then in Python: from peft import AutoPeftModelForCausalLM as M; "
        f'M.from_pretrained("{name}").merge_and_unload().save_pretrained("MERGED"); and copy the tokenizer there.'
    )


def adapter_on_hub(name: str) -> str | None:
    """Return the local path of a hub repository's adapter configuration; None where it has none or can't be asked."""
    try:
        return cached_file(name, ADAPTER_CONFIG, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None


def _is_lfs_pointer(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False
