"""Every data set against its rows as pyarrow reads them, every way to bring data, every kind of bad data."""

import gzip
import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import OfflineModeIsEnabled

from utils.data import raw_datasets
from utils.data.raw_datasets import RAW_DATASETS, PromptRawDataset, find_raw_dataset_class
from utils.data.reading import arrow_files as loading
from utils.data.reading import hub
from utils.data.reading import records as json_records
from utils.data.reading.find_files import find_data_files
from utils.data.reading.records import iter_json_records
from utils.data.splits import get_raw_dataset_split_index
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
HUB = ROOT.parent / "shared" / "data" / "hub"
LOCAL_JSON = ROOT.parent / "shared" / "data" / "local_json"
needs_data = pytest.mark.skipif(not HUB.exists(), reason="the shared data is not here")

GETTERS = ("get_prompt", "get_chosen", "get_rejected", "get_prompt_and_chosen", "get_prompt_and_rejected")


def build(argument, output_path, seed=1234) -> PromptRawDataset:
    return find_raw_dataset_class(str(argument))(str(output_path), seed, -1, str(argument))


def texts(source: PromptRawDataset, sample: dict) -> tuple:
    return tuple(getattr(source, getter)(sample) for getter in GETTERS)


# ------------------------------------------------------- expected texts, written from the specification


def five(prompt, chosen, rejected):
    both = [None if None in (prompt, answer) else prompt + answer for answer in (chosen, rejected)]
    return (prompt, chosen, rejected, *both)


def H(text):
    return " Human: " + text + " Assistant:"


def plain(row):
    return five(row["prompt"], row["chosen"], row["rejected"])


def synthetic(row):
    return five(H(row["prompt"]), " " + row["chosen"], " " + row["rejected"])


def yitingxie(row):
    answers = [row[name].rsplit("Assistant:", 1)[-1] for name in ("chosen", "rejected")]
    joined = [row["prompt"] + row[name] for name in ("chosen", "rejected")]
    return (row["prompt"] + "Assistant:", *answers, *joined)


def webgpt(row):
    answers = [row["answer_0"], row["answer_1"]]
    if row["score_1"] > row["score_0"]:
        answers.reverse()
    answers = [re.sub(r"[\[(].*?[\])]", "", re.sub(r" [\[(].*?[\])]", "", answer)) for answer in answers]
    return five(H(row["question"]["full_text"]), " " + answers[0], " " + answers[1])


def shp(row):
    answers = [row["human_ref_A"], row["human_ref_B"]]
    if row["labels"] != 1:
        answers.reverse()
    return five(H(row["history"]), " " + answers[0], " " + answers[1])


def pvduy(row):
    prompt, label = row["prompt"], row["label"]
    prompt = prompt.replace("USER", "Human").replace("ASSISTANT", "Assistant") if prompt else None
    return five(prompt, " " + label if label else None, None)


def zhihu(row):
    prompt, answer = row["INSTRUCTION"], row["RESPONSE"]
    return five(H(prompt) if prompt is not None else None, " " + answer if answer is not None else None, None)


def miracl(row):
    answers = [row[name] for name in ("positive_passages", "negative_passages")]
    return five(H(row["query"]), *(" " + passages[0]["text"] if passages else None for passages in answers))


def hc3(row):
    return five(H(row["question"]), " " + row["human_answers"][0], None)


def mkqa(language):
    def expected(row):
        answer = row["answers"][language][0]["text"]
        return five(H(row["queries"][language]), None if answer is None else " " + answer, None)

    return expected


def qg_jaquad(row):
    return five(H(row["question"]), " " + row["sentence"], None)


def qag_jaquad(row):
    return five(H(row["questions"][0]), " " + row["paragraph"], None)


SPECIFICATION = [
    ("Dahoas/rm-static", "DahoasRmstaticDataset", "Dahoas_rm_static", "test", plain),
    ("Dahoas/full-hh-rlhf", "DahoasFullhhrlhfDataset", "Dahoas_full_hh_rlhf", "test", plain),
    (
        "Dahoas/synthetic-instruct-gptj-pairwise",
        "DahoasSyntheticinstructgptjpairwiseDataset",
        "Dahoas_synthetic_instruct_gptj_pairwise",
        None,
        synthetic,
    ),
    (
        "yitingxie/rlhf-reward-datasets",
        "YitingxieRlhfrewarddatasetsDataset",
        "yitingxie_rlhf_reward_datasets",
        "test",
        yitingxie,
    ),
    (
        "openai/webgpt_comparisons",
        "OpenaiWebgptcomparisonsDataset",
        "openai_webgpt_comparisons",
        None,
        webgpt,
    ),
    ("stanfordnlp/SHP", "StanfordnlpSHPDataset", "stanfordnlp_SHP", "validation", shp),
    (
        "pvduy/sharegpt_alpaca_oa_vicuna_format",
        "PvduySharegptalpacaoavicunaformatDataset",
        "pvduy_sharegpt_alpaca_oa_vicuna_format",
        "test",
        pvduy,
    ),
    ("wangrui6/Zhihu-KOL", "Wangrui6ZhihuKOLDataset", "wangrui6_Zhihu_KOL", None, zhihu),
    (
        "Cohere/miracl-zh-queries-22-12",
        "CohereMiraclzhqueries2212Dataset",
        "Cohere_miracl_zh_queries_22_12",
        "dev",
        miracl,
    ),
    (
        "Cohere/miracl-ja-queries-22-12",
        "CohereMiracljaqueries2212Dataset",
        "Cohere_miracl_ja_queries_22_12",
        "dev",
        miracl,
    ),
    (
        "Hello-SimpleAI/HC3-Chinese",
        "HelloSimpleAIHC3ChineseDataset",
        "Hello_SimpleAI_HC3_Chinese",
        None,
        hc3,
    ),
    ("mkqa-Chinese", "MkqaChineseDataset", "mkqa", None, mkqa("zh_cn")),
    ("mkqa-Japanese", "MkqaJapaneseDataset", "mkqa", None, mkqa("ja")),
    ("lmqg/qg_jaquad", "LmqgQgjaquadDataset", "lmqg_qg_jaquad", "validation", qg_jaquad),
    ("lmqg/qag_jaquad", "LmqgQagjaquadDataset", "lmqg_qag_jaquad", "validation", qag_jaquad),
]


