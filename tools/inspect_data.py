"""Reports on the data of a run before it starts: `python -m tools.inspect_data ARGUMENTS OF main.py`.

For every data set: samples as the model sees them, lengths, rows without an answer, duplicates within the training
and evaluation rows and between them, and the rows of each phase. A tokenizer is loaded, but never a model.
"""

import hashlib
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import Any, NamedTuple

import datasets
import numpy as np

from utils.arguments.parser import parse_args
from utils.arguments.values import check_values
from utils.data.cache import cache_lock
from utils.data.formats.custom import own_options
from utils.data.formats.roles import parse_columns
from utils.data.mixture import EVALUATION, TRAINING, DataSources, weighted
from utils.data.open_sets import OpenSet, Preparation, open_sets
from utils.data.outcomes import BOOKS, REASON_WORDS, notes_on
from utils.data.prepare import tokenize_part
from utils.data.raw_datasets import PromptRawDataset
from utils.data.splits import get_shuffle_idx, split_boundaries
from utils.data.tokenization.byte_bpe import quick_tokenizer
from utils.data.tokenization.tokenize_rows import (
    SampleForm,
    encode,
    end_of_conversation_token,
    has_own_bos,
    map_arguments,
)
from utils.distributed.failures import end_run
from utils.errors import UserError, join_problems
from utils.logging.console import print_any_text
from utils.model.tokenizer import load_hf_tokenizer
from utils.notation import asked_eot_token

ROWS_AT_ONCE = 1000
SAMPLES = 3
SHOWN_CHARS = 600
NAMED_ROWS = 5
NOTED_ROWS = 1000
PHASES = (1, 2, 3)
ABSENT = 0  # marks a missing text; the hash of a text is never 0


class Rows(NamedTuple):
    """Measurements of one split; arrays of [rows]."""

    texts: np.ndarray  # uint64 hash of prompt and answer, ABSENT where the row has no text
    prompts: np.ndarray  # uint64 hash of the prompt
    blank: np.ndarray  # bool: there is no answer, or only white space
    rejected: np.ndarray  # bool: there are a prompt and a worse answer
    lengths: np.ndarray  # tokens of prompt, answer and end token; 0 where the row has no text
    prompt_lengths: np.ndarray


def main(argv: list[str] | None = None) -> None:
    """Print the report."""
    args = parse_args(argv, "Report on the data of a run before it starts; takes main.py's arguments.")
    problems = check_values(args)
    if args.streaming:
        problems.append("--streaming: all rows are read here; leave it out, and give a part of very large data.")
    if problems:
        raise UserError(join_problems(problems))
    eot_token = asked_eot_token(args)
    tokenizer = load_hf_tokenizer(args.model_name_or_path, True, eot_token)
    end_token = end_of_conversation_token(tokenizer, eot_token, args.model_name_or_path)
    sample = SampleForm(tokenizer, end_token, args.max_seq_len, args.completion_only_loss, overlong=args.overlong)
    own = own_options(
        tokenizer, sample.end_id, parse_columns(args.columns), args.chat_template, args.train_turns, args.template_date
    )
    sources = DataSources(args.data_path, args.data_split, args.sft_only_data_path, args.eval_data_path)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    with cache_lock(args.data_output_path):
        opened = open_sets(sources, Preparation(0, args.data_output_path, 1, args.seed), own)
    names = [text for text, *_ in sources.of_phase(1)]
    measured = [report_data_set(text, one, sample, args) for text, one in zip(names, opened, strict=True)]
    if len(measured) > 1:
        print(f"\n=== the {len(measured)} data sets together")
        joined = [Rows(*map(np.concatenate, zip(*parts, strict=True))) for parts in zip(*measured, strict=True)]
        report_duplicates(*joined, named=False)


