"""The schema of a data set is that of all its files: shards, types, spellings and shapes that differ."""

import csv
import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from tests.data.prepared_data import prepare
from utils.data import prepare as preparation
from utils.data.data_utils import get_raw_dataset
from utils.data.reading import arrow_files
from utils.data.reading.csv_records import iter_csv_records
from utils.data.reading.data_files import column_names
from utils.data.reading.find_files import find_data_files, other_files
from utils.errors import UserError
from utils.model.tokenizer import load_hf_tokenizer

FIRST = {"instruction": "Name a bird.", "output": "A crane."}
SECOND = {"instruction": "Translate.", "output": "Gruß", "input": "greeting"}
PAIR = {"prompt": "How many legs has a spider?", "response": "Eight."}
OTHER = {"prompt": "And an ant?", "response": "Six."}


def rows_of(path: Path, streaming: bool = False) -> list[str]:
    """The texts of the training rows of a data set of one's own."""
    raw = get_raw_dataset(str(path), str(path.parent / "cache"), 1, 0, streaming=streaming)
    return [raw.get_prompt_and_chosen(row) for row in raw._source_split("train").dataset]


def write_jsonl(path: Path, *rows: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_shards(folder: Path, kind: str, *shards: list[dict]) -> Path:
    folder.mkdir()
    for number, rows in enumerate(shards):
        name = folder / f"train-{number:05d}-of-{len(shards):05d}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), name)
        elif kind == "csv":
            with open(name, "w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        else:
            write_jsonl(name, *rows)
    return folder


# ------------------------------------------------------------------------------- columns of several shards


@pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streamed"])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["without first", "with first"])
def test_an_optional_column_of_one_shard_is_used(tmp_path, kind, order, streaming):
    shards = [[FIRST], [SECOND]]
    texts = rows_of(write_shards(tmp_path / "set", kind, *(shards[place] for place in order)), streaming)
    expected = [
        " Human: Name a bird. Assistant: A crane.",
        " Human: Translate.\ngreeting Assistant: Gruß",
    ]
    assert texts == [expected[place] for place in order]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_column_without_a_type_in_one_shard(tmp_path, order):
    """All null in one shard, texts in the other: what pandas writes for a column nobody filled in there."""
    shards = [[FIRST | {"input": None}], [SECOND]]
    texts = rows_of(write_shards(tmp_path / "set", "parquet", *(shards[place] for place in order)))
    assert ["greeting" in text for text in texts] == [place == 1 for place in order]


def test_columns_are_those_of_all_files(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", PAIR)
    write_jsonl(tmp_path / "b.jsonl", PAIR, PAIR | {"source": "x"})
    assert column_names([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]) == ["prompt", "response", "source"]


def test_a_needed_column_that_a_shard_lacks_is_named_with_the_shard(tmp_path):
    folder = write_shards(tmp_path / "set", "parquet", [FIRST], [{"instruction": "Only this"}])
    with pytest.raises(UserError, match=r"00001-of-00002.parquet lacks the columns output"):
        rows_of(folder)


def test_nested_columns_of_shards_with_different_fields(tmp_path):
    """A known data set with lists of objects: fields it does not need may come and go."""
    folder = tmp_path / "Cohere" / "miracl-zh-queries-22-12"
    folder.mkdir(parents=True)
    passages = [
        [{"docid": "1", "text": "first"}],
        [{"text": "second", "title": None, "score": 0.5}],
    ]
    for split in ("train", "dev"):
        for number, found in enumerate(passages):
            row = {"query": f"q{number}", "positive_passages": found, "negative_passages": []}
            pq.write_table(pa.Table.from_pylist([row]), folder / f"{split}-{number:05d}-of-00002.parquet")
    raw = get_raw_dataset(str(folder), str(tmp_path / "out"), 1, 0)
    assert [raw.get_chosen(row) for row in raw.get_train_data()] == [" first", " second"]


# -------------------------------------------------------------------------------------------- types of columns

TYPES = {
    "category": lambda texts: pa.array(texts).dictionary_encode(),
    "large": lambda texts: pa.array(texts, pa.large_string()),
    "view": lambda texts: pa.array(texts, pa.string_view()),
    "bytes": lambda texts: pa.array([text.encode() for text in texts], pa.binary()),
    "large bytes": lambda texts: pa.array([text.encode() for text in texts], pa.large_binary()),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streamed"])
@pytest.mark.parametrize("kind", TYPES)
def test_texts_of_every_type(tmp_path, kind, streaming):
    column = TYPES[kind](["Eight.", "Drei süße Äpfel", "Eight."])
    pq.write_table(pa.table({"prompt": TYPES[kind](["a", "b", "c"]), "response": column}), tmp_path / "a.parquet")
    texts = rows_of(tmp_path / "a.parquet", streaming)
    assert texts[1] == " Human: b Assistant: Drei süße Äpfel"
    assert len(texts) == 3


def test_a_category_with_few_values_and_an_index(tmp_path):
    """What pandas writes of a categorical column, beside the column of its index."""
    codes = pa.DictionaryArray.from_arrays(pa.array([1, 0, 1], pa.int8()), pa.array(["no", "yes"]))
    table = pa.table({"prompt": ["a", "b", "c"], "response": codes, "__index_level_0__": ["x", "y", "z"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [text.split()[-1] for text in rows_of(tmp_path / "a.parquet")] == ["yes", "no", "yes"]


def invalid_utf8() -> pa.Array:
    return pa.StringArray.from_buffers(
        3, pa.array([0, 1, 3, 4], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff\xfeb"), None, 0
    )


@pytest.mark.parametrize("kind", ["string", "bytes", "nested"])
def test_a_parquet_text_that_is_no_utf8_is_named_with_its_row(tmp_path, kind):
    column = invalid_utf8()
    if kind == "bytes":
        column = pa.array([b"a", b"\xff\xfe", b"b"], pa.binary())
    table = pa.table({"prompt": ["1", "2", "3"], "response": column})
    if kind == "nested":
        messages = pa.StructArray.from_arrays([pa.array(["assistant"] * 3), column], ["role", "content"])
        table = pa.table({"messages": pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), messages)})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r'a.parquet, record 2: "(response|messages)" is not UTF-8 text'):
        rows_of(tmp_path / "a.parquet")


def test_a_saved_text_that_is_no_utf8_is_named_with_its_row(tmp_path):
    table = pa.table({"prompt": ["1", "2", "3"], "response": invalid_utf8()})
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r'saved, record 2: "response" is not UTF-8 text'):
        rows_of(tmp_path / "saved")


# ------------------------------------------------------------------------------------------ conversations


def turns(question: str, **more: Any) -> dict:
    return {"messages": [{"role": "user", "content": question, **more}, {"role": "assistant", "content": "Yes."}]}


@pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streamed"])
def test_a_field_that_is_null_everywhere(tmp_path, streaming):
    rows = [turns("Is it?", name=None), turns("Really?", name=None)]
    expected = [" Human: Is it? Assistant: Yes.", " Human: Really? Assistant: Yes."]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "one.parquet")
    write_jsonl(tmp_path / "two.jsonl", *rows)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "three")
    for name in ("one.parquet", "two.jsonl", "three"):
        assert rows_of(tmp_path / name, streaming) == expected


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_fields_of_messages_may_differ_between_shards(tmp_path, order):
    shards = [[turns("Is it?", name=None)], [turns("Really?", name="Ada", meta={"x": 1})]]
    folder = write_shards(tmp_path / "set", "parquet", *(shards[place] for place in order))
    questions = ["Is it?", "Really?"]
    assert rows_of(folder) == [f" Human: {questions[place]} Assistant: Yes." for place in order]


# -------------------------------------------------------------------------------- empty shards, stray files


@pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streamed"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "jsonl.gz"])
@pytest.mark.parametrize("place", [0, 1])
def test_an_empty_shard_is_one_without_rows(tmp_path, kind, place, streaming):
    folder = write_shards(tmp_path / "set", kind.removesuffix(".gz"), [PAIR], [PAIR])
    shards = sorted(folder.iterdir())
    shards[place].write_bytes(b"")
    if kind.endswith(".gz"):
        for shard in shards:
            (folder / f"{shard.name.upper()}.GZ").write_bytes(gzip.compress(shard.read_bytes()))
            shard.unlink()
    assert rows_of(folder, streaming) == [" Human: How many legs has a spider? Assistant: Eight."]
    raw = get_raw_dataset(str(folder), str(tmp_path / "cache"), 1, 0, streaming=streaming)
    empty = shards[place].name if kind != "jsonl.gz" else f"{shards[place].name.upper()}.GZ"
    assert f"not read: {empty} (empty)" in raw.describe()


@pytest.mark.parametrize("content", [" \n", "\ufeff", "[]", "[\n]"])
def test_nothing_has_many_spellings(tmp_path, content):
    folder = write_shards(tmp_path / "set", "jsonl", [PAIR], [PAIR])
    (folder / "train-00000-of-00002.jsonl").write_text(content.replace("\n]", "]"))
    assert len(rows_of(folder)) == 1
    os.remove(folder / "train-00001-of-00002.jsonl")
    with pytest.raises(UserError, match=r"is empty|holds no records"):
        rows_of(folder)


def test_a_header_alone_is_a_shard_without_rows(tmp_path):
    folder = write_shards(tmp_path / "set", "csv", [PAIR], [PAIR])
    (folder / "train-00000-of-00002.csv").write_text("prompt,response\n")
    assert len(rows_of(folder)) == 1


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("name", ["metadata.json", "a_readme.json", "train_info.json"])
def test_a_file_about_the_data_does_not_speak_for_them(tmp_path, kind, name):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / name).write_text(json.dumps({"author": "me", "rows": 1, "tags": ["x"]}))
    source = write_shards(tmp_path / "shards", kind, [PAIR, PAIR])
    os.replace(next(source.iterdir()), folder / f"part-0.{kind}")
    raw = get_raw_dataset(str(folder), str(tmp_path / "cache"), 1, 0)
    assert len(raw._source_split("train").dataset) == 2
    assert f"not read: {name}" in raw.describe()


def test_one_record_beside_others_is_a_record(tmp_path):
    folder = tmp_path / "set"
    write_jsonl(folder / "a.json", PAIR)
    write_jsonl(folder / "b.json", PAIR, PAIR)
    assert len(rows_of(folder)) == 3
    (folder / "b.json").unlink()
    write_jsonl(folder / "c.json", PAIR)
    write_jsonl(folder / "metadata.json", {"author": "me"})
    assert len(rows_of(folder)) == 2


# ---------------------------------------------------------------------------------------- spellings of text


def test_byte_order_marks_between_records(tmp_path):
    mark, line = "\ufeff", json.dumps(PAIR)
    (tmp_path / "a.jsonl").write_text(f"{mark}{line}\n{mark}{line}\r\n{mark}\n{line}{mark}", encoding="utf-8")
    (tmp_path / "b.json").write_text(f"{mark}[{mark}{line}, {mark}{line},{line}]{mark}\n", encoding="utf-8")
    (tmp_path / "c.csv").write_text(f'{mark}prompt,response\na,"b"\n{mark}"c",d\ne,f\n', encoding="utf-8")
    assert [len(rows_of(tmp_path / name)) for name in ("a.jsonl", "b.json", "c.csv")] == [3, 3, 3]
    assert rows_of(tmp_path / "c.csv")[1] == " Human: c Assistant: d"


@pytest.mark.parametrize("name", ["A.JSONL.GZ", "a.jsonl.gz", "a.Json.Gz"])
def test_compressed_files_in_any_case(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(json.dumps(PAIR).encode()))
    assert len(rows_of(tmp_path / name)) == 1


def test_spaces_in_a_header(tmp_path, capsys):
    (tmp_path / "a.csv").write_text('prompt, response , "the source"\n"a, b", "c", d\nx,  y,z\n')
    assert [record for *_, record in iter_csv_records(str(tmp_path / "a.csv"))] == [
        {"prompt": "a, b", "response": "c", "the source": "d"},
        {"prompt": "x", "response": "y", "the source": "z"},
    ]
    assert len(rows_of(tmp_path / "a.csv")) == 2
    assert "spaces after the commas of a.csv left out" in capsys.readouterr().out


def test_spaces_in_texts_stay(tmp_path):
    (tmp_path / "a.csv").write_text(" prompt ,response\n a , b \n")
    assert rows_of(tmp_path / "a.csv") == [" Human:  a  Assistant:  b "]


BAD = {
    "latin.csv": (
        "prompt,response\na,b\nc,f\xfcr\n".encode("latin-1"),
        r"not UTF-8 text, but another encoding \(line 3",
    ),
    "wide.jsonl": (json.dumps(PAIR).encode("utf-16"), "but UTF-16"),
    "semicolon.csv": (b"prompt;response\na;b\n", "separated by ';', not by commas"),
    "tab.csv": (b"prompt\tresponse\na\tb\n", "separated by '.t', not by commas"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_file_of_text(tmp_path, name):
    content, words = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        rows_of(tmp_path / name)


# ------------------------------------------------------------------------------- one object instead of records

COLUMNS = {name: [PAIR[name], OTHER[name]] for name in PAIR}
SHAPES = {
    "wrapped": ({"version": "1.0", "data": [PAIR, OTHER]}, r'records are in its field "data".*jq -c \'\.data\[\]\''),
    "rows": ({"rows": [PAIR], "total": 1}, 'records are in its field "rows"'),
    "columns": (
        {name: dict(zip("01", texts, strict=True)) for name, texts in COLUMNS.items()},
        "as pandas writes it by default",
    ),
    "names": ({"a1": PAIR, "a2": OTHER}, r"an object for each of 2 names \(.a1., ...\).*jq -c '\.\[\]'"),
    "index": ({"0": PAIR, "1": OTHER}, 'orient="index"'),
    "split": ({"columns": list(PAIR), "index": [0, 1], "data": [list(PAIR.values())]}, 'orient="split"'),
    "table": ({"schema": {"fields": []}, "data": [PAIR | {"index": 0}]}, 'orient="table"'),
    "lists": (COLUMNS, "a list for each column"),
}


@pytest.mark.parametrize("where", ["file", "folder"])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_object_says_what_it_is(tmp_path, shape, where):
    content, words = SHAPES[shape]
    path = tmp_path / "set" / "train.json"
    path.parent.mkdir()
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words) as caught:
        rows_of(path if where == "file" else path.parent)
    assert str(path) in str(caught.value)
    if shape not in ("wrapped", "rows"):
        assert "to_json(path" in str(caught.value)


def test_a_file_of_one_record_is_no_such_object(tmp_path):
    write_jsonl(tmp_path / "a.json", PAIR | {"sources": [{"url": "x"}]})
    write_jsonl(tmp_path / "b.json", turns("Is it?"))
    assert [len(rows_of(tmp_path / name)) for name in ("a.json", "b.json")] == [1, 1]


# ----------------------------------------------------------------------------------------------------- links


def test_links_to_files_and_folders(tmp_path):
    folder = tmp_path / "set"
    write_jsonl(folder / "b" / "one.jsonl", PAIR)
    write_jsonl(tmp_path / "elsewhere" / "two.jsonl", OTHER)
    (folder / "a.jsonl").symlink_to(folder / "b" / "one.jsonl")
    (folder / "z").symlink_to(tmp_path / "elsewhere")
    (folder / "b" / "up").symlink_to(folder)
    (folder / "b" / "self").symlink_to(folder / "b")
    (folder / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    found = find_data_files(str(folder))
    assert [os.path.relpath(file, folder) for file in found["train"]] == ["b/one.jsonl", "z/two.jsonl"]
    assert other_files(str(folder), found) == [
        "a.jsonl (links to b/one.jsonl)",
        "b/self (links to a folder that is read)",
        "b/up (links to a folder that is read)",
    ]
    raw = get_raw_dataset(str(folder), str(tmp_path / "cache"), 1, 0)
    assert len(raw._source_split("train").dataset) == 2
    assert "not read: a.jsonl (links to b/one.jsonl), b/self" in raw.describe()


def test_one_file_under_two_splits_is_in_both(tmp_path):
    """Files of a hub cache are links to their content: equal ones lead to the same."""
    folder = tmp_path / "set"
    write_jsonl(tmp_path / "blob", PAIR)
    folder.mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        (folder / name).symlink_to(tmp_path / "blob")
    assert sorted(find_data_files(str(folder))) == ["test", "train"]


# --------------------------------------------------------------------------- files that change while they are read


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", PAIR)
    plain = arrow_files._write_arrow

    def written_to_meanwhile(*arguments):
        plain(*arguments)
        write_jsonl(tmp_path / "a.jsonl", PAIR, OTHER)

    monkeypatch.setattr(arrow_files, "_write_arrow", written_to_meanwhile)
    with pytest.raises(UserError, match=r"a.jsonl changed while it was read"):
        rows_of(tmp_path / "a.jsonl")
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    monkeypatch.undo()
    assert len(rows_of(tmp_path / "a.jsonl")) == 2


def test_a_saved_data_set_that_changes_while_it_is_tokenized_is_noticed(tmp_path, monkeypatch):
    datasets.Dataset.from_list([PAIR, OTHER] * 10).save_to_disk(tmp_path / "saved")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    plain = preparation.tokenize_part

    def written_to_meanwhile(*arguments):
        arrow.write_bytes(arrow.read_bytes() + b"more")
        return plain(*arguments)

    monkeypatch.setattr(preparation, "tokenize_part", written_to_meanwhile)
    with pytest.raises(UserError, match=r"saved changed while it was read"):
        prepare([tmp_path / "saved"], tmp_path / "cache", load_hf_tokenizer(str(ROOT / "demo" / "tiny_opt")), 64)
    assert not list((tmp_path / "cache").glob("prompts_*"))


def test_rows_that_are_all_dropped_are_counted(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", *[PAIR | {"response": " "}] * 20)
    with pytest.raises(
        UserError, match=r"all 18 training rows of .*a.jsonl that this phase reads were dropped \(18 no answer\)"
    ):
        prepare([tmp_path / "a.jsonl"], tmp_path / "cache", load_hf_tokenizer(str(ROOT / "demo" / "tiny_opt")), 64)
