"""Prepares the samples of a phase before a run: data sets split, tokenized, mixed and cached.

Rows are tokenized in batches over several processes, kept unpadded as Arrow and memory-mapped, so memory stays flat
however large the data are. The name of a cache folder is a hash of everything that changes its content.
"""

import hashlib
import os
import sys
from functools import partial

import datasets
import numpy as np

from utils.data import cache as prompt_cache
from utils.data.cache import cache_lock
from utils.data.formats.custom import OwnOptions
from utils.data.mixture import BOTH, EVALUATION, TRAINING, DataSources, weighted
from utils.data.open_sets import (
    OpenSet,
    Preparation,
    chat_of,
    check_unchanged,
    describe_shares,
    get_raw_dataset,
    open_sets,
)
from utils.data.outcomes import added, advice_on, dropped_words, notes_on, settled
from utils.data.prompt_dataset import ID_COLUMNS, PromptDataset, Sources
from utils.data.raw_datasets import PromptRawDataset
from utils.data.splits import PUBLISHED, get_raw_dataset_split_index, get_shuffle_idx, split_boundaries
from utils.data.tokenization.refused_rows import name_refused_row
from utils.data.tokenization.tokenize_rows import SampleForm, map_arguments, row_tokenizer, sample_features
from utils.data.tokenization.workers import map_rows
from utils.errors import UserError
from utils.files import build_folder
from utils.logging.console import say
from utils.notation import parse_source

# A fast tokenizer uses every core by itself: for fewer rows than this, starting processes costs more than it saves.
ROWS_PER_PROCESS = 25_000
EVAL_SOURCES = "eval_sources.npy"  # in a cache folder: which data set each evaluation sample is of


