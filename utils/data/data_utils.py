"""From data set names to memory-mapped prompt data sets: split, tokenise, mix, cache.

Rows are tokenised in batches over several processes, kept unpadded as Arrow, and memory-mapped, so memory
stays flat however large the set is. A cache folder belongs to one content: its name is a hash over
everything that changes the result.
"""

import copy
import hashlib
import os
import sys
from collections.abc import Iterable

import datasets
from transformers import PreTrainedTokenizerBase

from utils.data import cache as prompt_cache
from utils.data.cache import cache_lock
from utils.data.formats.chat_template import AUTO
from utils.data.formats.custom import OwnFormatDataset, OwnOptions, own_options
from utils.data.mixture import parse_source, weighted
from utils.data.prompt_dataset import ID_COLUMNS, PromptDataset
from utils.data.raw_datasets import PromptRawDataset, find_raw_dataset_class, known_name
from utils.data.splits import get_raw_dataset_split_index, get_shuffle_idx, split_boundaries
from utils.data.tokenization.byte_bpe import quick_tokenizer
from utils.data.tokenization.tokenize_rows import (
    DEFAULT_END_TOKEN,
    end_token_id,
    sample_features,
    tokenise,
    tokenise_completions,
)
from utils.errors import UserError
from utils.files import build_folder
from utils.logging.console import say

SFT_ONLY_SPLIT = "10,0,0"
# A fast tokenizer uses every core by itself; below this many rows, starting processes costs more than it saves.
ROWS_PER_PROCESS = 25_000


def get_raw_dataset(
    dataset_name: str,
    output_path: str,
    seed: int,
    local_rank: int,
    own: OwnOptions | None = None,
    streaming: bool = False,
) -> PromptRawDataset:
    """The data set whose known name is contained in `dataset_name` (so a mirror's path works too), else the user's own.

    Args:
        own: how data sets of the user's own are read; the Human/Assistant form and the columns' usual names if None.
        streaming: rows are read as they are needed, see `PromptRawDataset`.

    Raises:
        UserError: there is no such name or path, or its data can't be read or is malformed.
    """
    if known_name(dataset_name) is None and os.path.exists(dataset_name):
        return OwnFormatDataset(output_path, seed, local_rank, dataset_name, own, streaming)
    return find_raw_dataset_class(dataset_name)(output_path, seed, local_rank, dataset_name, streaming)


