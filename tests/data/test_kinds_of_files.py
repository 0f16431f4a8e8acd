"""Data files under the names and in the packings that people have them in, and what lies beside them in a folder."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.test_schemas import OTHER, PAIR, rows_of, write_jsonl
from utils.data.data_utils import get_raw_dataset
from utils.errors import UserError

LINES = "".join(json.dumps(row) + "\n" for row in (PAIR, OTHER)).encode()
PACKED = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}
TEXTS = [f" Human: {row['prompt']} Assistant: {row['response']}" for row in (PAIR, OTHER)]


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def described(folder: Path) -> str:
    return get_raw_dataset(str(folder), str(folder.parent / "cache"), 1, 0).describe()


@pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streamed"])
@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv"])
def test_every_packing_of_every_kind(tmp_path, ending, packing, streaming):
    mark = "\t" if ending == ".tsv" else ","
    table = "".join(f'"{row["prompt"]}"{mark}"{row["response"]}"\n' for row in (PAIR, OTHER))
    plain = {".jsonl": LINES, ".json": json.dumps([PAIR, OTHER]).encode()}
    plain |= dict.fromkeys((".csv", ".tsv"), f"prompt{mark}response\n{table}".encode())
    pack = PACKED[packing]
    # Shards that were put together: each packing reads on after the end of one.
    content = plain[ending]
    half = len(content) // 2
    path = put(tmp_path / f"t{ending}{packing}", pack(content[:half]) + pack(content[half:]))
    assert rows_of(path, streaming) == TEXTS


@pytest.mark.parametrize("name", ["t.ndjson", "t.jsonlines", "T.NDJSON", "t.ndjson.zst"])
def test_other_names_of_json_lines(tmp_path, name):
    content = PACKED[".zst"](LINES) if name.endswith(".zst") else LINES
    assert rows_of(put(tmp_path / name, content)) == TEXTS


def test_tabs_separate_what_a_tsv_holds(tmp_path):
    path = put(tmp_path / "t.tsv", '\ufeffprompt\tresponse\r\nq, "x"\ta, b\r\n"q\tz"\t"a\nb"\r\n')
    assert rows_of(path) == [' Human: q, "x" Assistant: a, b', " Human: q\tz Assistant: a\nb"]
    with pytest.raises(UserError, match=r"t\.tsv, record 1 \(line 2\) has 1 fields where the header has 2"):
        rows_of(put(tmp_path / "t.tsv", "prompt\tresponse\nq,a\n"))


BAD = {
    "cut.jsonl.gz": (PACKED[".gz"](LINES * 99)[:-9], "no complete gzip file"),
    "cut.jsonl.bz2": (PACKED[".bz2"](LINES * 99)[:-9], "no complete bzip2 file"),
    "cut.jsonl.xz": (PACKED[".xz"](LINES * 99)[:-9], "no complete xz file"),
    "cut.jsonl.zst": (PACKED[".zst"](LINES * 99)[:-9], "no complete zstd file"),
    "cut.csv.zst": (PACKED[".zst"](b"prompt,response\n" + b"q,a\n" * 999)[:-9], "no complete zstd file"),
    "plain.jsonl.xz": (LINES, r"not compressed as its name says: take \.xz off its name"),
    "plain.csv.gz": (b"prompt,response\nq,a\n", r"not compressed as its name says: take \.gz off its name"),
    "other.jsonl.zst": (PACKED[".gz"](LINES), r"not compressed as its name says: end its name in \.gz"),
    "packed.jsonl": (PACKED[".zst"](LINES), r"is compressed: end its name in \.zst"),
    "packed.csv": (PACKED[".gz"](b"prompt,response\nq,a\n"), r"is compressed: end its name in \.gz"),
    "t.xlsx": (b"PK", r"is no data file: its name must end in \.parquet, \.json"),
    "latin.csv.gz": (PACKED[".gz"]("prompt,response\nq,fü\n".encode("latin-1")), r"not UTF-8 text.*\(line 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_not_what_its_name_says(tmp_path, name):
    content, words = BAD[name]
    with pytest.raises(UserError, match=words):
        rows_of(put(tmp_path / name, content))


def test_a_compressed_copy_is_not_read_again(tmp_path):
    folder = tmp_path / "set"
    write_jsonl(folder / "train.jsonl", PAIR, OTHER)
    put(folder / "train.jsonl.gz", gzip.compress(LINES))
    put(folder / "train2.jsonl.gz", gzip.compress(LINES))
    assert sorted(rows_of(folder)) == sorted(2 * TEXTS)
    assert "not read: train.jsonl.gz (a compressed copy of train.jsonl)" in described(folder)


def test_the_form_that_holds_training_data_is_read(tmp_path):
    folder = tmp_path / "set"
    write_jsonl(folder / "train.jsonl", PAIR, OTHER)
    pq.write_table(pa.Table.from_pylist([PAIR]), folder / "dev.parquet")
    assert rows_of(folder) == TEXTS
    assert "not read: dev.parquet" in described(folder)


def test_data_in_another_form_beside_those_that_are_read(tmp_path):
    folder = tmp_path / "set"
    write_jsonl(folder / "train.jsonl", PAIR, OTHER)
    for name in ("part2.xlsx", "part3.jsonl.zip", "README.md", "LICENSE", ".hidden.jsonl", "train.lock"):
        put(folder / name, b"x")
    assert "not read: part2.xlsx (another format), part3.jsonl.zip (another format)" in described(folder)
    (folder / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"holds no data: .*; part2\.xlsx is none of these: export it"):
        rows_of(folder)


# ------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streamed"])
@pytest.mark.parametrize("where", ["record", "message", "list"])
def test_a_name_that_stands_twice_in_one_object(tmp_path, where, streaming):
    """Only one of two values could be kept, and nobody knows which is meant; the same value twice is one."""
    twice = {
        "record": '{"prompt": "q", "response": "a", "prompt": "z"}',
        "message": '{"messages": [{"role": "user", "content": "q", "content": "z"}, '
        '{"role": "assistant", "content": "a"}]}',
        "list": '{"prompt": "q", "response": "a", "meta": [{"x": 1, "x": 2}]}',
    }[where]
    (tmp_path / "same.jsonl").write_text(2 * (twice.replace('"z"', '"q"').replace("2}", "1}") + "\n"))
    assert rows_of(tmp_path / "same.jsonl", streaming) == [" Human: q Assistant: a"] * 2
    (tmp_path / "t.jsonl").write_text(f"{twice.replace('z', 'q').replace('2}', '1}')}\n{twice}\n")
    with pytest.raises(UserError, match=r"t\.jsonl, record 2 \(line 2\): .* stands twice in one object"):
        rows_of(tmp_path / "t.jsonl", streaming)


def test_not_a_number_is_no_value(tmp_path):
    """How Python writes what pandas holds for a missing text."""
    row = '{"instruction": "q", "input": NaN, "output": "a", "score": Infinity}\n'
    assert rows_of(put(tmp_path / "t.jsonl", row)) == [" Human: q Assistant: a"]


SPELLINGS = {
    "comma.jsonl": (LINES.replace(b"}\n", b"},\n"), r"record 2 \(line 1\).*remove the comma before"),
    "wide.jsonl": ('{"prompt": "q"}'.encode("utf-16-le"), r"record 1 \(line 1\).*zero bytes.*UTF-16, save it as UTF-8"),
    "wide.csv": ("prompt,response\nq,a\n".encode("utf-16"), r"not UTF-8 text, but UTF-16.*save it as UTF-8"),
    "tab.csv": ("prompt\tresponse\nq\ta\n", r"separated by '\\t', not by commas: end its name in \.tsv, or .*s\.$"),
    "excel.csv": ("sep=,\nprompt,response\nq,a\n", "the first line, sep=..., is for spreadsheets alone: remove it"),
    "break.jsonl": ('{"prompt": "q\nz", "response": "a"}', "a line break or tab inside a text must be written as"),
    "splits.json": (json.dumps({"train": [PAIR], "test": [PAIR]}), r"in its field .train.: .* > out\.jsonl`\.$"),
    "padded.jsonl": (LINES + bytes(64), r"record 3 \(line 3\).*zero bytes.*copy it again"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_what_stands_between_records(tmp_path, name):
    content, words = SPELLINGS[name]
    with pytest.raises(UserError, match=words):
        rows_of(put(tmp_path / name, content))


def test_columns_without_a_name_at_the_end(tmp_path):
    path = put(tmp_path / "t.csv", "prompt,response,,\nq,a,,\nq,a,x,\n")
    assert rows_of(path) == [" Human: q Assistant: a"] * 2
    assert get_raw_dataset(str(path), str(tmp_path / "cache"), 1, 0).unused_columns() == ['""']