def report_data_set(text: str, opened: OpenSet, sample: SampleForm, args: Namespace) -> tuple[Rows, Rows]:
    """Print one data set's part of the report; return the measurements of its (train, eval) rows.

    Rows that the run does not use, of data given for evaluation or for training alone, are left out.
    """
    raw, used = opened.raw, {TRAINING: ["train"], EVALUATION: ["eval"]}.get(opened.use, ["train", "eval"])
    with cache_lock(args.data_output_path):
        data = {"train": raw.get_train_data(), "eval": raw.get_eval_data()}
    data = {split: rows if split in used else rows.select([]) for split, rows in data.items()}
    print(f"\n=== {text}\n{raw.describe() or f'Data {raw.dataset_name}: known by its name'}")
    try:
        train, evaluation = (measure(rows, raw, sample) for rows in data.values())
        parts = parts_of_phases(train, evaluation, opened.shares, opened.weight, args.seed)
        for split, rows in (("train", train), ("eval", evaluation)):
            if split in used:
                report_rows(split, rows, args.max_seq_len)
        report_notes(data["train"], raw, sample)
        report_duplicates(train, evaluation)
        report_phases(parts, {"train": train, "eval": evaluation}, args.max_seq_len)
        shown = parts["train"][0] if len(parts["train"][0]) else np.arange(len(train.texts))
        for row in shown[train.texts[shown] != ABSENT][:SAMPLES].tolist():
            print(f"  sample, train row {row + 1}: {sample_text(data['train'][row], raw, sample)}")
    except UserError:
        raw.try_rows(sample.completion_only, limit=None)  # raises with the row's place
        raise
    return train, evaluation


# ---------------------------------------------------------------------------------------------- measuring


def measure(dataset: datasets.Dataset, raw: PromptRawDataset, sample: SampleForm) -> Rows:
    """Read every row once, in batches, and return a few numbers of each."""
    quick, end_id = quick_tokenizer(sample.tokenizer, len(dataset)), sample.end_id
    batches = [_measure_batch(rows, raw, quick, end_id) for rows in _batches(dataset)]
    return Rows(*map(np.concatenate, zip(*batches, strict=True)))


