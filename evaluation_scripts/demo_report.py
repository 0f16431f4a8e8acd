"""The demo's last page: perplexity before and after, where the picture is, and answers side by side.

    python evaluation_scripts/demo_report.py OUTPUT

OUTPUT holds a run's metrics.jsonl and answers.txt, what prompt_eval.py printed for the prompts below.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
EVERY = 25  # of the 200 evaluation records one in so many is asked
WIDTH = 88
# What prompt_eval.py prints before each answer.
HEADING = re.compile(r"^==========(Baseline|finetune): Greedy=========$", re.MULTILINE)
PROMPT_END = re.compile(r"^=+prompt end=+$", re.MULTILINE)


class Answers(NamedTuple):
    """One question as asked, and the texts the two models made of it."""

    before: str
    after: str


def demo_records() -> list[dict[str, str]]:
    """The evaluation records the demo asks: none of them is in the training data."""
    return json.loads((ROOT / "data" / "eval.json").read_text(encoding="utf-8"))[::EVERY]


def demo_prompts() -> list[str]:
    """Their prompts, with the space in front that the `local/jsonfile` data set trains with."""
    return [f" {record['prompt']}" for record in demo_records()]


def read_answers(printed: str) -> list[Answers]:
    """The two models' texts for each prompt, from what prompt_eval.py printed."""
    found = []
    for block in PROMPT_END.split(printed)[:-1]:
        parts = HEADING.split(block)
        by_name = dict(zip(parts[1::2], parts[2::2], strict=True))
        found.append(Answers(by_name["Baseline"], by_name["finetune"]))
    return found


def one_line(text: str, prompt: str) -> str:
    """The answer without its prompt, on one line."""
    return " ".join(text.split()).removeprefix(" ".join(prompt.split())).strip()


def shortened(line: str) -> str:
    """At most `WIDTH` characters: an untrained model does not know when to stop."""
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"


def report(output: Path) -> str:
    """The whole page."""
    evaluations = [
        record
        for record in map(json.loads, (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        if "perplexity" in record
    ]
    answers = read_answers((output / "answers.txt").read_text(encoding="utf-8"))
    lines, right = [], 0
    for record, prompt, pair in zip(demo_records(), demo_prompts(), answers, strict=True):
        before, after = one_line(pair.before, prompt), one_line(pair.after, prompt)
        right += after == record["chosen"]
        question = record["prompt"].removeprefix("Human: ").removesuffix(" Assistant:")
        lines += [f"  question  {question}", f"  before    {shortened(before)}", f"  after     {shortened(after)}"]
        lines += [f"  expected  {record['chosen']}"] * (after != record["chosen"]) + [""]
    return "\n".join(
        [
            "",
            "========== answers before and after training ==========",
            "",
            *lines,
            f"{right} of {len(answers)} answers are the expected ones to the letter; training held these facts, "
            "not these questions",
            f"perplexity on held-out data: {evaluations[0]['perplexity']:.1f} before, "
            f"{evaluations[-1]['perplexity']:.2f} after {evaluations[-1]['step']} optimizer steps",
            f"losses: {output / 'loss.png'}    whole answers: {output / 'answers.txt'}    model: {output}",
        ]
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="The demo's last page.")
    parser.add_argument("output", nargs="?", type=Path, help="folder of the run")
    parser.add_argument("--prompts", action="store_true", help="print the prompts to ask, one a line, and stop")
    args = parser.parse_args()
    if args.prompts:
        print("\n".join(demo_prompts()))
    elif args.output is None:
        parser.error("the folder of the run is needed")
    else:
        print(report(args.output))


if __name__ == "__main__":
    main()
