"""The report of a comparison: one HTML file that needs nothing else, the same as Markdown, and every answer as JSON."""

import difflib
import json
import os
import re
import time
from argparse import Namespace
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from utils.errors import UserError
from utils.logging.loss_curve import loss_curves
from utils.prompt_eval.answer_metrics import REPEATED_N
from utils.prompt_eval.answers import STRATEGIES, Answer, Results

TEMPLATE = Path(__file__).with_name("report_template.html")
# key of `summarise`, what the report calls it, how it is written, whether a note explains it
FIGURES = {
    "mean_words": ("words", "{:.1f}"),
    "mean_tokens": ("tokens", "{:.1f}"),
    "ended_share": ("ended by itself", "{:.0%}"),
    "distinct_1": ("distinct-1", "{:.2f}"),
    "distinct_2": ("distinct-2", "{:.2f}"),
    f"repeated_{REPEATED_N}": (f"repeated {REPEATED_N}-grams", "{:.0%}"),
}
EXPLANATION = (
    "Words and tokens are means per answer. Ended by itself: by the end token or the next “Human:”, not by the limit. "
    "Distinct-n: different n-grams of all answers / all n-grams. Repeated n-grams: share that stood earlier in the "
    "same answer."
)
_CJK = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_PIECE = re.compile(rf"\s+|(?:[{_CJK}]|[^\W{_CJK}]+|[^\w\s])\s*")
Figures = dict[str, dict[str, Any]]


def write_report(folder: str, args: Namespace, results: dict[str, Results], figures: Figures) -> str:
    """Write report.html, report.md and results.jsonl into `folder`; returns the path of the first.

    Args:
        args: of prompt_eval.py; its prompts, strategies and models are shown.
        results: of "baseline" and "finetuned".
        figures: per strategy what `summarise` gives for both, and where there was a scorer "scores" and "wins".

    Raises:
        UserError: the folder can't be written.
    """
    files = {
        "results.jsonl": "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows(args, results, figures)),
        "report.md": markdown(args, results, figures),
        "report.html": page(args, results, figures),
    }
    try:
        os.makedirs(folder, exist_ok=True)
        for name, text in files.items():
            # A lone surrogate, which a tokenizer can decode to, has no UTF-8.
            Path(folder, name).write_text(text, encoding="utf-8", errors="replace")
    except OSError as err:
        raise UserError(f"--report {folder} can't be written: {err.strerror}") from err
    return os.path.join(folder, "report.html")


def rows(args: Namespace, results: dict[str, Results], figures: Figures) -> list[dict[str, Any]]:
    """One record per answer, in the order prompt, strategy, answer, model."""
    records = []
    for number, strategy, place, pair in pairs(args, results):
        for name, answer in pair.items():
            record = {
                "prompt_number": number + 1, "prompt": args.prompts[number], "strategy": strategy, "model": name,
                "answer_number": place + 1, "answer": answer.text, "tokens": answer.tokens, "ended": answer.ended,
            }  # fmt: skip
            if "scores" in figures[strategy]:
                record["score"] = figures[strategy]["scores"][name][number * args.num_return_sequences + place]
            records.append(record)
    return records


def pairs(args: Namespace, results: dict[str, Results]) -> list[tuple[int, str, int, dict[str, Answer]]]:
    """(prompt number, strategy, answer number, both models' answers)."""
    return [
        (number, strategy, place, {name: result.answers[strategy][number][place] for name, result in results.items()})
        for number in range(len(args.prompts))
        for strategy in args.strategies
        for place in range(args.num_return_sequences)
    ]


def shown_figures(of_strategy: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, before, after) of one strategy's figures, as text."""
    found = []
    for key, (name, form) in FIGURES.items():
        values = [of_strategy[side][key] for side in ("baseline", "finetuned")]
        found.append((name, *("–" if value is None else form.format(value) for value in values)))
    return found


def settings_line(args: Namespace) -> str:
    """What the answers depend on, in words."""
    parts = [f"{len(args.prompts)} prompts", f"at most {args.max_new_tokens} new tokens", f"seed {args.seed}"]
    used = set(args.strategies)
    if used & {"beam", "beam_multinomial", "diverse_beam"}:
        parts.append(f"{args.num_beams} beams")
    if "diverse_beam" in used:
        parts.append(f"{args.num_beam_groups} groups, diversity penalty {args.diversity_penalty}")
    if used & {"multinomial", "beam_multinomial"}:
        parts.append(f"temperature {args.temperature}, top-p {args.top_p}")
    if "contrastive" in used:
        parts.append(f"contrastive: top-k {args.top_k}, alpha {args.penalty_alpha}")
    if args.repetition_penalty != 1:
        parts.append(f"repetition penalty {args.repetition_penalty}")
    return f"{time.strftime('%Y-%m-%d %H:%M')} · " + " · ".join(parts)


# --------------------------------------------------------------------------------------------------- HTML


