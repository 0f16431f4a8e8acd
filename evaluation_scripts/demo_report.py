"""The demo's last page: perplexity before and after, where the picture is, and answers side by side.

    python evaluation_scripts/demo_report.py OUTPUT

OUTPUT holds a run's metrics.jsonl, and in report/ what prompt_eval.py wrote about the prompts below.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
EVERY = 25  # of the 200 evaluation records one in so many is asked
WIDTH = 88


class Answers(NamedTuple):
    """The greedy answers of the two models to one question, each on one line."""

    before: str
    after: str


def demo_records() -> list[dict[str, str]]:
    """The evaluation records the demo asks: none of them is in the training data."""
    return json.loads((ROOT / "data" / "eval.json").read_text(encoding="utf-8"))[::EVERY]


def demo_prompts() -> list[str]:
    """Their prompts, with the space in front that the `local/jsonfile` data set trains with."""
    return [f" {record['prompt']}" for record in demo_records()]


def read_answers(output: Path) -> list[Answers]:
    """The two models' greedy answers to each prompt, in the prompts' order."""
    lines = (output / "report" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    greedy = [record for record in map(json.loads, lines) if record["strategy"] == "greedy"]
    by_model = {
        model: [" ".join(record["answer"].split()) for record in greedy if record["model"] == model]
        for model in ("baseline", "finetuned")
    }
    return [Answers(*pair) for pair in zip(*by_model.values(), strict=True)]


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
    answers = read_answers(output)
    lines, right = [], 0
    for record, (before, after) in zip(demo_records(), answers, strict=True):
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
            f"losses: {output / 'loss.png'}    model: {output}",
            f"report: {output / 'report' / 'report.html'} (open it in a browser; report.md is the same as text)",
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