def raw_rows(name: str, split: str) -> list[dict]:
    folder = HUB / ("mkqa" if name.startswith("mkqa") else name) / "data"
    (file,) = folder.glob(f"{split}-*.parquet")
    return pq.read_table(file).to_pylist()


@needs_data
@pytest.mark.parametrize(
    ("name", "class_name", "clean", "eval_split", "expected"), SPECIFICATION, ids=[row[0] for row in SPECIFICATION]
)
def test_texts_are_the_specified_ones(tmp_path, name, class_name, clean, eval_split, expected):
    source = build(HUB / name, tmp_path)
    assert type(source) is getattr(raw_datasets, class_name)
    assert source.dataset_name_clean == clean
    assert source.dataset_name == ("mkqa" if name.startswith("mkqa") else name)
    train = raw_rows(name, "train")
    if eval_split is None:
        arguments = (-1, str(tmp_path), clean, 1234, "train_eval", "9,1")
        parts = [get_raw_dataset_split_index(*arguments, part, len(train)) for part in (0, 1)]
        assert os.path.exists(tmp_path / f"{clean}_seed1234_train_eval_9,1_1.npy")
        rows = [[train[number] for number in part] for part in parts]
        assert len(rows[0]) + len(rows[1]) == len(train)
    else:
        rows = [train, raw_rows(name, eval_split)]
    for found, wanted in zip((source.get_train_data(), source.get_eval_data()), rows, strict=True):
        assert [texts(source, sample) for sample in found] == [expected(row) for row in wanted]


def test_the_specification_names_every_class_but_the_local_one():
    assert {row[0] for row in SPECIFICATION} | {"local/jsonfile"} == set(RAW_DATASETS)


# -------------------------------------------------------------------- texts from rows that are special


def without_data(name: str) -> PromptRawDataset:
    cls = find_raw_dataset_class(name)
    return cls.__new__(cls)


def test_webgpt_brackets_and_ties():
    source = without_data("openai/webgpt_comparisons")
    row = {
        "question": {"full_text": "Why?"},
        "answer_0": "One [1] two(see [2]) three (a (b) c).",
        "answer_1": "Other[3].",
        "score_0": 0.5,
        "score_1": 0.5,
    }
    assert source.get_chosen(row) == " One two three c)."
    assert source.get_rejected(row) == " Other."
    assert source.get_chosen(row | {"score_1": 0.6}) == " Other."
    assert source.get_rejected(row | {"score_1": 0.6}) == " One two three c)."
    assert source.get_chosen(row | {"answer_0": None}) is None


def test_webgpt_brackets_after_a_space_go_first():
    source = without_data("openai/webgpt_comparisons")
    assert source.answer({"answer_0": "x(a (b) c)"}, 0) == " x"


def test_missing_answers_make_the_joined_text_none():
    source = without_data("Cohere/miracl-ja-queries-22-12")
    row = {"query": "q", "positive_passages": [{"text": "p"}], "negative_passages": []}
    assert texts(source, row) == (" Human: q Assistant:", " p", None, " Human: q Assistant: p", None)
    source = without_data("mkqa-Chinese")
    row = {"queries": {"zh_cn": "q"}, "answers": {"zh_cn": [{"text": None}]}}
    assert texts(source, row) == (" Human: q Assistant:", None, None, None, None)


@pytest.mark.parametrize("prompt", ["", None])
def test_sharegpt_empty_prompt(prompt):
    source = without_data("pvduy/sharegpt_alpaca_oa_vicuna_format")
    assert texts(source, {"prompt": prompt, "label": "x"}) == (None, " x", None, None, None)
    assert source.get_chosen({"prompt": "x", "label": prompt}) is None


def test_yitingxie_takes_the_part_after_the_last_assistant():
    source = without_data("yitingxie/rlhf-reward-datasets")
    row = {"prompt": "\n\nHuman: a\n\n", "chosen": "Assistant: b\n\nHuman: c\n\nAssistant: d", "rejected": "e"}
    assert texts(source, row) == (
        "\n\nHuman: a\n\nAssistant:",
        " d",
        "e",
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "\n\nHuman: a\n\ne",
    )


# --------------------------------------------------------------------------------------------- names


