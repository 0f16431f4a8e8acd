"""The report of a comparison: one self-contained HTML file, the same as Markdown, and every answer as JSON."""

import difflib
import json
import os
import re
import time
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from utils.errors import UserError
from utils.logging.loss_curve import loss_curves
from utils.prompt_eval.answer_metrics import REPEATED_N, Figures
from utils.prompt_eval.answers import Answer, Results
from utils.prompt_eval.config import STRATEGIES, EvalConfig
from utils.prompt_eval.report_tables import (
    evaluation_html,
    evaluation_markdown,
    samples_html,
    samples_markdown,
)

TEMPLATE = Path(__file__).with_name("report_template.html")
# key of `summarize` -> its name in the report, and its format
FIGURES = {
    "mean_words": ("words", "{:.1f}"),
    "mean_tokens": ("tokens", "{:.1f}"),
    "ended_share": ("ended by itself", "{:.0%}"),
    "distinct_1": ("distinct-1", "{:.2f}"),
    "distinct_2": ("distinct-2", "{:.2f}"),
    f"repeated_{REPEATED_N}": (f"repeated {REPEATED_N}-grams", "{:.0%}"),
}
REFERENCE_FIGURES = {
    "exact_match": ("exact match", "{:.1%}"),
    "rouge_l": ("ROUGE-L", "{:.3f}"),
    "last_number": ("last number", "{:.1%}"),
}
OF_REFERENCES = (
    "Exact match, ROUGE-L (F1) and last number compare with the data's own answers; last number counts those whose "
    "reference has a number."
)
EXPLANATION = (
    "Words and tokens are means per answer. Ended by itself: by the end token or, where answers end there, by the next "
    "“Human:”, not by the limit. "
    "Distinct-n: different n-grams of all answers / all n-grams. Repeated n-grams: share that occurs earlier in "
    "the same answer."
)
_ABSENT = object()
_CJK = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_PIECE = re.compile(rf"\s+|(?:[{_CJK}]|[^\W{_CJK}]+|[^\w\s])\s*")


def write_report(folder: str, config: EvalConfig, results: dict[str, Results], figures: Figures) -> str:
    """Write report.html, report.md and results.jsonl into `folder`; returns the path of report.html.

    Args:
        results: of "baseline" and "finetuned".
        figures: of both, as `comparison.measure` returns them.

    Raises:
        UserError: the folder can't be written.
    """
    files = {
        "results.jsonl": "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows(config, results, figures)),
        "report.md": markdown(config, results, figures),
        "report.html": page(config, results, figures),
    }
    try:
        os.makedirs(folder, exist_ok=True)
        for name, text in files.items():
            # A tokenizer can decode ids to a lone surrogate, which UTF-8 can't encode.
            Path(folder, name).write_text(text, encoding="utf-8", errors="replace")
    except OSError as err:
        raise UserError(f"--report {folder} can't be written: {err.strerror}") from err
    return os.path.join(folder, "report.html")


def rows(config: EvalConfig, results: dict[str, Results], figures: Figures) -> list[dict[str, Any]]:
    """Return one record per answer, in the order prompt, strategy, answer, model."""
    records = []
    for number, strategy, place, pair in pairs(config, results):
        for name, answer in pair.items():
            record = {
                "prompt_number": number + 1, "prompt": config.prompts[number], "strategy": strategy, "model": name,
                "answer_number": place + 1, "answer": answer.text, "tokens": answer.tokens, "ended": answer.ended,
            }  # fmt: skip
            if "scores" in figures[strategy]:
                record["score"] = figures[strategy]["scores"][name][number * config.args.num_return_sequences + place]
            if config.references:
                of_answer = figures[strategy]["reference_scores"][name]
                record["reference"] = config.references[number]
                record |= of_answer[number * config.args.num_return_sequences + place]
            records.append(record)
    return records


def pairs(config: EvalConfig, results: dict[str, Results]) -> list[tuple[int, str, int, dict[str, Answer]]]:
    """Return (prompt number, strategy, answer number, both models' answers) for every pair of answers, from 0."""
    return [
        (number, strategy, place, {name: result.answers[strategy][number][place] for name, result in results.items()})
        for number in range(len(config.prompts))
        for strategy in config.strategies
        for place in range(config.args.num_return_sequences)
    ]