def page(args: Namespace, results: dict[str, Results], figures: Figures) -> str:
    """The HTML page. Whatever comes from a model, a file or the command line is escaped."""
    curves = loss_curves(args.model_name_or_path_finetune)
    buttons = [
        f'<button type="button" data-strategy="{name}" aria-pressed="true">{STRATEGIES[name]}</button>'
        for name in args.strategies
    ]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        baseline=escape(args.model_name_or_path_baseline),
        finetuned=escape(args.model_name_or_path_finetune),
        settings=escape(settings_line(args)),
        tiles=_tiles(results, figures),
        numbers=_numbers(figures),
        curves=f'<h2>Training</h2>\n<figure class="card">{curves}</figure>' if curves else "",
        buttons="\n".join(buttons),
        prompts=_prompts(args, results),
    )


def _tiles(results: dict[str, Results], figures: Figures) -> str:
    """What matters most, large: perplexities, and of the first strategy how answers end and who wins."""
    tiles = []
    ppl = [result.perplexity for result in results.values()]
    if all(ppl):
        tiles.append(("perplexity on held-out data", f"{ppl[0][0]:.4g}", f"{ppl[1][0]:.4g}"))
    strategy, first = next(iter(figures.items()))
    title = STRATEGIES[strategy].lower()
    wanted = ("words", "ended by itself", "distinct-2")
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
    """Every strategy's figures, before over after in each cell."""
    with_wins = any("wins" in of_strategy for of_strategy in figures.values())
    heads = [name for name, _ in FIGURES.values()] + ["wins / ties / losses"] * with_wins
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
        f'</table></div>\n<p class="soft">{EXPLANATION}</p>'
    )


def _prompts(args: Namespace, results: dict[str, Results]) -> str:
    blocks: list[list[str]] = [[] for _ in args.prompts]
    for number, strategy, place, pair in pairs(args, results):
        before, after = pair["baseline"], pair["finetuned"]
        title = STRATEGIES[strategy] + (f", answer {place + 1}" if args.num_return_sequences > 1 else "")
        marked = mark_differences(before.text.strip(), after.text.strip())
        same = "yes" if before.text.strip() == after.text.strip() else "no"
        blocks[number].append(
            f'<div class="pair" data-strategy="{strategy}" data-same="{same}"><h4>{title}</h4><div class="both">'
            f"{_side('before', before, marked[0])}{_side('after', after, marked[1])}</div></div>"
        )
    return "\n".join(
        f'<article class="card"><h3>{escape(prompt.strip())}</h3>{"".join(block)}</article>'
        for prompt, block in zip(args.prompts, blocks, strict=True)
    )


def _side(name: str, answer: Answer, marked: str) -> str:
    end = "" if answer.ended else ", cut at the limit"
    text = marked or '<span class="empty">(no text)</span>'
    return (
        f'<div class="side {name}-side"><h5><b class="{name}">{name}</b> <span>{answer.tokens} tokens{end}</span></h5>'
        f"<p>{text}</p></div>"
    )


def mark_differences(before: str, after: str) -> tuple[str, str]:
    """Both texts as HTML, escaped, with what the other one lacks in `<mark>`, word by word."""
    # Each word with the space after it; spaces don't decide what is the same.
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


def markdown(args: Namespace, results: dict[str, Results], figures: Figures) -> str:
    """The same without pictures, for a pull request or a terminal."""
    before, after = args.model_name_or_path_baseline, args.model_name_or_path_finetune
    lines = ["# Before and after fine-tuning", "", f"before: {_code(before)}, after: {_code(after)}", ""]
    lines += [settings_line(args), ""]
    for name, result in results.items():
        if result.perplexity:
            lines.append(f"* perplexity of {name}: {result.perplexity[0]:.6g} (loss {result.perplexity[1]:.6g})")
    names = [name for name, _ in FIGURES.values()]
    lines += ["", f"| strategy | model | {' | '.join(names)} | score |", f"| --- | --- |{' ---: |' * len(names)} --- |"]
    for strategy, of_strategy in figures.items():
        shown = shown_figures(of_strategy)
        wins = of_strategy.get("wins")
        score = "{win} won, {tie} tied, {loss} lost".format(**wins) if wins else "–"
        lines.append(f"| {STRATEGIES[strategy]} | before | {' | '.join(before for _, before, _ in shown)} | |")
        lines.append(f"| {STRATEGIES[strategy]} | after | {' | '.join(after for _, _, after in shown)} | {score} |")
    lines += ["", EXPLANATION, ""]
    last = None
    for number, strategy, place, pair in pairs(args, results):
        if number != last:
            lines += [f"## Prompt {number + 1}", "", _fenced(args.prompts[number].strip()), ""]
            last = number
        several = f", answer {place + 1}" if args.num_return_sequences > 1 else ""
        for name, answer in zip(("before", "after"), pair.values(), strict=True):
            lines += [f"**{STRATEGIES[strategy]}{several}, {name}**", "", _fenced(answer.text.strip()), ""]
    return "\n".join(lines)


def _fenced(text: str) -> str:
    """A code block that `text` can't close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _code(text: str) -> str:
    return f"`{text}`" if "`" not in text else text