def test_a_name_matches_when_it_is_contained():
    assert find_raw_dataset_class("/mnt/mirror/Dahoas/rm-static") is RAW_DATASETS["Dahoas/rm-static"]
    assert find_raw_dataset_class("mkqa-Japanese") is RAW_DATASETS["mkqa-Japanese"]


def test_the_longest_match_wins():
    assert find_raw_dataset_class("/mkqa-Chinese/Dahoas/rm-static") is RAW_DATASETS["Dahoas/rm-static"]


def test_unknown_name():
    with pytest.raises(UserError) as error:
        find_raw_dataset_class("someone/else")
    message = str(error.value)
    assert '"someone/else"' in message
    assert all(name in message for name in RAW_DATASETS)
    assert "local/jsonfile" in message and "utils/data/raw_datasets.py" in message


@pytest.fixture
def my_dataset():
    """A data set as the top of the module describes it."""

    class MyDataset(PromptRawDataset):
        dataset_name = "me/my-data"
        eval_split = "test"
        prompt = raw_datasets.human("question")
        chosen = raw_datasets.reply("answers", 0, "text")
        rejected = None

    yield MyDataset
    del RAW_DATASETS["me/my-data"]


def write_jsonl(path: Path, *records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def qa(number: int) -> dict:
    return {"question": f"q{number}", "answers": [{"text": f"a{number}", "start": 3}], "more": [1, "x"]}


def test_a_new_data_set_is_five_lines(tmp_path, my_dataset):
    write_jsonl(tmp_path / "me/my-data/train.jsonl", qa(1), qa(2), {"question": "q3", "answers": []})
    write_jsonl(tmp_path / "me/my-data/test.jsonl", qa(4))
    source = build(tmp_path / "me/my-data", tmp_path / "out")
    assert source.dataset_name_clean == "me_my_data"
    assert source.get_train_data().column_names == ["question", "answers"]
    joined = [source.get_prompt_and_chosen(sample) for sample in source.get_train_data()]
    assert joined == [" Human: q1 Assistant: a1", " Human: q2 Assistant: a2", None]
    assert [source.get_rejected(sample) for sample in source.get_eval_data()] == [None]


# --------------------------------------------------------------------------------- ways to bring data


def pair(number: int) -> dict:
    return {"prompt": f"p{number}", "chosen": f"c{number}", "rejected": f"r{number}"}


def rm_static(folder: Path, output_path: Path) -> list[list[str]]:
    source = build(folder, output_path)
    return [
        [source.get_prompt_and_rejected(sample) for sample in data]
        for data in (source.get_train_data(), source.get_eval_data())
    ]


EXPECTED = [["p1r1", "p2r2"], ["p3r3"]]


@pytest.fixture
def mirror(tmp_path) -> Path:
    folder = tmp_path / "mirror" / "Dahoas" / "rm-static"
    folder.mkdir(parents=True)
    return folder


def dataset_of(*numbers: int) -> datasets.Dataset:
    return datasets.Dataset.from_list([pair(number) for number in numbers])


def test_save_to_disk_folder(tmp_path, mirror):
    datasets.DatasetDict({"train": dataset_of(1, 2), "test": dataset_of(3)}).save_to_disk(mirror)
    assert rm_static(mirror, tmp_path / "out") == EXPECTED


def test_save_to_disk_of_selected_rows(tmp_path, mirror):
    both = {"train": dataset_of(0, 1, 2, 5).select([1, 2]), "test": dataset_of(3)}
    datasets.DatasetDict(both).save_to_disk(mirror)
    assert rm_static(mirror, tmp_path / "out") == EXPECTED


def test_save_to_disk_of_one_split_is_the_train_split(tmp_path):
    folder = tmp_path / "Dahoas/synthetic-instruct-gptj-pairwise"
    dataset_of(*range(10)).save_to_disk(folder)
    source = build(folder, tmp_path / "out")
    assert (len(source.get_train_data()), len(source.get_eval_data())) == (9, 1)


def test_jsonl_files(tmp_path, mirror):
    write_jsonl(mirror / "train.jsonl", pair(1), pair(2))
    write_jsonl(mirror / "test.jsonl", pair(3))
    assert rm_static(mirror, tmp_path / "out") == EXPECTED


def test_json_lists_in_folders_and_gzip(tmp_path, mirror):
    (mirror / "deep" / "train").mkdir(parents=True)
    with gzip.open(mirror / "deep" / "train" / "0000.json.gz", "wt") as file:
        json.dump([pair(1), pair(2)], file, indent=2)
    (mirror / "test.json").write_text("\ufeff" + json.dumps([pair(3)]), encoding="utf-8")
    assert rm_static(mirror, tmp_path / "out") == EXPECTED


def test_shards_with_different_spellings_of_a_text(tmp_path, mirror):
    first, second = pa.Table.from_pylist([pair(1)]), pa.Table.from_pylist([pair(2)])
    large = pa.schema([(name, pa.large_string()) for name in first.column_names])
    pq.write_table(first.cast(large), mirror / "train-00000-of-00002-2a1df75c6bce91ab.parquet")
    # Another order of columns, and one more.
    second = second.select(["rejected", "prompt", "chosen"]).append_column("id", [[7]])
    pq.write_table(second, mirror / "train-00001-of-00002-2a1df75c6bce91ab.parquet")
    pq.write_table(pa.Table.from_pylist([pair(3)]), mirror / "test-00000-of-00001.parquet")
    assert rm_static(mirror, tmp_path / "out") == EXPECTED


def test_bookkeeping_files_are_no_data(tmp_path, mirror):
    write_jsonl(mirror / "train.jsonl", pair(1), pair(2))
    write_jsonl(mirror / "test.jsonl", pair(3))
    write_jsonl(mirror / ".cache" / "huggingface" / "train.jsonl", pair(9))
    write_jsonl(mirror / ".train.jsonl", pair(9))
    write_jsonl(mirror / "dataset_infos.json", {"default": {}})
    write_jsonl(mirror / "notes.json", {"author": "me"})
    (mirror / "README.md").write_text("train")
    assert rm_static(mirror, tmp_path / "out") == EXPECTED


def test_mkqa_under_either_name(tmp_path):
    row = {"queries": {"zh_cn": "q", "ja": "j"}, "answers": {"zh_cn": [{"text": "a"}], "ja": [{"text": "b"}]}}
    write_jsonl(tmp_path / "mkqa" / "mkqa.jsonl", row, row)
    source = build(tmp_path / "mkqa-Japanese", tmp_path / "out")
    assert source.get_prompt_and_chosen(source.get_train_data()[0]) == " Human: j Assistant: b"
    os.rename(tmp_path / "mkqa", tmp_path / "mkqa-Chinese")
    source = build(tmp_path / "mkqa-Chinese", tmp_path / "out")
    assert source.get_prompt_and_chosen(source.get_train_data()[0]) == " Human: q Assistant: a"


def test_one_configuration_of_several(tmp_path):
    folder = tmp_path / "Hello-SimpleAI" / "HC3-Chinese"
    row = {"question": "q", "human_answers": ["a"]}
    write_jsonl(folder / "all.jsonl", row, row, row)
    write_jsonl(folder / "baike.jsonl", row)
    source = build(folder, tmp_path / "out")
    assert len(source.get_train_data()) + len(source.get_eval_data()) == 3


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["data/train-00000-of-00001.parquet", "data/dev-00000-of-00001.parquet"], {"train", "dev"}),
        (["validation.jsonl", "test.jsonl", "train.jsonl"], {"validation", "test", "train"}),
        (["processed/train00.jsonl", "processed/validation00.jsonl"], {"train", "validation"}),
        (["default/train/0000.parquet", "default/dev/0000.parquet"], {"train", "dev"}),
        (["train_sft-00000-of-00001.parquet"], {"train_sft"}),
        (["anything.jsonl", "else.jsonl"], {"train"}),
        (["train.parquet", "test.json"], {"train"}),
    ],
)
def test_splits_keep_their_names(tmp_path, names, splits):
    for name in names:
        (tmp_path / "test_data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "test_data" / name).touch()
    assert set(find_data_files(str(tmp_path / "test_data"))) == splits


def test_a_validation_split_of_another_name_is_taken(tmp_path):
    row = {"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 0}
    write_jsonl(tmp_path / "stanfordnlp/SHP/train.jsonl", row)
    write_jsonl(tmp_path / "stanfordnlp/SHP/dev.jsonl", row)
    source = build(tmp_path / "stanfordnlp/SHP", tmp_path / "out")
    assert source.get_chosen(source.get_eval_data()[0]) == " b"


def test_rows_are_memory_mapped_and_descriptions_travel(tmp_path, mirror):
    write_jsonl(mirror / "train.jsonl", pair(1), pair(2))
    write_jsonl(mirror / "test.jsonl", pair(3))
    source = build(mirror, tmp_path / "out")
    assert source.get_train_data().cache_files[0]["filename"].startswith(str(tmp_path / "out"))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.get_prompt_and_chosen(copy.get_train_data()[0]) == "p1c1"
    assert sorted(entry.name for entry in mirror.iterdir()) == ["test.jsonl", "train.jsonl"]


# ------------------------------------------------------------------------------------ bad local data


def fails(argument, output_path, *words: str) -> str:
    with pytest.raises(UserError) as error:
        build(argument, output_path)
    for word in words:
        assert word in str(error.value)
    return str(error.value)


def test_missing_split(tmp_path, mirror):
    write_jsonl(mirror / "train.jsonl", pair(1))
    fails(mirror, tmp_path / "out", str(mirror), 'no split "test"', "found: train", "test.jsonl")
    datasets.DatasetDict({"train": dataset_of(1), "validation": dataset_of(3)}).save_to_disk(mirror)
    fails(mirror, tmp_path / "out", str(mirror), 'no split "test"', "found: train, validation")


def test_missing_folder_and_empty_folder(tmp_path, mirror):
    fails(mirror, tmp_path / "out", str(mirror), "holds no data", ".jsonl", "save_to_disk")
    mirror.rmdir()
    fails(mirror, tmp_path / "out", str(mirror), "does not exist", "give Dahoas/rm-static alone")
    fails("./Dahoas/rm-static", tmp_path / "out", "does not exist")


def test_parquet_columns(tmp_path, mirror):
    pq.write_table(pa.table({"prompt": ["p"], "answer": ["a"]}), mirror / "train.parquet")
    pq.write_table(pa.table({"prompt": ["p"], "answer": ["a"]}), mirror / "test.parquet")
    fails(mirror, tmp_path / "out", "train.parquet", "lacks the columns chosen, rejected", "found: prompt, answer")
    table = pa.table({"prompt": ["p"], "chosen": [["a"]], "rejected": ["r"]})
    pq.write_table(table, mirror / "train.parquet")
    fails(mirror, tmp_path / "out", "train.parquet", '"chosen" holds list', "a string is needed")


def test_parquet_that_cannot_be_read(tmp_path, mirror):
    pq.write_table(pa.Table.from_pylist([pair(3)]), mirror / "test.parquet")
    (mirror / "train.parquet").write_bytes((mirror / "test.parquet").read_bytes()[:-20])
    fails(mirror, tmp_path / "out", "train.parquet", "no complete parquet file")


def test_no_rows(tmp_path, mirror):
    empty = pa.Table.from_pylist([pair(3)])[:0]
    pq.write_table(empty, mirror / "train.parquet")
    pq.write_table(empty, mirror / "test.parquet")
    fails(mirror, tmp_path / "out", str(mirror), "holds no records")


def test_json_row_of_another_type(tmp_path, mirror):
    write_jsonl(mirror / "train.jsonl", pair(1), pair(2) | {"chosen": ["c"]})
    write_jsonl(mirror / "test.jsonl", pair(3))
    fails(mirror, tmp_path / "out", "train.jsonl, record 2 (line 2)", '"chosen" is a list where a string')


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"answers": [{"text": "a"}]}, 'has no "question" (it has answers)'),
        ({"question": 5, "answers": []}, '"question" is a number where a string is needed'),
        ({"question": "q", "answers": "a"}, '"answers" is a string where a list is needed'),
        ({"question": "q", "answers": [{"text": "a"}, "b"]}, '"answers[1]" is a string where an object'),
        ({"question": "q", "answers": [{"words": "a"}]}, '"answers[0].text" is missing'),
        ({"question": "q", "answers": [{"text": True}]}, '"answers[0].text" is true or false'),
    ],
)
def test_faults_deep_inside_a_record(tmp_path, my_dataset, record, fault):
    write_jsonl(tmp_path / "me/my-data/train.jsonl", qa(1), record)
    write_jsonl(tmp_path / "me/my-data/test.jsonl", qa(4))
    fails(tmp_path / "me/my-data", tmp_path / "out", "train.jsonl, record 2 (line 2)", fault)