def shown_figures(of_strategy: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return (name, before, after) of one strategy's figures, as text."""
    found = []
    for key, (name, form) in (FIGURES | REFERENCE_FIGURES).items():
        values = [of_strategy[side].get(key, _ABSENT) for side in ("baseline", "finetuned")]
        if _ABSENT in values:
            continue
        found.append((name, *("–" if value is None else form.format(value) for value in values)))
    return found


def _heads(figures: Figures) -> list[str]:
    return [name for name, *_ in shown_figures(next(iter(figures.values())))]


def _explained(figures: Figures) -> str:
    return f"{EXPLANATION} {OF_REFERENCES}" if "ROUGE-L" in _heads(figures) else EXPLANATION


def settings_line(config: EvalConfig) -> str:
    """Return a line with the date and the settings the answers depend on."""
    return " · ".join([time.strftime("%Y-%m-%d %H:%M"), *config.settings])


# --------------------------------------------------------------------------------------------------- HTML


def page(config: EvalConfig, results: dict[str, Results], figures: Figures) -> str:
    """Return the HTML page. Text that comes from a model, a file or the command line is escaped."""
    curves = loss_curves(config.args.model_name_or_path_finetune)
    buttons = [
        f'<button type="button" data-strategy="{name}" aria-pressed="true">{STRATEGIES[name]}</button>'
        for name in config.strategies
    ]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        baseline=escape(config.args.model_name_or_path_baseline),
        finetuned=escape(config.args.model_name_or_path_finetune),
        settings=escape(settings_line(config)),
        tiles=_tiles(results, figures),
        numbers=_numbers(figures),
        curves=f'<h2>Training</h2>\n<figure class="card">{curves}</figure>' if curves else "",
        buttons="\n".join(buttons),
        prompts=_prompts(config, results),
        evaluation=evaluation_html(results),
        samples=samples_html(config.args.model_name_or_path_finetune),
    )


def _tiles(results: dict[str, Results], figures: Figures) -> str:
    """Return the large tiles: perplexities, and the first strategy's main figures and wins."""
    tiles = []
    worth = [result.evaluation for result in results.values()]
    if all(worth):
        tiles.append(("perplexity on held-out data", *(f"{one.perplexity:.4g}" for one in worth)))
    strategy, first = next(iter(figures.items()))
    title = STRATEGIES[strategy].lower()
    wanted = ("words", "ended by itself", "distinct-2", *(name for name, _ in REFERENCE_FIGURES.values()))
    tiles += [(f"{name}, {title}", *values) for name, *values in shown_figures(first) if name in wanted]
    cells = [
        f'<div class="card tile"><div class="name">{name}</div><div class="value"><span class="before">{before}</span>'
        f'<span class="arrow">→</span><span class="after">{after}</span></div></div>'
        for name, before, after in tiles
    ]
    if "wins" in first:
        wins = first["wins"]
        cells.append(
            f'<div class="card tile"><div class="name">wins / ties / losses, {title}</div><div class="value">'
            f"{wins['win']} / {wins['tie']} / {wins['loss']}</div></div>"
        )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _numbers(figures: Figures) -> str:
    """Return the table of every strategy's figures, with before above after in each cell, and its explanation."""
    with_wins = any("wins" in of_strategy for of_strategy in figures.values())
    heads = _heads(figures) + ["wins / ties / losses"] * with_wins
    lines = []
    for strategy, of_strategy in figures.items():
        cells = [
            f'<td><span class="before">{before}</span><span class="after">{after}</span></td>'
            for _, before, after in shown_figures(of_strategy)
        ]
        if with_wins:
            cells.append("<td>{win} / {tie} / {loss}</td>".format(**of_strategy["wins"]))
        lines.append(f'<tr><th scope="row">{STRATEGIES[strategy]}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{name}</th>' for name in ["", *heads])
    return (
        f'<div class="card scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody>'
        f'</table></div>\n<p class="soft">{_explained(figures)}</p>'
    )


