"""Write the tables of arguments in docs/arguments.md from the parsers of main.py and prompt_eval.py.

Without an argument, the tables between their markers are rewritten. With `--check` nothing is changed, and the exit
status is 1 when a table is out of date.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "arguments.md"
# The marker before a table -> the module with its parser.
BEGINS = {
    "<!-- main.py: written by tools/argument_table.py -->": "utils.arguments.parser",
    "<!-- prompt_eval.py: written by tools/argument_table.py -->": "utils.prompt_eval.arguments",
}
END = "<!-- end of arguments -->"
# DeepSpeed's former names of --deepspeed and --deepspeed_config.
FORMER_NAMES = {"--deepscale", "--deepscale_config"}


def shown_default(action: argparse.Action) -> str:
    """Return the default as one would type it; the cache folder is shown relative to the home folder."""
    value = action.default
    if isinstance(value, bool):
        return "on" if value else "off"
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
    """Return the flag, in the first of its spellings, and its value's name or choices."""
    flag = action.option_strings[0]
    if action.nargs == 0:
        return f"`{flag}`"
    if action.choices and action.metavar is None:
        following = "{" + ",".join(str(getattr(choice, "value", choice)) for choice in action.choices) + "}"
    else:
        following = str(action.metavar or action.dest.upper())
    return f"`{flag} {following}{' ...' if action.nargs in ('*', '+') else ''}`".replace("|", "\\|")


def rows(parser: argparse.ArgumentParser) -> list[tuple[str, str, str, str]]:
    """Return (group, flag, default, meaning) of every argument, in the parser's order."""
    found = []
    for group in parser._action_groups:
        for action in group._group_actions:
            if "--help" in action.option_strings or FORMER_NAMES & set(action.option_strings):
                continue
            meaning = " ".join((action.help or "").replace("%%", "%").split()).replace("|", "\\|")
            found.append((group.title or "", shown_name(action), shown_default(action), meaning))
    return found


def table(parser: argparse.ArgumentParser) -> str:
    """Return the Markdown between the markers."""
    lines, group = [], None
    for title, flag, default, meaning in rows(parser):
        if title != group:
            group = title
            lines += ["", f"**{title}**", "", "| argument | default | meaning |", "| --- | --- | --- |"]
        lines.append(f"| {flag} | {default} | {meaning} |")
    return "\n".join(lines).strip() + "\n"


def with_tables(page: str) -> str:
    """Return `page` with every table as its parser has it now."""
    for begin, module in BEGINS.items():
        before, rest = page.split(begin)
        new = table(importlib.import_module(module).build_parser())
        page = f"{before}{begin}\n{new}{END}{rest.split(END, 1)[1]}"
    return page


def main() -> int:
    """Entry point."""
    options = argparse.ArgumentParser(description="Write the tables of docs/arguments.md from the parsers.")
    options.add_argument("--check", action="store_true", help="change nothing; exit status 1 if a table is old")
    check = options.parse_args().check
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # a list of names needs no search for devices
    old = PAGE.read_text(encoding="utf-8")
    new = with_tables(old)
    if new == old:
        return 0
    if check:
        print("docs/arguments.md is out of date: run python tools/argument_table.py", file=sys.stderr)
        return 1
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