def prepare_prompt_data(
    sources: DataSources, sample: SampleForm, own: OwnOptions, preparation: Preparation
) -> tuple[PromptDataset, PromptDataset]:
    """Return the mixed, tokenized data of one phase as (train, eval), from the cache where it fits.

    One process per cache folder builds; the others wait for its lock and then find the result. No collective is used,
    so a slow build never runs into the process group's time-out.

    Raises:
        UserError: bad data, or no training sample is left.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    folder, phase = preparation.cache_folder, preparation.phase
    with cache_lock(folder):
        opened = open_sets(sources, preparation, own)
        key = prompt_cache.key(opened, len(sources.data_path), sample, phase, preparation.seed)
        folder = os.path.join(folder, f"prompts_{key}")
        reason = "asked for" if preparation.rebuild else prompt_cache.damage(folder)
        if reason:
            build_folder(folder, partial(_build, opened, len(sources.data_path), sample, preparation))
            say(f"Data cache {folder}: built ({reason})")  # by the process that got the lock first, on any rank
    report = prompt_cache.read_report(folder)
    if preparation.prints:
        for line in filter(None, (one.raw.describe() for one in opened)):
            say(line)
        for one in opened[: len(sources.data_path)]:
            say(describe_shares(one, phase, sources.data_split))
        if not reason:
            say(f"Data cache {folder}: hit")
        for one, counts in zip(opened, report["sets"], strict=True):
            for note in notes_on(counts, sample.special, one.raw.unused_columns() if phase == 1 else ()):
                say(f"Data {one.raw.source}: {note}")
        say("\n".join(prompt_cache.describe(report, sample.max_seq_len, phase)))
    if report["train"]["samples"] == 0:
        raise UserError(_no_sample(opened, report["train"], phase))
    tables = [datasets.load_from_disk(os.path.join(folder, split)) for split in prompt_cache.SPLITS]
    train, evaluation = (_prompt_dataset(table, sample, phase) for table in tables)
    train.content = prompt_cache.content_of(opened, sample, preparation.seed, report)
    train.chat = chat_of(opened)
    names = [one.raw.source for one in opened if one.use != TRAINING]
    evaluation.sources = Sources.of(names, np.load(os.path.join(folder, EVAL_SOURCES)))
    return train, evaluation


def _no_sample(opened: list[OpenSet], counts: dict, phase: int) -> str:
    """Return the message for training data of which nothing is left."""
    names = ", ".join(one.raw.source for one in opened if one.use != EVALUATION)
    if why := dropped_words(counts):
        return (
            f"no training sample: all {counts['rows']} training rows of {names} that this phase reads were dropped "
            f"({why}). {advice_on(counts)}"
        )
    return (
        f"no training sample: part {phase} of --data_split {opened[0].shares} of {names} is empty. Give that part a "
        "larger share, or more data."
    )


def _build(opened: list[OpenSet], main_sets: int, sample: SampleForm, preparation: Preparation, work: str) -> None:
    """Write the content of a cache folder into the folder `work`."""
    mixed: dict[str, list[PromptDataset]] = {split: [] for split in prompt_cache.SPLITS}
    counts = []
    for number, one in enumerate(opened):
        pair = _prepare_parts(one, sample, preparation, os.path.join(work, f"part{number}"))
        for split, part, other_use in zip(mixed, pair, (EVALUATION, TRAINING), strict=True):
            if one.use != other_use:
                mixed[split].append(part)
        counts.append(added(part.counts for part in pair))
        check_unchanged(one.raw)
    for split, parts in mixed.items():
        numbers = _save_mix(parts, min(main_sets, len(parts)), preparation.seed, os.path.join(work, split))
        if split == "eval":
            np.save(os.path.join(work, EVAL_SOURCES), numbers)
    prompt_cache.finish(work, mixed, counts)


def prepare_data_set(
    dataset_name: str,
    data_split: str,
    sample: SampleForm,
    own: OwnOptions | None,
    preparation: Preparation,
) -> tuple[PromptDataset, PromptDataset]:
    """Return the phase's part of one data set's training and evaluation rows, tokenized, in memory: (train, eval).

    Args:
        dataset_name: `NAME` or `NAME:0.3`, which uses that share of the part's training rows.
    """
    name, weight = parse_source(dataset_name)
    raw = get_raw_dataset(name, preparation.cache_folder, preparation.seed, preparation.local_rank, own)
    return _prepare_parts(OpenSet(raw, data_split, weight, BOTH), sample, preparation)


def _prepare_parts(
    opened: OpenSet, sample: SampleForm, preparation: Preparation, work_folder: str | None = None
) -> tuple[PromptDataset, PromptDataset]:
    """Return the phase's part of a data set's training and evaluation rows, tokenized: (train, eval).

    Args:
        work_folder: where to write the Arrow files; None keeps the result in memory.
    """
    raw, parts = opened.raw, []
    for split, rows in (("train", raw.get_train_data()), ("eval", raw.get_eval_data())):
        index = chosen_rows(opened, split, len(rows), preparation)
        work_file = None
        if work_folder:
            os.makedirs(work_folder, exist_ok=True)
            work_file = os.path.join(work_folder, f"{split}.arrow")
        try:
            chosen = rows.select(index)
            part = tokenize_part(chosen, raw, sample, preparation.phase, preparation.num_proc, work_file)
        except UserError:  # of a worker, which does not know the row's place
            if preparation.phase == 1:
                name_refused_row(raw, split, sample, np.sort(raw.row_numbers(split)[index]))
            raise
        parts.append(part)
    return parts[0], parts[1]


def chosen_rows(opened: OpenSet, split: str, size: int, preparation: Preparation) -> np.ndarray:
    """Return the numbers of the rows of a split that are used."""
    if opened.use == (EVALUATION if split == "train" else TRAINING):
        return np.arange(0)
    if opened.use == EVALUATION:
        return np.arange(size)
    index = _rows_of_phase(opened.raw, split, opened.shares, size, preparation)
    if split == "eval" or opened.weight == 1:
        return index
    chosen = weighted(index, opened.weight)
    if preparation.prints:
        say(f"{opened.raw.dataset_name} train: weight {opened.weight:g}, {len(chosen)} rows of {len(index)}")
    return chosen


def _rows_of_phase(
    raw: PromptRawDataset, split: str, data_split: str, size: int, preparation: Preparation
) -> np.ndarray:
    """Return the row numbers of the phase's part of a split; prints where the published rule can't divide it."""
    index = get_raw_dataset_split_index(
        preparation.local_rank, preparation.cache_folder, raw.dataset_name_clean, preparation.seed, split, data_split,
        preparation.phase - 1, size, preparation.rebuild,
    )  # fmt: skip
    rule = split_boundaries(data_split, size).rule
    if rule != PUBLISHED and preparation.prints:
        say(f"{raw.dataset_name} {split}: {data_split} of {size} rows is divided by the {rule} rule")
    return index


def tokenize_part(
    rows: datasets.Dataset,
    raw: PromptRawDataset,
    sample: SampleForm,
    phase: int,
    num_proc: int | None = None,
    work_file: str | None = None,
) -> PromptDataset:
    """Return the rows tokenized for one phase.

    Args:
        raw: makes texts of the rows.
        num_proc: processes; None decides by the number of rows and cores.
        work_file: Arrow file to write to; None keeps the result in memory.
    """
    features = sample_features(phase, sample.completion_only)
    if len(rows) == 0:  # `map` would not make the columns
        empty = datasets.Dataset.from_dict({name: [] for name in features}, features=features)
        return _counted(empty, sample, phase)
    tokenizer = row_tokenizer(sample, len(rows))
    if tokenizer is not sample.tokenizer:
        say(f"{raw.dataset_name}: {len(rows)} rows tokenized by tiktoken, with this tokenizer's ids")
    workers = num_proc or max(1, min(os.cpu_count() or 1, len(rows) // ROWS_PER_PROCESS))
    if workers > 1:
        # Processes already use every core, and the tokenizer's own threads deadlock after a fork.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # The result goes to `work_file`, never to the library's cache, so any fingerprint that names this file will do.
    fingerprint = hashlib.sha256(repr((work_file, sorted(features), sample.max_seq_len)).encode()).hexdigest()[:16]
    table = map_rows(
        rows,
        workers=workers,
        **map_arguments(raw, sample, phase, tokenizer),
        remove_columns=rows.column_names,
        cache_file_name=work_file,
        keep_in_memory=work_file is None,
        load_from_cache_file=False,
        new_fingerprint=fingerprint,
        desc=f"tokenizing {raw.dataset_name_clean}",
    )
    return _counted(table, sample, phase)


def _counted(table: datasets.Dataset, sample: SampleForm, phase: int) -> PromptDataset:
    """Return the samples among the entries of a table, with the counts of all."""
    samples, counts = settled(table, ID_COLUMNS[phase])
    data = _prompt_dataset(samples, sample, phase)
    data.counts = counts
    return data


def _prompt_dataset(table: datasets.Dataset, sample: SampleForm, phase: int) -> PromptDataset:
    return PromptDataset(table, phase, sample.tokenizer.pad_token_id, sample.max_seq_len)


def _save_mix(parts: list[PromptDataset], main_sets: int, seed: int, folder: str) -> np.ndarray:
    """Join the parts as published: the main sets, shuffled if several; then the SFT-only sets added, all shuffled.

    Returns:
        [rows] which of the parts each row is of.
    """
    tables = [part.table.with_format(None) for part in parts]
    numbers = [np.full(len(table), place) for place, table in enumerate(tables)]
    mixed, found = tables[:main_sets], numbers[:main_sets]
    if len(mixed) > 1:
        mixed, found = [_shuffled(mixed, seed)], [_shuffled_numbers(found, seed)]
    if len(tables) > main_sets:
        found = [_shuffled_numbers(found + numbers[main_sets:], seed)]
        mixed = [_shuffled(mixed + tables[main_sets:], seed)]
    # Without the number, an empty table would write no file, and its folder could not be loaded again.
    mixed[0].save_to_disk(folder, num_shards=None if len(mixed[0]) else 1)
    return found[0]


def _shuffled(tables: list[datasets.Dataset], seed: int) -> datasets.Dataset:
    joined = datasets.concatenate_datasets(tables)
    return joined.select(get_shuffle_idx(seed, len(joined)))


def _shuffled_numbers(numbers: list[np.ndarray], seed: int) -> np.ndarray:
    joined = np.concatenate(numbers)
    return joined[get_shuffle_idx(seed, len(joined))]