def _prompts(config: EvalConfig, results: dict[str, Results]) -> str:
    """Return a card per prompt, with both models' answers by every strategy side by side."""
    blocks: list[list[str]] = [[] for _ in config.prompts]
    for number, strategy, place, pair in pairs(config, results):
        before, after = pair["baseline"], pair["finetuned"]
        title = STRATEGIES[strategy] + (f", answer {place + 1}" if config.args.num_return_sequences > 1 else "")
        marked = mark_differences(before.text.strip(), after.text.strip())
        same = "yes" if before.text.strip() == after.text.strip() else "no"
        blocks[number].append(
            f'<div class="pair" data-strategy="{strategy}" data-same="{same}"><h4>{title}</h4><div class="both">'
            f"{_side('before', before, marked[0])}{_side('after', after, marked[1])}</div></div>"
        )
    return "\n".join(
        f'<article class="card"><h3>{escape(prompt.strip())}</h3>{reference}{"".join(block)}</article>'
        for prompt, reference, block in zip(config.prompts, _reference_lines(config), blocks, strict=True)
    )


def _reference_lines(config: EvalConfig) -> list[str]:
    """Return the line below each prompt with the data's own answer; empty ones without `--references`."""
    if not config.references:
        return [""] * len(config.prompts)
    return [f'<p class="reference"><b>reference</b> {escape(text)}</p>' for text in config.references]


def _side(name: str, answer: Answer, marked: str) -> str:
    """Return one answer, whose text with marked differences is `marked`."""
    end = "" if answer.ended else ", truncated at the limit"
    text = marked or '<span class="empty">(no text)</span>'
    return (
        f'<div class="side {name}-side"><h5><b class="{name}">{name}</b> <span>{answer.tokens} tokens{end}</span></h5>'
        f"<p>{text}</p></div>"
    )


def mark_differences(before: str, after: str) -> tuple[str, str]:
    """Return both texts as escaped HTML, with the words that the other text lacks in `<mark>`."""
    # Words keep the spaces after them, but are compared without.
    pieces = [_PIECE.findall(text) for text in (before, after)]
    words = [[piece.strip() for piece in of_text] for of_text in pieces]
    marked: tuple[list[str], list[str]] = ([], [])
    for kind, *places in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        for side, (start, end) in enumerate((places[:2], places[2:])):
            text = "".join(pieces[side][start:end])
            inside = text.rstrip()
            mark = kind != "equal" and inside
            marked[side].append(f"<mark>{escape(inside)}</mark>{text[len(inside) :]}" if mark else escape(text))
    return "".join(marked[0]), "".join(marked[1])


# ----------------------------------------------------------------------------------------------- Markdown


def markdown(config: EvalConfig, results: dict[str, Results], figures: Figures) -> str:
    """Return the report as Markdown, without curves and marks, for a pull request or a terminal."""
    before, after = config.args.model_name_or_path_baseline, config.args.model_name_or_path_finetune
    lines = ["# Before and after fine-tuning", "", f"before: {_code(before)}, after: {_code(after)}", ""]
    lines += [settings_line(config), ""]
    lines += evaluation_markdown(results)
    names = _heads(figures)
    lines += ["", f"| strategy | model | {' | '.join(names)} | score |", f"| --- | --- |{' ---: |' * len(names)} --- |"]
    for strategy, of_strategy in figures.items():
        shown = shown_figures(of_strategy)
        wins = of_strategy.get("wins")
        score = "{win} won, {tie} tied, {loss} lost".format(**wins) if wins else "–"
        lines.append(f"| {STRATEGIES[strategy]} | before | {' | '.join(before for _, before, _ in shown)} | |")
        lines.append(f"| {STRATEGIES[strategy]} | after | {' | '.join(after for _, _, after in shown)} | {score} |")
    lines += ["", _explained(figures), ""]
    last = None
    for number, strategy, place, pair in pairs(config, results):
        if number != last:
            lines += [f"## Prompt {number + 1}", "", _fenced(config.prompts[number].strip()), ""]
            if config.references:
                lines += ["**reference**", "", _fenced(config.references[number]), ""]
            last = number
        several = f", answer {place + 1}" if config.args.num_return_sequences > 1 else ""
        for name, answer in zip(("before", "after"), pair.values(), strict=True):
            lines += [f"**{STRATEGIES[strategy]}{several}, {name}**", "", _fenced(answer.text.strip()), ""]
    lines += samples_markdown(after)
    return "\n".join(lines)


def _fenced(text: str) -> str:
    """Return a code block whose fence is longer than any in `text`."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _code(text: str) -> str:
    """Return `text` as inline code, unless it holds a backquote."""
    return f"`{text}`" if "`" not in text else text