def test_types_deep_inside_parquet(tmp_path, my_dataset):
    folder = tmp_path / "me" / "my-data"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"question": ["q"], "answers": [[{"words": "a"}]]}), folder / "train.parquet")
    pq.write_table(pa.table({"question": ["q"], "answers": [[{"text": 1}]]}), folder / "test.parquet")
    fails(folder, tmp_path / "out", "train.parquet", '"answers[]" has no field "text"')
    os.replace(folder / "test.parquet", folder / "train.parquet")
    fails(folder, tmp_path / "out", "train.parquet", '"answers[].text" holds int64 where a string')


def test_null_label_in_parquet(tmp_path):
    folder = tmp_path / "stanfordnlp" / "SHP"
    folder.mkdir(parents=True)
    row = {"history": "h", "human_ref_A": "a", "human_ref_B": "b"}
    table = pa.Table.from_pylist([row | {"labels": label} for label in (1, 0, None)])
    for split in ("train", "validation"):
        pq.write_table(table, folder / f"{split}.parquet")
    fails(folder, tmp_path / "out", str(folder), "record 3", '"labels" is null')


def test_damaged_save_to_disk_folder(tmp_path, mirror):
    datasets.DatasetDict({"train": dataset_of(1, 2), "test": dataset_of(3)}).save_to_disk(mirror)
    (mirror / "train" / "data-00000-of-00001.arrow").unlink()
    fails(mirror, tmp_path / "out", str(mirror), "no complete save_to_disk folder")


