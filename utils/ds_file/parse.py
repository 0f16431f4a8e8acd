"""Parse the text of a DeepSpeed configuration: JSON, or Hjson, which DeepSpeed itself reads."""

import json
import re
from collections.abc import Callable
from typing import Any

from utils.errors import UserError


def read_object(path: str) -> dict[str, Any]:
    """Return the JSON object in a file; UserError where it holds none, or one key twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"--deepspeed_config {path} has {', '.join(twice)} twice in one object: leave one.")
        return dict(pairs)

    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        config = _parsed(text, once)
    except (OSError, ValueError, RecursionError) as err:
        raise UserError(f"--deepspeed_config {path} can't be read as JSON: {err}") from err
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed_config {path} must hold one JSON object, not a {type(config).__name__}.")
    return config


def _parsed(text: str, once: Callable[[list[tuple[str, Any]]], dict[str, Any]]) -> Any:
    """Return what a text in JSON holds, or in Hjson, JSON with comments, which is what DeepSpeed itself reads.

    Of Hjson only what begins as an object: a text without braces is another format, in which values would be misread.

    Raises:
        ValueError: it is neither; the words are those of the JSON's error.
    """
    try:
        return json.loads(text, object_pairs_hook=once)
    except ValueError:
        import hjson  # comes with DeepSpeed

        try:
            config = hjson.loads(text, object_pairs_hook=once)
        except ValueError:
            config = None
        bare = re.sub(r"(#|//)[^\n]*|/\*.*?\*/|\s", "", text, flags=re.DOTALL)
        if not isinstance(config, dict) or not bare.startswith("{"):
            raise
        return config
