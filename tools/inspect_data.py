"""What a run would train on, looked at before it starts: `python -m tools.inspect_data ARGUMENTS OF main.py`.

For every data set: samples as the model sees them, lengths, rows without an answer, duplicates within the training
and evaluation rows and between them, and what each phase gets. Only a tokenizer is loaded, never a model.
"""

import hashlib
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import Any, NamedTuple

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from utils.arguments.parser import parse_args
from utils.arguments.values import check_values
from utils.data.cache import cache_lock
from utils.data.data_utils import SFT_ONLY_SPLIT, end_token_id, get_raw_dataset
from utils.data.formats.custom import OwnOptions, own_options, parse_columns
from utils.data.mixture import parse_source, weighted
from utils.data.raw_datasets import PromptRawDataset
from utils.data.splits import get_shuffle_idx, split_boundaries
from utils.data.tokenization.byte_bpe import quick_tokenizer
from utils.data.tokenization.tokenize_rows import end_of_conversation_token, tokenise, tokenise_completions
from utils.distributed.failures import end_run
from utils.errors import UserError, join_problems
from utils.model.tokenizer import load_hf_tokenizer

ROWS_AT_ONCE = 1000
SAMPLES = 3
SHOWN_CHARS = 600
NAMED_ROWS = 5
PHASES = (1, 2, 3)
ABSENT = 0  # stands for a text that is not there, among hashes that are never 0


class Rows(NamedTuple):
    """What was measured of one split; arrays of [rows]."""

    texts: np.ndarray  # uint64 hash of prompt and answer, ABSENT where the row has no text
    prompts: np.ndarray  # uint64 hash of the prompt
    blank: np.ndarray  # bool: no answer, or nothing but white space
    rejected: np.ndarray  # bool: prompt and worse answer are there
    lengths: np.ndarray  # tokens of prompt, answer and end; 0 where the row has no text
    prompt_lengths: np.ndarray


def main(argv: list[str] | None = None) -> None:
    """Print the report."""
    args = parse_args(argv, "Look at the data of a run before it starts; takes main.py's arguments.")
    problems = check_values(args)
    if args.streaming:
        problems.append("--streaming: all rows are read here; leave it out, and give a part of very large data.")
    if problems:
        raise UserError(join_problems(problems))
    tokenizer = load_hf_tokenizer(args.model_name_or_path, True, args.eot_token if args.add_eot_token else None)
    end_id = end_token_id(tokenizer, end_of_conversation_token(args, tokenizer))
    own = own_options(tokenizer, end_id, parse_columns(args.columns), args.chat_template)
    sources = [(name, args.data_split) for name in args.data_path]
    sources += [(name, SFT_ONLY_SPLIT) for name in args.sft_only_data_path]
    measured = [report_data_set(text, shares, args, tokenizer, end_id, own) for text, shares in sources]
    if len(measured) > 1:
        print(f"\n=== the {len(measured)} data sets together")
        joined = [Rows(*map(np.concatenate, zip(*parts, strict=True))) for parts in zip(*measured, strict=True)]
        report_duplicates(*joined, named=False)


def report_data_set(
    text: str,
    data_split: str,
    args: Namespace,
    tokenizer: PreTrainedTokenizerBase,
    end_id: int,
    own: OwnOptions,
) -> tuple[Rows, Rows]:
    """Print one data set's part of the report; returns what was measured of its (train, eval) rows."""
    name, weight = parse_source(text)
    with cache_lock(args.data_output_path):
        raw = get_raw_dataset(name, args.data_output_path, args.seed, 0, own)
        data = {"train": raw.get_train_data(), "eval": raw.get_eval_data()}
    print(f"\n=== {text}\n{raw.describe() or f'Data {raw.dataset_name}: known by its name'}")
    try:
        train, evaluation = (measure(rows, raw, tokenizer, end_id) for rows in data.values())
        parts = parts_of_phases(train, evaluation, data_split, weight, args)
        for split, rows in (("train", train), ("eval", evaluation)):
            report_rows(split, rows, args.max_seq_len)
        report_duplicates(train, evaluation)
        report_phases(parts, {"train": train, "eval": evaluation}, args.max_seq_len)
        shown = parts["train"][0] if len(parts["train"][0]) else np.arange(len(train.texts))
        for row in shown[train.texts[shown] != ABSENT][:SAMPLES].tolist():
            print(f"  sample, train row {row + 1}: {sample_text(data['train'][row], raw, tokenizer, end_id, args)}")
    except UserError:
        raw.try_rows(args.completion_only_loss, limit=None)  # says where the row stands
        raise
    return train, evaluation


# ---------------------------------------------------------------------------------------------- measuring