def _batches(dataset: datasets.Dataset) -> Iterator[list[dict]]:
    for start in range(0, len(dataset), ROWS_AT_ONCE):
        columns = dataset[start : start + ROWS_AT_ONCE]
        yield [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if len(dataset) == 0:
        yield []


def _measure_batch(rows: list[dict], raw: PromptRawDataset, tokenizer: Any, end_id: int) -> Rows:
    texts = [raw.get_prompt_and_chosen(row) for row in rows]
    prompts = [raw.get_prompt(row) for row in rows]
    answers = [raw.get_chosen(row) for row in rows]
    adds = [raw.adds_special(row) for row in rows]
    return Rows(
        np.array([_text_hash(text) for text in texts], dtype=np.uint64),
        np.array([_text_hash(prompt) for prompt in prompts], dtype=np.uint64),
        np.array([answer is None or not answer.strip() for answer in answers], dtype=bool),
        np.array([raw.get_prompt_and_rejected(row) is not None for row in rows], dtype=bool),
        _token_counts(texts, adds, tokenizer, end_id),
        _token_counts(prompts, adds, tokenizer, None),
    )


def _text_hash(text: str | None) -> int:
    """Return a hash that is the same for texts that differ in white space and case alone."""
    if text is None:
        return ABSENT
    content = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little") | 1


def _token_counts(texts: list[str | None], adds: list[bool], tokenizer: Any, end_id: int | None) -> np.ndarray:
    counts = np.zeros(len(texts), dtype=np.int64)
    present = [place for place, text in enumerate(texts) if text is not None]
    if present:
        chosen, bos = [texts[place] for place in present], tokenizer.bos_token
        special = [adds[place] and not has_own_bos(texts[place], bos) for place in present]
        encoded, _ = encode(tokenizer, chosen, special)
        counts[present] = [len(ids) + (end_id is not None and ids[-1:] != [end_id]) for ids in encoded]
    return counts


def parts_of_phases(
    train: Rows, evaluation: Rows, data_split: str, weight: float, seed: int
) -> dict[str, list[np.ndarray]]:
    """Return the row numbers of each phase by split, as training computes them; nothing is written."""
    parts = {}
    for split, rows in (("train", train), ("eval", evaluation)):
        size = len(rows.texts)
        cuts = split_boundaries(data_split, size).boundaries
        order = get_shuffle_idx(seed, size)
        parts[split] = [order[cuts[phase - 1] : cuts[phase]] for phase in PHASES]
    parts["train"][0] = weighted(parts["train"][0], weight)  # later phases are runs of their own
    return parts


# ---------------------------------------------------------------------------------------------- printing


def report_rows(split: str, rows: Rows, max_seq_len: int) -> None:
    """Print counts, empty answers and lengths of one split."""
    line = f"  {split}: {len(rows.texts)} rows"
    empty = np.flatnonzero(rows.blank)
    print(f"{line}, {len(empty)} of them with an empty answer or none{_named(empty)}")
    lengths = rows.lengths[rows.lengths > 0]
    if len(lengths):
        median, most, nearly_all = np.percentile(lengths, (50, 90, 99))
        truncated = int((lengths > max_seq_len).sum())
        prompts = int((rows.prompt_lengths >= max_seq_len).sum())
        print(
            f"    tokens: {lengths.sum()}; per row {lengths.mean():.1f} on average, median {median:.0f}, 90% up to "
            f"{most:.0f}, 99% up to {nearly_all:.0f}, longest {lengths.max()}\n"
            f"    --max_seq_len {max_seq_len} truncates {truncated} rows ({truncated / len(lengths):.1%}), "
            f"{prompts} of them before the last answer"
        )


def report_notes(rows: datasets.Dataset, raw: PromptRawDataset, sample: SampleForm) -> None:
    """Print what is not used of the data, and what is to be said of the first rows."""
    counts = tokenize_part(rows.select(range(min(NOTED_ROWS, len(rows)))), raw, sample, 1, num_proc=1).counts
    where = f"of the first {NOTED_ROWS} rows of train: " if len(rows) > NOTED_ROWS else ""
    for line in notes_on(counts, sample.special, raw.unused_columns()):
        print(f"  {where}{line}")


def report_duplicates(train: Rows, evaluation: Rows, named: bool = True) -> None:
    """Print the repeated rows, and the evaluation rows that are trained on; white space and case are ignored."""

    def count(places: np.ndarray) -> str:
        return f"{len(places)}{_named(places) if named else ''}"

    counts = []
    for rows in (train, evaluation):
        places = np.flatnonzero(rows.texts != ABSENT)
        first = np.unique(rows.texts[places], return_index=True)[1]
        counts.append(count(np.delete(places, first)))
    print(f"  duplicates: within train {counts[0]}; within eval {counts[1]}")
    here = evaluation.texts != ABSENT
    leaked = here & np.isin(evaluation.texts, train.texts)
    same_prompt = here & ~leaked & np.isin(evaluation.prompts, train.prompts[train.texts != ABSENT])
    print(
        f"  leaks: eval rows that are in train too: {count(np.flatnonzero(leaked))}; others with a prompt of train: "
        f"{count(np.flatnonzero(same_prompt))}"
    )


def report_phases(parts: dict[str, list[np.ndarray]], rows: dict[str, Rows], max_seq_len: int) -> None:
    """Print how many rows each phase gets, and how many of them it can use."""
    for phase in PHASES:
        words = []
        for split, measured in rows.items():
            usable = {
                1: measured.texts != ABSENT,
                2: (measured.texts != ABSENT) & measured.rejected,
                3: (measured.prompt_lengths > 0) & (measured.prompt_lengths <= max_seq_len),
            }[phase]
            part = parts[split][phase - 1]
            words.append(f"{split} {len(part)} rows, {int(usable[part].sum())} usable")
        print(f"  phase {phase}: {'; '.join(words)}{' (needs a rejected answer)' * (phase == 2)}")


def _named(rows: np.ndarray) -> str:
    """List the first of these rows in brackets, numbered from 1."""
    if not len(rows):
        return ""
    more = " ..." if len(rows) > NAMED_ROWS else ""
    return f" (row {', '.join(str(row + 1) for row in rows[:NAMED_ROWS].tolist())}{more})"


def sample_text(row: dict, raw: PromptRawDataset, sample: SampleForm) -> str:
    """Return one row as phase 1 sees it, with special tokens; with completion-only loss, labelled text is in ⟦ ⟧."""
    tokenizer = sample.tokenizer
    mapping = map_arguments(raw, sample, 1, tokenizer)
    made = mapping["function"]({name: [value] for name, value in row.items()}, **mapping["fn_kwargs"])
    if not made["input_ids"][0]:
        return f"dropped ({REASON_WORDS[made[BOOKS][0][0]]})"
    ids, place, text = made["input_ids"][0], 0, ""
    spans = made.get("label_spans", [[]])[0]
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        text += f"{tokenizer.decode(ids[place:start])}⟦{tokenizer.decode(ids[start:end])}⟧"
        place = end
    text += tokenizer.decode(ids[place:])
    text = text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS // 2]} ... {text[-SHOWN_CHARS // 2 :]}"
    return f"{len(ids)} tokens\n    " + text.replace("\n", "\n    ")


if __name__ == "__main__":
    print_any_text()
    try:
        main(sys.argv[1:])
    except UserError as err:
        end_run(err, 0)
