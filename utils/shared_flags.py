"""The arguments that main.py and prompt_eval.py share: what decides the samples must read alike in both.

No library is imported here: `--help` answers at once.
"""

from collections.abc import Callable
from typing import Any

from utils.notation import default_cache_folder

SHARED: dict[str, dict[str, Any]] = {
    "data_split": {"metavar": "A,B,C"},
    "sft_only_data_path": {"nargs": "*", "default": [], "metavar": "NAME"},
    "eval_data_path": {"nargs": "*", "default": [], "metavar": "NAME"},
    "columns": {"metavar": "ROLE=COLUMN,..."},
    "chat_template": {"default": "auto", "metavar": "FORMAT"},
    "template_date": {"metavar": "YYYY-MM-DD"},
    "data_output_path": {"default": default_cache_folder(), "metavar": "DIR"},
    "max_seq_len": {"type": int, "default": 512, "metavar": "TOKENS"},
    "overlong": {"choices": ["truncate", "drop", "error"], "default": "truncate"},
    "add_eot_token": {"action": "store_true"},
    "eot_token": {"default": "<|endoftext|>", "metavar": "TOKEN"},
    "completion_only_loss": {"action": "store_true"},
    "train_turns": {"choices": ["all", "last"], "default": "all"},
    "seed": {"type": int, "default": 1234, "metavar": "N"},
    "dtype": {"choices": ["auto", "bf16", "fp16", "fp32"], "default": "auto"},
    "trust_remote_code": {
        "action": "store_true",
        "help": "run the Python code that a model brings with it (auto_map in its config.json); off, since such code "
        "can do anything: read it first",
    },
}


def add_shared(add: Callable[..., Any], name: str, help: str | None = None) -> None:
    """Add the argument `--name`, with the words of the program where its own say more."""
    add(f"--{name}", **SHARED[name], **({"help": help} if help else {}))