def measure(dataset: datasets.Dataset, raw: PromptRawDataset, tokenizer: PreTrainedTokenizerBase, end_id: int) -> Rows:
    """Read every row once, in batches, and keep a few numbers of each."""
    quick = quick_tokenizer(tokenizer, len(dataset))
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
    return Rows(
        np.array([_text_hash(text) for text in texts], dtype=np.uint64),
        np.array([_text_hash(prompt) for prompt in prompts], dtype=np.uint64),
        np.array([answer is None or not answer.strip() for answer in answers], dtype=bool),
        np.array([raw.get_prompt_and_rejected(row) is not None for row in rows], dtype=bool),
        _token_counts(texts, raw, tokenizer, end_id),
        _token_counts(prompts, raw, tokenizer, None),
    )


def _text_hash(text: str | None) -> int:
    """The same for texts that differ in white space and case alone."""
    if text is None:
        return ABSENT
    content = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little") | 1


def _token_counts(texts: list[str | None], raw: PromptRawDataset, tokenizer: Any, end_id: int | None) -> np.ndarray:
    counts = np.zeros(len(texts), dtype=np.int64)
    present = [place for place, text in enumerate(texts) if text is not None]
    if present:
        encoded = tokenizer(
            [texts[place] for place in present], return_attention_mask=False, verbose=False,
            add_special_tokens=raw.add_special_tokens,
        )["input_ids"]  # fmt: skip
        counts[present] = [len(ids) + (end_id is not None and ids[-1:] != [end_id]) for ids in encoded]
    return counts


def parts_of_phases(
    train: Rows, evaluation: Rows, data_split: str, weight: float, args: Namespace
) -> dict[str, list[np.ndarray]]:
    """The row numbers each phase gets, by split, as training computes them; nothing is written."""
    parts = {}
    for split, rows in (("train", train), ("eval", evaluation)):
        size = len(rows.texts)
        cuts = split_boundaries(data_split, size).boundaries
        order = get_shuffle_idx(args.seed, size)
        parts[split] = [order[cuts[phase - 1] : cuts[phase]] for phase in PHASES]
    parts["train"][0] = weighted(parts["train"][0], weight)  # later phases are runs of their own
    return parts


# ---------------------------------------------------------------------------------------------- printing


def report_rows(split: str, rows: Rows, max_seq_len: int) -> None:
    """Counts, empty answers and lengths of one split."""
    line = f"  {split}: {len(rows.texts)} rows"
    empty = np.flatnonzero(rows.blank)
    print(f"{line}, {len(empty)} of them with an empty answer or none{_named(empty)}")
    lengths = rows.lengths[rows.lengths > 0]
    if len(lengths):
        median, most, nearly_all = np.percentile(lengths, (50, 90, 99))
        cut = int((lengths > max_seq_len).sum())
        prompts = int((rows.prompt_lengths >= max_seq_len).sum())
        print(
            f"    tokens: {lengths.sum()}; per row {lengths.mean():.1f} on average, median {median:.0f}, 90% up to "
            f"{most:.0f}, 99% up to {nearly_all:.0f}, longest {lengths.max()}\n"
            f"    --max_seq_len {max_seq_len} cuts {cut} rows ({cut / len(lengths):.1%}), "
            f"{prompts} of them before the last answer"
        )


def report_duplicates(train: Rows, evaluation: Rows, named: bool = True) -> None:
    """Rows that are there twice, and evaluation rows that training has seen (but for white space and case)."""

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
    """How many rows each phase gets, and how many of them it can use."""
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
    """The first of these rows by their numbers from 1, in brackets."""
    if not len(rows):
        return ""
    more = " ..." if len(rows) > NAMED_ROWS else ""
    return f" (row {', '.join(str(row + 1) for row in rows[:NAMED_ROWS].tolist())}{more})"


def sample_text(
    row: dict, raw: PromptRawDataset, tokenizer: PreTrainedTokenizerBase, end_id: int, args: Namespace
) -> str:
    """One row as phase 1 sees it, special tokens and all; with completion-only loss what is learned in ⟦ ⟧."""
    columns = {name: [value] for name, value in row.items()}
    if args.completion_only_loss:
        made = tokenise_completions(columns, raw, tokenizer, end_id, args.max_seq_len)
    else:
        made = tokenise(columns, raw, tokenizer, 1, end_id, args.max_seq_len)
    if not made["input_ids"]:
        return "left out, since nothing is left to learn"
    ids, place, text = made["input_ids"][0], 0, ""
    spans = made.get("label_spans", [[]])[0]
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        text += f"{tokenizer.decode(ids[place:start])}⟦{tokenizer.decode(ids[start:end])}⟧"
        place = end
    text += tokenizer.decode(ids[place:])
    text = text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS // 2]} ... {text[-SHOWN_CHARS // 2 :]}"
    return f"{len(ids)} tokens\n    " + text.replace("\n", "\n    ")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as err:
        end_run(err, 0)