def test_unwritable_output_folder(tmp_path, mirror):
    write_jsonl(mirror / "train.jsonl", pair(1))
    write_jsonl(mirror / "test.jsonl", pair(3))
    (tmp_path / "file").touch()
    fails(mirror, tmp_path / "file", "cannot be written", "--data_output_path")


# ------------------------------------------------------------------------------------ local/jsonfile


@pytest.fixture
def data_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(raw_datasets.LocalJsonFileDataset, "data_folder", str(tmp_path / "data"))
    write_jsonl(tmp_path / "data" / "eval.json", pair(9))
    return tmp_path / "data"


def test_local_jsonfile_lies_at_the_repository_root():
    folder = raw_datasets.LocalJsonFileDataset.data_folder
    assert os.path.realpath(folder) == os.path.realpath(ROOT / "data")


@needs_data
def test_local_jsonfile_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(raw_datasets.LocalJsonFileDataset, "data_folder", str(LOCAL_JSON))
    source = build("local/jsonfile", tmp_path)
    for split, data in (("train", source.get_train_data()), ("eval", source.get_eval_data())):
        rows = json.loads((LOCAL_JSON / f"{split}.json").read_text(encoding="utf-8"))
        assert len(data) == len(rows)
        for sample, row in zip(data, rows, strict=True):
            prompt, chosen, rejected = " " + row["prompt"], " " + row["chosen"], row.get("rejected")
            assert texts(source, sample) == five(prompt, chosen, None if rejected is None else " " + rejected)