def create_dataset_split(
    current_dataset: datasets.Dataset,
    raw_dataset: PromptRawDataset,
    train_phase: int,
    tokenizer: PreTrainedTokenizerBase,
    end_of_conversation_token: str,
    max_seq_len: int,
    work_file: str | None = None,
    num_proc: int | None = None,
    completion_only: bool = False,
) -> PromptDataset:
    """Tokenise the rows of `current_dataset` for one phase.

    Args:
        work_file: Arrow file to write to; None keeps the result in memory.
        num_proc: processes; None decides by the number of rows and cores.
        completion_only: note where responses stand (phase 1), so that only they are labelled.
    """
    source = copy.copy(raw_dataset)
    source.raw_datasets = None  # workers need its texts' description, not its data
    features = sample_features(train_phase, completion_only)
    if len(current_dataset) == 0:  # map would not make the columns
        empty = datasets.Dataset.from_dict({name: [] for name in features}, features=features)
        return PromptDataset(empty, train_phase, tokenizer.pad_token_id, max_seq_len)
    used = tokenizer if completion_only else quick_tokenizer(tokenizer, len(current_dataset))
    if used is not tokenizer:
        say(f"{raw_dataset.dataset_name}: {len(current_dataset)} rows tokenised by tiktoken, with this tokenizer's ids")
    arguments = {
        "source": source,
        "tokenizer": used,
        "end_id": end_token_id(tokenizer, end_of_conversation_token),
        "max_seq_len": max_seq_len,
    }
    if not completion_only:
        arguments["phase"] = train_phase
    # Results go to a file of our own, never to the library's cache: any fingerprint that names it will do.
    fingerprint = hashlib.sha256(repr((work_file, sorted(features), max_seq_len)).encode()).hexdigest()[:16]
    workers = num_proc or max(1, min(os.cpu_count() or 1, len(current_dataset) // ROWS_PER_PROCESS))
    if workers > 1:
        # Processes already use every core; the tokenizer's own threads on top deadlock after a fork.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    table = current_dataset.map(
        tokenise_completions if completion_only else tokenise,
        batched=True,
        fn_kwargs=arguments,
        remove_columns=current_dataset.column_names,
        features=features,
        num_proc=workers if workers > 1 else None,
        cache_file_name=work_file,
        keep_in_memory=work_file is None,
        load_from_cache_file=False,
        new_fingerprint=fingerprint,
        desc=f"tokenising {raw_dataset.dataset_name_clean}",
    )
    return PromptDataset(table, train_phase, tokenizer.pad_token_id, max_seq_len)


def create_dataset(
    local_rank: int,
    dataset_name: str,
    data_split: str,
    output_path: str,
    train_phase: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    end_of_conversation_token: str,
    max_seq_len: int,
    rebuild: bool = False,
    work_folder: str | None = None,
    num_proc: int | None = None,
    completion_only: bool = False,
    own: OwnOptions | None = None,
) -> tuple[PromptDataset, PromptDataset]:
    """The phase's part of one data set's training and evaluation rows, tokenised: (train, eval).

    `dataset_name` may end in a weight, `NAME:0.3`: that share of the part's training rows is used.
    """
    name, weight = parse_source(dataset_name)
    raw = get_raw_dataset(name, output_path, seed, local_rank, own)
    parts = []
    for split_name, rows in (("train", raw.get_train_data()), ("eval", raw.get_eval_data())):
        index = get_raw_dataset_split_index(
            local_rank, output_path, raw.dataset_name_clean, seed, split_name, data_split, train_phase - 1,
            len(rows), rebuild,
        )  # fmt: skip
        rule = split_boundaries(data_split, len(rows)).rule
        if rule != "published" and local_rank <= 0:
            say(f"{raw.dataset_name} {split_name}: {data_split} of {len(rows)} rows is cut by {rule}")
        if split_name == "train" and weight != 1:
            given, index = len(index), weighted(index, weight)
            if local_rank <= 0:
                say(f"{raw.dataset_name} train: weight {weight:g}, {len(index)} rows of {given}")
        work_file = None
        if work_folder:
            os.makedirs(work_folder, exist_ok=True)
            work_file = os.path.join(work_folder, f"{split_name}.arrow")
        try:
            part = create_dataset_split(
                rows.select(index), raw, train_phase, tokenizer, end_of_conversation_token, max_seq_len, work_file,
                num_proc, completion_only,
            )  # fmt: skip
        except UserError:
            raw.try_rows(completion_only, limit=None)  # says where the row stands, which workers don't know
            raise
        part.rows_given = len(index)
        parts.append(part)
    return parts[0], parts[1]


# ---------------------------------------------------------------------------------- the whole, cached


def create_prompt_dataset(
    local_rank: int,
    data_path: list[str],
    data_split: str,
    output_path: str,
    train_phase: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    end_of_conversation_token: str = DEFAULT_END_TOKEN,
    sft_only_data_path: Iterable[str] = (),
    reload: bool = False,
    num_proc: int | None = None,
    completion_only: bool = False,
    columns: dict[str, str] | None = None,
    chat_template: str = AUTO,
) -> tuple[PromptDataset, PromptDataset]:
    """The mixed, tokenised data of one phase: (train, eval), from the cache where it fits.

    One process per cache folder builds; all others wait for its lock and then find the result. No collective
    is used, so a slow build never runs into the process group's time-out.

    Args:
        local_rank: rank on this node; only 0 (or -1) describes the data; who builds says so.
        data_path: data sets (`NAME` or `NAME:WEIGHT`) split by `data_split`; phase `train_phase` gets its part.
        output_path: cache folder, on a node's own or a shared disk.
        sft_only_data_path: data sets phase 1 uses whole.
        reload: build anew even if the cache fits.
        num_proc: tokenising processes; None decides by the number of rows and cores.
        completion_only: label only the response (phase 1).
        columns: columns by role, for data sets of the user's own.
        chat_template: how these become text, see `utils.data.formats.chat_template`.

    Raises:
        UserError: bad data, or no training sample is left.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    sources = [(name, data_split) for name in data_path]
    if train_phase == 1:
        sources += [(name, SFT_ONLY_SPLIT) for name in sft_only_data_path]
    end_id = end_token_id(tokenizer, end_of_conversation_token)
    own = own_options(tokenizer, end_id, columns, chat_template)

    def build(work: str) -> None:
        mixed: dict[str, list[PromptDataset]] = {"train": [], "eval": []}
        for number, (name, shares) in enumerate(sources):
            pair = create_dataset(
                local_rank, name, shares, output_path, train_phase, seed, tokenizer, end_of_conversation_token,
                max_seq_len, reload, os.path.join(work, f"part{number}"), num_proc, completion_only, own,
            )  # fmt: skip
            for split, part in zip(mixed, pair, strict=True):
                mixed[split].append(part)
        for split, parts in mixed.items():
            _save_mix(parts, len(data_path), seed, os.path.join(work, split))
        prompt_cache.finish(work, mixed, ID_COLUMNS[train_phase])

    with cache_lock(output_path):
        raws = []
        for text, shares in sources:
            name, weight = parse_source(text)
            raws.append((get_raw_dataset(name, output_path, seed, local_rank, own), shares, weight))
        key = prompt_cache.key(raws, train_phase, seed, tokenizer, max_seq_len, end_id, len(data_path), completion_only)
        folder = os.path.join(output_path, f"prompts_{key}")
        reason = "asked for" if reload else prompt_cache.damage(folder)
        if reason:
            build_folder(folder, build)
            say(f"Data cache {folder}: built ({reason})")  # whichever rank came first
    report = prompt_cache.read_report(folder)
    if local_rank <= 0:
        for line in filter(None, (raw.describe() for raw, *_ in raws)):
            say(line)
        if not reason:
            say(f"Data cache {folder}: hit")
        say("\n".join(prompt_cache.describe(report, max_seq_len, train_phase)))
    if report["train"]["samples"] == 0:
        raise UserError(
            f"no training sample: part {train_phase} of --data_split {data_split} of {', '.join(data_path)} is empty. "
            "Give that part a larger share, or more data."
        )
    train, evaluation = (
        PromptDataset(
            datasets.load_from_disk(os.path.join(folder, split)),
            train_phase,
            tokenizer.pad_token_id,
            max_seq_len,
        )
        for split in ("train", "eval")
    )
    return train, evaluation


def _save_mix(parts: list[PromptDataset], main_sets: int, seed: int, folder: str) -> None:
    """Join the parts as published: the main sets, shuffled if several; then SFT-only sets added, all shuffled."""
    tables = [part.table.with_format(None).remove_columns("cut") for part in parts]
    mixed = tables[:main_sets]
    if len(mixed) > 1:
        mixed = [_shuffled(mixed, seed)]
    if len(tables) > main_sets:
        mixed = [_shuffled(mixed + tables[main_sets:], seed)]
    # Nothing at all would make no file, and a folder that does not load again.
    mixed[0].save_to_disk(folder, num_shards=None if len(mixed[0]) else 1)


def _shuffled(tables: list[datasets.Dataset], seed: int) -> datasets.Dataset:
    joined = datasets.concatenate_datasets(tables)
    return joined.select(get_shuffle_idx(seed, len(joined)))
