"""The closing page of the demo: answers side by side, perplexity before and after, and the paths of all results.

    python evaluation_scripts/demo_report.py OUTPUT

OUTPUT holds a run's metrics.jsonl, and in report/ the answers of prompt_eval.py to the prompts of `demo_prompts`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
EVERY = 25  # every 25th of the 200 evaluation records is asked
WIDTH = 88


class Answers(NamedTuple):
    """The two models' greedy answers to one question, each as one line."""

    before: str
    after: str


def demo_records() -> list[dict[str, str]]:
    """Return the evaluation records that the demo asks; none of them is in the training data."""
    return json.loads((ROOT / "data" / "eval.json").read_text(encoding="utf-8"))[::EVERY]


def demo_prompts() -> list[str]:
    """Return the prompts of `demo_records`, each after a space, as the `local/jsonfile` data set trains them."""
    return [f" {record['prompt']}" for record in demo_records()]


def read_answers(output: Path) -> list[Answers]:
    """Return the two models' greedy answers to each prompt, in the prompts' order."""
    lines = (output / "report" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    greedy = [record for record in map(json.loads, lines) if record["strategy"] == "greedy"]
    by_model = {
        model: [" ".join(record["answer"].split()) for record in greedy if record["model"] == model]
        for model in ("baseline", "finetuned")
    }
    return [Answers(*pair) for pair in zip(*by_model.values(), strict=True)]


def shortened(line: str) -> str:
    """Return at most `WIDTH` characters of a line; an untrained model's answers are long."""
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"


def report(output: Path) -> str:
    """Return the text of the page."""
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
    """Print the page, or with `--prompts` the prompts."""
    parser = argparse.ArgumentParser(description="Print the closing page of the demo.")
    parser.add_argument("output", nargs="?", type=Path, help="folder of the demo's run")
    parser.add_argument("--prompts", action="store_true", help="print the demo's prompts instead, one per line")
    args = parser.parse_args()
    if args.prompts:
        print("\n".join(demo_prompts()))
    elif args.output is None:
        parser.error("the folder of the run is needed")
    else:
        print(report(args.output))


if __name__ == "__main__":
    main()
