"""Keep README.md's tables of arguments as the parsers have them: main.py's and prompt_eval.py's.

Without an argument the tables between their markers are written anew; with `--check` nothing is changed and the
exit status is 1 when one is out of date.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
# Where a table begins -> the module with its parser.
BEGINS = {
    "<!-- arguments: written by tools/argument_table.py -->": "utils.args",
    "<!-- prompt_eval.py: written by tools/argument_table.py -->": "utils.eval_args",
}
END = "<!-- end of arguments -->"
# DeepSpeed's own, under its former name; they do what --deepspeed and --deepspeed_config do.
FORMER_NAMES = {"--deepscale", "--deepscale_config"}


def shown_default(action: argparse.Action) -> str:
    """The default as one would type it; the cache folder as it is on any machine."""
    value = action.default
    if isinstance(action, argparse._StoreTrueAction):
        return "off"
    if action.required:
        return "required"
    if action.dest == "data_output_path":
        return "`~/.cache/sft_scripts`"
    if value is None:
        return "none"
    if isinstance(value, (list, tuple)):
        return " ".join(f"`{item}`" for item in value) or "none"
    return f"`{getattr(value, 'value', value)}`".replace("|", "\\|")


def shown_name(action: argparse.Action) -> str:
    """The flag, and what follows it."""
    flag = max(action.option_strings, key=len)
    if action.nargs == 0:
        return f"`{flag}`"
    if action.choices and action.metavar is None:
        following = "{" + ",".join(str(getattr(choice, "value", choice)) for choice in action.choices) + "}"
    else:
        following = str(action.metavar or action.dest.upper())
    return f"`{flag} {following}{' ...' if action.nargs in ('*', '+') else ''}`".replace("|", "\\|")


def rows(parser: argparse.ArgumentParser) -> list[tuple[str, str, str, str]]:
    """(group, flag, default, meaning) of every argument, in the parser's order."""
    found = []
    for group in parser._action_groups:
        for action in group._group_actions:
            if "--help" in action.option_strings or FORMER_NAMES & set(action.option_strings):
                continue
            meaning = " ".join((action.help or "").replace("%%", "%").split()).replace("|", "\\|")
            found.append((group.title or "", shown_name(action), shown_default(action), meaning))
    return found


def table(parser: argparse.ArgumentParser) -> str:
    """The Markdown between the markers."""
    lines, group = [], None
    for title, flag, default, meaning in rows(parser):
        if title != group:
            group = title
            lines += ["", f"**{title}**", "", "| argument | default | meaning |", "| --- | --- | --- |"]
        lines.append(f"| {flag} | {default} | {meaning} |")
    return "\n".join(lines).strip() + "\n"


def with_tables(readme: str) -> str:
    """`readme` with every table as its parser has it now."""
    for begin, module in BEGINS.items():
        before, rest = readme.split(begin)
        new = table(importlib.import_module(module).build_parser())
        readme = f"{before}{begin}\n{new}{END}{rest.split(END, 1)[1]}"
    return readme


def main() -> int:
    """Entry point."""
    options = argparse.ArgumentParser(description="Keep README.md's tables of arguments up to date.")
    options.add_argument("--check", action="store_true", help="change nothing, only tell")
    check = options.parse_args().check
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # no looking for devices, for a list of names
    old = README.read_text(encoding="utf-8")
    new = with_tables(old)
    if new == old:
        return 0
    if check:
        print("README.md's tables of arguments are out of date: run python tools/argument_table.py", file=sys.stderr)
        return 1
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