def test_local_jsonfile_without_rejected(tmp_path, data_folder):
    write_jsonl(data_folder / "train.json", {"prompt": "p", "chosen": "c"}, pair(2) | {"rejected": None})
    source = build("local/jsonfile", tmp_path / "out")
    found = [texts(source, sample) for sample in source.get_train_data()]
    assert found == [(" p", " c", None, " p c", None), (" p2", " c2", None, " p2 c2", None)]


def test_local_jsonfile_from_a_folder_of_that_name(tmp_path):
    write_jsonl(tmp_path / "local/jsonfile/train.jsonl", pair(1))
    write_jsonl(tmp_path / "local/jsonfile/eval.json", pair(2))
    source = build(tmp_path / "local/jsonfile", tmp_path / "out")
    assert source.get_chosen(source.get_train_data()[0]) == " c1"


LINE = b'{"prompt": "p", "chosen": "c"}'
BAD_FILES = {
    "missing": (None, "local/jsonfile needs the file"),
    "empty": (b"", "is empty"),
    "white space": (b" \n", "is empty"),
    "no records": (b"[]", "holds no records"),
    "words": (b"prompt,chosen", "does not begin with a list or an object"),
    "one object": (b'{"data": []}', 'record 1 (line 1): has no "prompt" (it has data)'),
    "cut off list": (b"[\n" + LINE + b",\n" + LINE, "ends after record 2 (line 3) without the closing ]"),
    "cut off string": (b"[\n" + LINE + b',\n{"prompt": "p', "record 2 (line 3) is not valid JSON"),
    "cut off line": (LINE + b'\n{"prompt": ', "record 2 (line 2) is not valid JSON"),
    "missing comma": (b"[" + LINE + b"\n" + LINE + b"]", 'line 2: a "," is missing after record 1'),
    "trailing comma": (b"[" + LINE + b",]", "record 2 (line 1) is not valid JSON"),
    "two lists": (b"[" + LINE + b"]\n[" + LINE + b"]", "goes on after the closing ] (line 2)"),
    "list of texts": (b'["p"]', "record 1 (line 1) is a string"),
    "list of lists": (b"[[]]", "record 1 (line 1) is a list"),
    "number line": (LINE + b"\n7", "record 2 (line 2) is a number"),
    "no prompt": (LINE + b'\n{"chosen": "c"}', 'record 2 (line 2): has no "prompt" (it has chosen)'),
    "no chosen": (b'[\n\n{\n"prompt": "p"}]', 'record 1 (line 3): has no "chosen"'),
    "null prompt": (b'{"prompt": null, "chosen": "c"}', 'record 1 (line 1): has null for "prompt"'),
    "number": (b'{"prompt": "p", "chosen": 3}', '"chosen" is a number where a string is needed'),
    "list": (LINE + b'\n{"prompt": "p", "chosen": ["c"]}', '"chosen" is a list where a string is needed'),
    "object": (b'{"prompt": {}, "chosen": "c"}', '"prompt" is an object where a string is needed'),
    "rejected": (b'{"prompt": "p", "chosen": "c", "rejected": 0}', '"rejected" is a number'),
    "surrogate": (b'{"prompt": "p", "chosen": "\\ud83d"}', '"chosen" holds half of a two-part character'),
    "not UTF-8": ('{"prompt": "ä", "chosen": "c"}'.encode("latin-1"), "is not UTF-8"),
}


