"""Models in a form that is not read here: where the right one is, or what the files in a folder are."""

from __future__ import annotations

import os
import re

DEPTH = 3  # of sub-folders looked into: the cache of the hub keeps a model in snapshots/COMMIT
# Names of files or folders, whose they are, and what to do.
FORMATS = (
    (r".*\.gguf", "llama.cpp's (GGUF), made for answering", "give the model they were made from"),
    (
        r"consolidated(\.\d+)?\.(pth|safetensors)|consolidated-\d+-of-\d+\.safetensors",
        "in its publisher's own format",
        "give the copy in transformers' format, or convert them with the script that transformers has for the family",
    ),
    (
        r"global_step\d+|zero_to_fp32\.py|mp_rank_\d+_model_states\.pt|.*zero_pp_rank_.*_states\.pt",
        "a checkpoint of DeepSpeed",
        "`python zero_to_fp32.py FOLDER MODEL_FOLDER --safe_serialization` in it writes weights; add the model's "
        "config.json and tokenizer to them",
    ),
    (
        r"pytorch_model_fsdp_\d+|__\d+_\d+\.distcp|\.metadata|rank\d+\.pt",
        "a sharded checkpoint of PyTorch",
        "merge it with `accelerate merge-weights FOLDER MODEL_FOLDER`",
    ),
    (
        r"tf_model.*\.h5|flax_model.*\.msgpack|model\.ckpt.*",
        "TensorFlow's or Flax's",
        "give the copy with safetensors, or convert them with an older transformers (from_tf, from_flax)",
    ),
    (r".*\.onnx", "ONNX's, made for answering", "give the model they were made from"),
    (
        r".*\.safetensors|pytorch_model.*\.bin|.*model.*\.pth?",
        "not under the names that transformers reads",
        "rename a single file to model.safetensors (or pytorch_model.bin); several need their .index.json",
    ),
)  # fmt: skip


def weights_of_another_kind(folder: str) -> str:
    """Return a sentence on the weights of another form that lie in a folder, and what to do; "" where there are none.

    It begins with a colon, to follow words on what is missing.
    """
    names = sorted(os.listdir(folder))
    for pattern, whose, advice in FORMATS:
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found:
            return f": the weights there ({', '.join(found[:3])}) are {whose}; {advice}"
    return ""


def folder_below(folder: str) -> str | None:
    """Return the first folder below that holds a model's config.json beside weights; None where there is none."""
    base = os.path.abspath(folder).rstrip("/").count("/")
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(folders) if os.path.abspath(parent).count("/") - base < DEPTH else []
        has_weights = any(name.endswith((".safetensors", ".bin")) for name in names)
        if parent != folder and "config.json" in names and has_weights:
            return parent
    return None
