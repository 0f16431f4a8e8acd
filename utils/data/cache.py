"""The cache of tokenized data: its lock, key, integrity check and statistics."""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow.compute as pc
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from utils.data.agreement import Content
from utils.data.outcomes import added, dropped_words
from utils.errors import UserError
from utils.files import checksum

if TYPE_CHECKING:
    from utils.data.tokenization.tokenize_rows import SampleForm

REPORT = "report.json"
SPLITS = ("train", "eval")


@contextmanager
def cache_lock(folder: str) -> Iterator[None]:
    """Hold the cache folder's lock; the operating system frees it when its holder is killed."""
    try:
        os.makedirs(folder, exist_ok=True)
        lock = FileLock(os.path.join(folder, ".lock"))
        lock.acquire()
    except OSError as err:
        raise UserError(
            f"the cache folder {folder} can't be written ({err}): give another with --data_output_path."
        ) from err
    try:
        yield
    finally:
        lock.release()


def key(
    raw_datasets: list[tuple[Any, str, float, str]], main_sets: int, sample: "SampleForm", phase: int, seed: int
) -> str:
    """Return a hash of everything that changes the result: data, split, phase, seed, tokenizer, sample form, code.

    Args:
        raw_datasets: data sets with their split, weight and use; how their texts are made is in their fingerprints.
        main_sets: how many of them come from `--data_path`; the others are mixed in later, by a second shuffle.
    """
    contents = [
        [raw.dataset_name, raw.fingerprint("train"), raw.fingerprint("eval"), shares, weight, use]
        for raw, shares, weight, use in raw_datasets
    ]
    form = [tokenizer_fingerprint(sample.tokenizer), sample.max_seq_len, sample.end_id]
    form += [sample.end_text, sample.completion_only, sample.overlong]
    parts = [contents, main_sets, phase, seed, *form, _code_fingerprint()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the tokenizer's content: vocabulary, merges, rules, special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps([type(tokenizer).__name__, str(tokenizer.special_tokens_map), tokenizer.pad_token_id])
    return hashlib.sha256((content + special).encode()).hexdigest()


def _code_fingerprint() -> str:
    """Return a hash of all source files below this folder, so that changed code never reads what older code wrote."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def finish(work: str, parts: dict[str, list[Any]], counts_of_sets: list[dict[str, Any]]) -> None:
    """Remove the working files of single data sets and write the report, which marks the folder as complete."""
    report: dict[str, Any] = {split: added(part.counts for part in parts[split]) for split in SPLITS}
    report["sets"] = counts_of_sets
    report["content"] = {split: content_sum(datasets.load_from_disk(os.path.join(work, split))) for split in SPLITS}
    for file in Path(work).glob("part*/*"):
        file.unlink()
    for folder in Path(work).glob("part*"):
        folder.rmdir()
    files = [file for file in sorted(Path(work).rglob("*")) if file.is_file()]
    report["files"] = {str(file.relative_to(work)): [file.stat().st_size, checksum(file)] for file in files}
    with open(os.path.join(work, REPORT), "w", encoding="utf-8") as out:
        json.dump(report, out, indent=1)
        out.flush()
        os.fsync(out.fileno())


def content_sum(table: datasets.Dataset) -> int:
    """Return the CRC-32 of all ids and labels of a split, the same however the rows lie in files and batches."""
    value = 0
    for name in sorted(table.column_names):
        chunks = table.with_format("arrow")[:][name].chunks
        for part in (pc.list_value_length, pc.list_flatten):
            for chunk in chunks:
                value = zlib.crc32(np.ascontiguousarray(part(chunk).to_numpy(zero_copy_only=False)), value)
    return value


def damage(folder: str) -> str | None:
    """Return why the folder can't be used; None when it is complete and as it was written."""
    try:
        report = read_report(folder)
        files = {name: (int(size), int(crc)) for name, (size, crc) in report["files"].items()}
        if not all(name in report for name in (*SPLITS, "sets")):
            return "its report is damaged"
    except FileNotFoundError:
        return "not there yet" if not os.path.exists(folder) else "incomplete"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its report is damaged"
    for name, (size, sum_of_bytes) in files.items():
        path = Path(folder, name)
        if not path.is_file() or path.stat().st_size != size or checksum(path) != sum_of_bytes:
            return f"{name} is damaged"
    return None


def read_report(folder: str) -> dict[str, Any]:
    """Return the report written by `finish`."""
    with open(os.path.join(folder, REPORT), encoding="utf-8") as file:
        return json.load(file)


def content_of(opened: list[Any], sample: "SampleForm", seed: int, report: dict[str, Any]) -> Content:
    """Return what identifies prepared data, to compare it with those of other ranks, whatever folder they are in."""
    sources = [
        [[data.fingerprint for data in raw.raw_datasets.values()], shares, weight, use]
        for raw, shares, weight, use in opened
    ]
    parts = [
        sources,
        seed,
        sample.max_seq_len,
        sample.overlong,
        tokenizer_fingerprint(sample.tokenizer),
        _code_fingerprint(),
    ]
    train, evaluation = (report[split] for split in SPLITS)
    return Content(
        hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20], train["samples"], evaluation["samples"],
        train["tokens"] + evaluation["tokens"], zlib.crc32(repr(report["content"]).encode()),
    )  # fmt: skip


def describe(report: dict[str, Any], max_seq_len: int, phase: int) -> list[str]:
    """Return one line per split: samples, tokens, how many samples were truncated and rows dropped."""
    return [describe_part(f"Data {split}", report[split], max_seq_len, phase) for split in SPLITS]


def describe_part(title: str, part: dict[str, Any], max_seq_len: int, phase: int) -> str:
    """Return one line with the counts of `utils.data.outcomes.count`."""
    samples = part["samples"]
    line = f"{title}: {samples} samples, {part['tokens']} tokens"
    if samples:
        line += f" (mean {part['tokens'] / samples:.1f}, longest {part['longest']}"
        line += f"; {part['truncated']} truncated at max_seq_len {max_seq_len}"
        if phase < 3:
            line += f", so {part['truncated'] / samples:.1%} lost their end token"
        line += ")"
    if part["dropped"]:
        line += f", {sum(part['dropped'].values())} dropped ({dropped_words(part)})"
    return line