@pytest.mark.parametrize("content, words", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_json_files(tmp_path, data_folder, content, words):
    if content is not None:
        (data_folder / "train.json").write_bytes(content)
    message = fails("local/jsonfile", tmp_path / "out", words)
    assert str(data_folder) in message
    assert "holds no records" in message or "train.json" in message


def test_bad_gzip(tmp_path):
    path = tmp_path / "train.json.gz"
    path.write_bytes(gzip.compress(LINE)[:-9])
    with pytest.raises(UserError, match="no complete gzip file"):
        list(iter_json_records(str(path)))
    path.write_bytes(b"text")
    with pytest.raises(UserError, match=r"not compressed as its name says: take \.gz off its name"):
        list(iter_json_records(str(path)))


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_records_are_read_across_blocks(tmp_path, monkeypatch, block):
    monkeypatch.setattr(json_records, "BLOCK_CHARS", block)
    records = [{"prompt": 'a "quoted" \\ [{"' * 20, "n": 12345.5, "t": True}, {"é\u2028": None}, {}]
    path = tmp_path / "file.json"
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    assert [record for _, _, record in iter_json_records(str(path))] == records
    path.write_text("\n\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    found = list(iter_json_records(str(path)))
    assert found == [(1, 1, records[0]), (2, 3, records[1]), (3, 5, records[2])]


def test_a_fault_early_in_a_large_file_does_not_read_it_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "BLOCK_CHARS", 100)
    path = tmp_path / "file.jsonl"
    path.write_text('{"prompt" "p"}\n' + '{"prompt": "p"}\n' * 100_000)
    with open(path) as stream:
        reader = json_records._Reader(stream)
        reader.peek()
        with pytest.raises(json.JSONDecodeError):
            reader.value()
        assert len(reader.text) == 100


# -------------------------------------------------------------------------------- caches, fingerprints


def test_an_edited_file_is_noticed(tmp_path, data_folder):
    path = write_jsonl(data_folder / "train.json", pair(1))
    before = build("local/jsonfile", tmp_path / "out")
    stamp = path.stat()
    write_jsonl(path, pair(2))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same size, same time
    after = build("local/jsonfile", tmp_path / "out")
    assert after.get_chosen(after.get_train_data()[0]) == " c2"
    assert before.get_chosen(before.get_train_data()[0]) == " c1"
    assert after.fingerprint("train") != before.fingerprint("train")
    assert after.fingerprint("eval") == before.fingerprint("eval") != after.fingerprint("train")


def test_unchanged_data_is_converted_once(tmp_path, data_folder, monkeypatch, capsys):
    write_jsonl(data_folder / "train.json", pair(1))
    build("local/jsonfile", tmp_path / "out")
    assert capsys.readouterr().out.count("new or changed data") == 2
    monkeypatch.setattr(loading, "_write_arrow", None)
    source = build("local/jsonfile", tmp_path / "out")
    assert source.get_chosen(source.get_train_data()[0]) == " c1"
    assert capsys.readouterr().out == ""


def test_a_damaged_arrow_file_is_made_again(tmp_path, data_folder):
    write_jsonl(data_folder / "train.json", pair(1))
    build("local/jsonfile", tmp_path / "out")
    for file in (tmp_path / "out" / "arrow").glob("*.arrow"):
        file.write_bytes(b"")
    source = build("local/jsonfile", tmp_path / "out")
    assert source.get_chosen(source.get_train_data()[0]) == " c1"


def test_a_fingerprint_follows_seed_and_description(tmp_path, my_dataset):
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    divided = write_jsonl(tmp_path / "Dahoas/synthetic-instruct-gptj-pairwise/train.jsonl", row, row).parent
    seeds = [build(divided, tmp_path / "out", seed) for seed in (1, 2)]
    assert seeds[0].fingerprint("train") != seeds[1].fingerprint("train")
    assert seeds[0].fingerprint("train") != seeds[0].fingerprint("eval")
    for folder in ("Dahoas/rm-static", "Dahoas/full-hh-rlhf"):
        for split in ("train", "test"):
            write_jsonl(tmp_path / folder / f"{split}.jsonl", row)
    fixed = [build(tmp_path / "Dahoas/rm-static", tmp_path / "out", seed) for seed in (1, 2)]
    assert fixed[0].fingerprint("eval") == fixed[1].fingerprint("eval")
    other = build(tmp_path / "Dahoas/full-hh-rlhf", tmp_path / "out")
    assert other.fingerprint("eval") != fixed[0].fingerprint("eval")
    with pytest.raises(ValueError, match="test"):
        other.fingerprint("test")


def test_fingerprints_are_the_same_in_every_process(tmp_path, mirror):
    datasets.DatasetDict({"train": dataset_of(1, 2), "test": dataset_of(3)}).save_to_disk(mirror)
    data = tmp_path / "Dahoas" / "full-hh-rlhf"
    for split in ("train", "test"):
        write_jsonl(data / f"{split}.jsonl", pair(1))
    code = (
        "import sys; from utils.data.raw_datasets import find_raw_dataset_class as find\n"
        "for path in sys.argv[1:]: print(find(path)(sys.argv[0], 1, -1, path).fingerprint('train'))"
    ).replace("sys.argv[0]", repr(str(tmp_path / "elsewhere")))
    command = [sys.executable, "-c", code, str(mirror), str(data)]
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    output = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    here = [build(path, tmp_path / "out", seed=1).fingerprint("train") for path in (mirror, data)]
    assert [line for line in output.stdout.splitlines() if " " not in line] == here


def _load_many(folder: str, output_path: str, answers) -> None:
    source = build(folder, output_path)
    answers.put([source.get_prompt_and_chosen(sample) for sample in source.get_train_data()])


def test_processes_at_once(tmp_path, mirror):
    write_jsonl(mirror / "train.jsonl", *(pair(number) for number in range(3000)))
    write_jsonl(mirror / "test.jsonl", pair(3))
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    arguments = (str(mirror), str(tmp_path / "out"), answers)
    processes = [context.Process(target=_load_many, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(timeout=30)
        assert process.exitcode == 0
    assert all(answer == [f"p{n}c{n}" for n in range(3000)] for answer in found)
    assert len(list((tmp_path / "out" / "arrow").glob("*.arrow"))) == 2
    assert not list((tmp_path / "out" / "arrow").glob("*.tmp"))


# -------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def stub_hub(monkeypatch, tmp_path):
    """Stands in for the hub: answers by revision, keeps the calls."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "unreachable_reason", lambda name: None)
    calls, answers = [], {}

    def load_dataset(name, config=None, data_dir=None, revision=None, streaming=False):
        calls.append((name, config, data_dir, revision))
        answer = answers[revision]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(hub, "load_dataset", load_dataset)
    return calls, answers


SCRIPT = RuntimeError("Dataset scripts are no longer supported, but found mkqa.py")
PARQUET = "refs/convert/parquet"


def test_hub_data_set(tmp_path, stub_hub):
    calls, answers = stub_hub
    answers[None] = datasets.DatasetDict({"train": dataset_of(1, 2), "test": dataset_of(3)})
    source = build("Dahoas/rm-static", tmp_path / "out")
    assert calls == [("Dahoas/rm-static", None, None, None)]
    assert source.get_train_data().column_names == ["prompt", "chosen", "rejected"]
    assert source.get_prompt_and_chosen(source.get_eval_data()[0]) == "p3c3"
    assert source.fingerprint("train") == build("Dahoas/rm-static", tmp_path / "out").fingerprint("train")


def test_hub_script_data_set_is_read_from_its_parquet_copy(tmp_path, stub_hub):
    calls, answers = stub_hub
    row = {"queries": {"zh_cn": "q"}, "answers": {"zh_cn": [{"text": "a"}]}}
    answers[None] = SCRIPT
    answers[PARQUET] = datasets.DatasetDict({"train": datasets.Dataset.from_list([row] * 10)})
    source = build("mkqa-Chinese", tmp_path / "out")
    assert calls == [("mkqa", None, None, None), ("mkqa", None, None, PARQUET)]
    assert len(source.get_train_data()) == 9
    assert source.get_prompt_and_chosen(source.get_train_data()[0]) == " Human: q Assistant: a"


def test_hub_configuration(tmp_path, stub_hub):
    calls, answers = stub_hub
    rows = datasets.Dataset.from_list([{"question": "q", "human_answers": ["a"]}] * 10)
    answers |= {None: SCRIPT, PARQUET: datasets.DatasetDict({"train": rows})}
    build("Hello-SimpleAI/HC3-Chinese", tmp_path / "out")
    name = "Hello-SimpleAI/HC3-Chinese"
    assert calls == [(name, "all", None, None), (name, None, "all", PARQUET)]


def test_hub_script_data_set_without_a_parquet_copy(tmp_path, stub_hub):
    _, answers = stub_hub
    answers |= {None: SCRIPT, PARQUET: DatasetNotFoundError("Revision doesn't exist")}
    fails(
        "mkqa-Japanese",
        tmp_path / "out",
        "mkqa cannot be read from the Hugging Face hub",
        "Dataset scripts are no longer supported",
        "Revision doesn't exist",
        f"hf download mkqa --repo-type dataset --revision {PARQUET}",
        "must contain mkqa-Japanese",
    )


def test_hub_renames_dev(tmp_path, stub_hub):
    _, answers = stub_hub
    row = {"query": "q", "positive_passages": [{"text": "p"}], "negative_passages": [{"text": "n"}]}
    rows = datasets.Dataset.from_list([row])
    answers[None] = datasets.DatasetDict({"train": rows, "validation": rows})
    source = build("Cohere/miracl-zh-queries-22-12", tmp_path / "out")
    assert source.get_rejected(source.get_eval_data()[0]) == " n"


@pytest.mark.parametrize(
    "problem",
    [
        ConnectionError("Couldn't reach 'Dahoas/rm-static' on the Hub"),
        DatasetNotFoundError("Dataset 'Dahoas/rm-static' is a gated dataset"),
        ValueError("BuilderConfig 'x' not found"),
        RuntimeError("something else"),
        OSError(28, "No space left on device"),
    ],
)
def test_hub_problems(tmp_path, stub_hub, problem):
    _, answers = stub_hub
    answers[None] = problem
    fails(
        "Dahoas/rm-static",
        tmp_path / "out",
        "Dahoas/rm-static cannot be read from the Hugging Face hub",
        str(problem),
        "hf download Dahoas/rm-static --repo-type dataset --local-dir",
        "save_to_disk",
    )


def test_hub_data_is_checked(tmp_path, stub_hub):
    _, answers = stub_hub
    wrong = datasets.Dataset.from_list([{"prompt": "p", "chosen": 1, "rejected": "r"}])
    answers[None] = datasets.DatasetDict({"train": wrong, "test": wrong})
    fails("Dahoas/rm-static", tmp_path / "out", "Dahoas/rm-static", '"chosen" holds int64')
    answers[None] = datasets.DatasetDict({"train": wrong.remove_columns("chosen")})
    fails("Dahoas/rm-static", tmp_path / "out", "Dahoas/rm-static", "lacks the columns chosen")
    answers[None] = datasets.DatasetDict({"train": dataset_of(1)})
    fails("Dahoas/rm-static", tmp_path / "out", "Dahoas/rm-static", 'no split "test"', "found: train")


def offline(monkeypatch, tmp_path, answer: Exception) -> None:
    """The real load_dataset, with an empty cache and a hub that answers like this."""

    def dataset_info(self, name, timeout):
        assert timeout <= 10
        raise answer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(hub.HfApi, "dataset_info", dataset_info)


@pytest.mark.parametrize(
    "answer", [OfflineModeIsEnabled("offline mode is enabled"), hub.HTTPError("Name or service not known")]
)
def test_no_network_is_said_at_once(tmp_path, monkeypatch, answer):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    offline(monkeypatch, tmp_path, answer)
    # Would be asked six times, with pauses of 23 seconds in all.
    monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", None)
    fails("Dahoas/rm-static", tmp_path / "out", "Dahoas/rm-static", str(answer), "hf download Dahoas/rm-static")
    assert datasets.config.HF_HUB_OFFLINE is False


def test_numpy_indexes_select_rows(tmp_path, mirror):
    write_jsonl(mirror / "train.jsonl", *(pair(number) for number in range(5)))
    write_jsonl(mirror / "test.jsonl", pair(3))
    rows = build(mirror, tmp_path / "out").get_train_data().select(np.array([4, 0], dtype=np.uint32))
    assert rows["prompt"][:] == ["p4", "p0"]
