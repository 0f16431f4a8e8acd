"""Parts of the report beside the answers: what models are worth on the evaluation data, and answers in training."""

from collections.abc import Sequence
from html import escape
from typing import Any

from utils.files import read_run_file
from utils.logging.metrics_file import read_samples
from utils.prompt_eval.answers import Results
from utils.train.perplexity import Evaluation

WHOLE = "all"  # the row of the whole evaluation data, above those of the data sets of a blend
HEADS = ("perplexity", "loss", "token accuracy")


def evaluation_rows(results: dict[str, Results]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return (data set, [(before, after) of each of `HEADS`]) of the evaluation data; [] where nothing was measured."""
    if not all(result.evaluation for result in results.values()):
        return []
    wholes = [result.evaluation for result in results.values()]
    rows = [(WHOLE, [_shown(one) for one in wholes])]
    for name in wholes[0].sources:
        rows.append((name, [_shown(one.sources[name]) for one in wholes]))
    return [(name, list(zip(*sides, strict=True))) for name, sides in rows]


def _shown(one: Evaluation) -> list[str]:
    return [f"{one.perplexity:.6g}", f"{one.loss:.6g}", f"{one.accuracy:.2%}"]


def evaluation_html(results: dict[str, Results]) -> str:
    """Return the table of `evaluation_rows` under its heading; nothing where nothing was measured."""
    rows = evaluation_rows(results)
    if not rows:
        return ""
    lines = [f'<tr><th scope="row">{escape(name)}</th>{_cells(pairs)}</tr>' for name, pairs in rows]
    head = "".join(f'<th scope="col">{name}</th>' for name in ("", *HEADS))
    return (
        f'<h2>On held-out data</h2>\n<div class="card scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>'
        f"{''.join(lines)}</tbody></table></div>"
    )


def _cells(pairs: Sequence[tuple[str, str]]) -> str:
    return "".join(
        f'<td><span class="before">{before}</span><span class="after">{after}</span></td>' for before, after in pairs
    )


def evaluation_markdown(results: dict[str, Results]) -> list[str]:
    """Return the lines of the same as Markdown."""
    lines = []
    for name, result in results.items():
        if result.evaluation is not None:
            whole = result.evaluation
            lines.append(
                f"* perplexity of {name}: {whole.perplexity:.6g} (loss {whole.loss:.6g}, token accuracy "
                f"{whole.accuracy:.2%})"
            )
            for source, one in whole.sources.items():
                lines.append(
                    f"  * on {source}: {one.perplexity:.6g} (loss {one.loss:.6g}, token accuracy {one.accuracy:.2%})"
                )
    return lines


def samples_of(folder: str) -> dict[str, list[dict[str, Any]]]:
    """Return the answers in training by prompt, in the order of their steps; {} where the run had no prompts."""
    arguments = read_run_file(folder).get("arguments")
    if not isinstance(arguments, dict) or not arguments.get("sample_prompts"):
        return {}
    found: dict[str, list[dict[str, Any]]] = {}
    for record in read_samples(folder):
        found.setdefault(record["prompt"], []).append(record)
    return found


def samples_html(folder: str) -> str:
    """Return the answers in training under their heading, a card for each prompt; nothing where there are none."""
    cards = [
        f'<details class="card"><summary>{escape(prompt.strip())}</summary>'
        + "".join(f"<h4>step {one['step']}</h4><p>{escape(one['answer'].strip())}</p>" for one in answers)
        + "</details>"
        for prompt, answers in samples_of(folder).items()
    ]
    return "<h2>Answers while training</h2>\n" + "\n".join(cards) if cards else ""


def samples_markdown(folder: str) -> list[str]:
    """Return the lines of the same as Markdown, each answer in one line."""
    found = samples_of(folder)
    lines = ["## Answers while training", ""] if found else []
    for prompt, answers in found.items():
        lines += [f"**{_in_a_line(prompt)}**", ""]
        lines += [f"* step {one['step']}: {_in_a_line(one['answer']) or '(no text)'}" for one in answers]
        lines.append("")
    return lines


def _in_a_line(text: str) -> str:
    return escape(" ".join(text.split()), quote=False)
