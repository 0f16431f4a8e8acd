"""`--config` and `--like`: arguments from a file, or those of an earlier run. What is typed beside them wins.

The arguments of a file become words of a command line, put before those that were typed, so that one parser reads
and checks both.
"""

import argparse
import difflib
import json
import os
from typing import Any, NamedTuple

import yaml

from utils.errors import UserError
from utils.files import RUN_FILE

# What belongs to one start of the program, and not to what it computes.
OF_ONE_START = ("output_dir", "resume_from_checkpoint", "resume_anyway", "dry_run", "local_rank", "config", "like")
ON = ("true", "yes", "on")
OFF = ("false", "no", "off")
NOTHING = ("", "null", "~")  # YAML's
NEGATION = "--no_"


class Given(NamedTuple):
    """The arguments of a file."""

    origin: str  # as messages name it
    values: dict[str, Any]  # by the name of the argument; text, numbers, booleans, None, or lists of these
    left_out: tuple[str, ...] = ()  # names that stand in the file and are not taken


def merged_words(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the command line with the arguments of `--like` and `--config` before those of `argv`.

    A switch that a file turns on is turned off by `--no_SWITCH`.

    Returns:
        The words, and one line on each file.

    Raises:
        UserError: a file can't be read, or holds an unknown argument or a wrong value.
    """
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    off = {name for name in actions if _is_switch(actions[name]) and NEGATION + name in argv}
    typed = [word for word in argv if word not in {NEGATION + name for name in off}]
    files, _ = _file_parser().parse_known_args(typed)
    found = [read_run(files.like, actions)] if files.like else []
    found += [read_config(files.config)] if files.config else []
    words, lines = [], []
    for given in found:
        values = {name: value for name, value in given.values.items() if name not in off}
        own = _words(given, values, actions)
        _check_alone(parser, given, own)
        words += own
        lines.append(_described(given, values))
    return words + typed, lines


def read_config(path: str) -> Given:
    """Return the arguments of a YAML or JSON file, a mapping of names without dashes.

    YAML's values stay text, so that `no` and `1e-5` mean what they mean on the command line.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        values = _from_json(text) if path.endswith(".json") else yaml.load(text, _Yaml)
    except (OSError, ValueError, yaml.YAMLError) as err:
        raise UserError(f"--config {path} can't be read: {' '.join(str(err).split())}.") from err
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must hold a mapping of arguments, such as `learning_rate: 1e-5` in a line.")
    return Given(f"--config {path}", {str(name).lstrip("-").replace("-", "_"): value for name, value in values.items()})


def read_run(folder: str, actions: dict[str, argparse.Action]) -> Given:
    """Return the arguments of the run that wrote `folder`, as far as they are not the defaults."""
    path = os.path.join(folder, RUN_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            values = dict(json.load(file)["arguments"])
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise UserError(
            f"--like {folder}: there is no {RUN_FILE} of a run in it ({type(err).__name__}): give the --output_dir of "
            "a run."
        ) from err
    # An argument that this version no longer has stays, and is refused like any unknown one.
    set_ = {name: value for name, value in values.items() if name not in actions or value != actions[name].default}
    left_out = tuple(name for name in OF_ONE_START if name in set_)
    return Given(f"--like {folder}", {name: value for name, value in set_.items() if name not in left_out}, left_out)


class _Yaml(yaml.BaseLoader):
    """Every scalar as the text that stands there, and no name twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        _refuse_twice(names)
        return super().construct_mapping(node, deep)


def _from_json(text: str) -> Any:
    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_twice([name for name, _ in pairs])
        return dict(pairs)

    return json.loads(text, object_pairs_hook=mapping, parse_float=str, parse_int=str)


def _refuse_twice(names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} stands there twice")


def _file_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--like")
    return parser


def _words(given: Given, values: dict[str, Any], actions: dict[str, argparse.Action]) -> list[str]:
    """Return the values as words of a command line."""
    words = []
    for name, value in values.items():
        action = actions.get(name)
        if action is None or name in ("config", "like"):
            near = difflib.get_close_matches(name, actions, n=1)
            advice = f": is --{near[0]} meant?" if near and near[0] != name else "."
            raise UserError(f"{given.origin}: there is no argument {name!r} to set{advice}")
        words += _words_of(given, name, value, action)
    return words


def _words_of(given: Given, name: str, value: Any, action: argparse.Action) -> list[str]:
    flag = f"--{name}"
    plain = value.lower() if isinstance(value, str) else value
    if action.nargs == "*":
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, (list, dict)) for item in items) or None in items[1:]:
            raise UserError(f"{given.origin}: {name} must be one value or a list of values, not {value!r}.")
        return [] if plain is None or plain in NOTHING else [flag, *map(str, items)]
    if isinstance(value, (list, dict)):
        raise UserError(f"{given.origin}: {name} takes one value, not {value!r}.")
    if plain is None or plain in NOTHING:
        return []
    if _is_switch(action):
        if plain in (True, False) or plain in ON + OFF:
            return [flag] if plain is True or plain in ON else []
        raise UserError(f"{given.origin}: {name} is a switch: write true or false, not {value!r}.")
    if action.nargs == "?" and (plain is True or plain in ON):
        return [flag]
    if isinstance(value, bool):
        raise UserError(f"{given.origin}: {name} takes a value, not {str(value).lower()}.")
    return [f"{flag}={value}"]


def _is_switch(action: argparse.Action) -> bool:
    return action.nargs == 0 and action.const is True


def _check_alone(parser: argparse.ArgumentParser, given: Given, words: list[str]) -> None:
    """Parse the words of one file by themselves, so that a wrong value is blamed on the file that holds it."""
    alone = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for action in parser._actions:
        if action.dest != "help":
            options = {"nargs": action.nargs, "type": action.type, "choices": action.choices, "const": action.const}
            if _is_switch(action):
                options = {"action": "store_true"}
            alone.add_argument(*action.option_strings, dest=action.dest, **options)
    try:
        _, unread = alone.parse_known_args(words)
    except argparse.ArgumentError as err:
        raise UserError(f"{given.origin}: {err}.") from err
    if unread:
        raise UserError(f"{given.origin}: {' '.join(unread)} can't be read.")


def _described(given: Given, values: dict[str, Any]) -> str:
    named = ", ".join(f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
                      for name, value in values.items())  # fmt: skip
    left_out = f"; not taken: {', '.join(given.left_out)}" if given.left_out else ""
    return f"{given.origin}: {named or 'nothing but defaults'}{left_out}; what is typed beside it wins"
