"""Data of the user's own: every file format and set of columns, evaluation rows, dirty rows, weights, the cache."""

import csv
import gzip
import json
import re
from pathlib import Path

import datasets
import pytest
from conftest import ROOT, write_json_data
from transformers import AutoTokenizer

from tests.data.prepared_data import SEED, prepare
from utils.data.data_utils import create_prompt_dataset, get_raw_dataset
from utils.data.formats.chat_template import ChatFormat
from utils.data.formats.custom import OwnFormatDataset, OwnOptions
from utils.data.formats.roles import parse_columns
from utils.data.mixture import weighted
from utils.data.raw_datasets import RAW_DATASETS
from utils.data.splits import get_shuffle_idx, split_boundaries
from utils.errors import UserError
from utils.model.tokenizer import load_hf_tokenizer
from utils.notation import parse_source

DEMO = str(ROOT / "demo" / "tiny_opt")


def pairs(count: int, name: str = "a") -> list[dict]:
    return [{"prompt": f"{name}, number {i}?", "response": f"it is {i},\nI think"} for i in range(count)]


def human_assistant(row: dict) -> str:
    return f" Human: {row['prompt']} Assistant: {row['response']}"


def conversation(*turns: str) -> list[dict]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, turns, strict=False)]


def write(path: Path, rows: list[dict]) -> Path:
    """Rows in the format the name ends in; a name without one becomes a save_to_disk folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.name.endswith(".json"):
        path.write_text(json.dumps(rows, indent=1))
    elif path.name.endswith(".jsonl"):
        path.write_text(lines)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.name.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.name.endswith(".csv"):
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path)
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return load_hf_tokenizer(DEMO)


@pytest.fixture
def build(tmp_path, tokenizer, capsys):
    """Build phase 1 from these paths; (train texts, eval texts, printed lines)."""
    plain = AutoTokenizer.from_pretrained(DEMO)

    def build_it(*paths, **changes):
        capsys.readouterr()
        both = prepare(paths, tmp_path / "cache", tokenizer, 128, **changes)
        texts = []
        for data in both:
            samples = [data[i]["input_ids"].tolist() for i in range(len(data))]
            assert all(ids[0] == ids[-1] == 2 and 2 not in ids[1:-1] for ids in samples)
            texts.append([plain.decode(ids[1:-1]) for ids in samples])
        return (*texts, capsys.readouterr().out)

    return build_it


def open_own(path: Path, tmp_path: Path, columns: str | None = None, **chat) -> OwnFormatDataset:
    options = OwnOptions(parse_columns(columns), ChatFormat(**chat))
    return get_raw_dataset(str(path), str(tmp_path / "cache"), SEED, 0, options)


def nine_to_one(rows: list) -> tuple[list, list]:
    order, cut = get_shuffle_idx(SEED, len(rows)), split_boundaries("9,1", len(rows)).boundaries[1]
    return [rows[i] for i in order[:cut]], [rows[i] for i in order[cut:]]


# ---------------------------------------------------------------------------------------------- formats

FILES = ("mine.json", "mine.jsonl", "mine.jsonl.gz", "mine.parquet", "mine.csv", "saved")


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_any_format_anywhere(build, tmp_path, name):
    """A tenth of the rows, chosen as the published scripts choose it, is kept for evaluation."""
    rows = pairs(20)
    train, evaluation, printed = build(write(tmp_path / "some where" / name, rows))
    kept, held_out = nine_to_one(rows)
    assert sorted(train) == sorted(map(human_assistant, kept)) and len(kept) == 18
    assert sorted(evaluation) == sorted(map(human_assistant, held_out))
    line = f"Data {tmp_path}/some where/{name}: prompt, response; texts: the Human/Assistant form; "
    assert line + "evaluation: a tenth of the rows" in printed


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet", "csv"])
def test_a_folder_with_an_evaluation_part(build, tmp_path, suffix):
    """Of several such parts the one for evaluation before the one for testing; what is not read is said."""
    rows = {"train": pairs(6), "validation": pairs(3, "b"), "test": pairs(2, "c")}
    for split, content in rows.items():
        write(tmp_path / "mine" / f"{split}.{suffix}", content)
    train, evaluation, printed = build(tmp_path / "mine")
    assert sorted(train) == sorted(map(human_assistant, rows["train"]))
    assert sorted(evaluation) == sorted(map(human_assistant, rows["validation"]))
    assert f"evaluation: validation.{suffix}; not read: test.{suffix}" in printed


@pytest.mark.parametrize(
    ("given", "beside", "found"),
    [
        ("train.jsonl", "eval.jsonl", True),
        ("train.jsonl", "test.jsonl", True),
        ("my_train.jsonl", "my_dev.jsonl", True),
        ("mytrain.jsonl", "eval.jsonl", False),
        ("train.jsonl", "eval.csv", False),
        ("chat.jsonl", "eval.jsonl", False),
        ("test.jsonl", "eval.jsonl", False),
    ],
)
def test_an_evaluation_file_beside(tmp_path, given, beside, found):
    """Only a name that says so makes a neighbour the evaluation file: other files may belong to other sets."""
    write(tmp_path / "d" / beside, pairs(3, "b"))
    raw = open_own(write(tmp_path / "d" / given, pairs(20)), tmp_path)
    if found:
        assert (len(raw.get_train_data()), len(raw.get_eval_data())) == (20, 3)
    else:
        assert (len(raw.get_train_data()), len(raw.get_eval_data())) == (18, 2)


def test_shards_without_a_split_name_and_a_test_file(build, tmp_path):
    for number in range(2):
        write(tmp_path / "mine" / f"part-{number}.jsonl", pairs(3, f"s{number}"))
    write(tmp_path / "mine" / "test.jsonl", pairs(2, "c"))
    train, evaluation, _ = build(tmp_path / "mine")
    assert sorted(train) == sorted(human_assistant(row) for number in range(2) for row in pairs(3, f"s{number}"))
    assert len(evaluation) == 2


def test_a_saved_folder_with_splits(build, tmp_path):
    splits = {name: datasets.Dataset.from_list(pairs(size)) for name, size in (("train", 5), ("test", 2))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    train, evaluation, printed = build(tmp_path / "saved")
    assert len(train) == 5 and len(evaluation) == 2 and "evaluation: test" in printed


@pytest.mark.parametrize(
    ("row", "columns", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "p", "response": "r"}, None, " Human: p Assistant:", " r", None),
        ({"prompt": "p", "completion": "r"}, None, " Human: p Assistant:", " r", None),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, None, " Human: p Assistant:", " c", " r"),
        ({"prompt": "p", "chosen": "c"}, None, " Human: p Assistant:", " c", None),
        ({"instruction": "i", "input": "x", "output": "o"}, None, " Human: i\nx Assistant:", " o", None),
        ({"instruction": "i", "input": "", "output": "o"}, None, " Human: i Assistant:", " o", None),
        ({"instruction": "i", "output": "o"}, None, " Human: i Assistant:", " o", None),
        ({"q": "p", "a": "c", "other": 5}, "prompt=q,chosen=a", " Human: p Assistant:", " c", None),
        ({"prompt": "p", "a": "c", "response": "no"}, "chosen=a", " Human: p Assistant:", " c", None),
        ({"task": "i", "output": "o"}, "instruction=task", " Human: i Assistant:", " o", None),
        ({"prompt": "Human: p Assistant:", "chosen": "c"}, None, "Human: p Assistant:", " c", None),
        ({"prompt": "Human: p\nAssistant:\n", "chosen": "c"}, None, "Human: p\nAssistant:\n", "c", None),
        ({"messages": conversation("p", "c")}, None, " Human: p Assistant:", " c", None),
        (
            {"chat": conversation("p", "c", "q", "d", "left out"), "prompt": "x", "chosen": "y"}, "messages=chat",
            " Human: p Assistant: c Human: q Assistant:", " d", None,
        ),
        ({"messages": conversation("p", "c"), "prompt": "x"}, None, " Human: p Assistant:", " c", None),
    ],
)  # fmt: skip
def test_columns_and_texts(tmp_path, row, columns, prompt, chosen, rejected):
    raw = open_own(write(tmp_path / "mine.jsonl", [row]), tmp_path, columns)
    sample = raw.raw_datasets["train"].dataset[0]
    assert (raw.get_prompt(sample), raw.get_chosen(sample), raw.get_rejected(sample)) == (prompt, chosen, rejected)
    assert raw.get_prompt_and_chosen(sample) == prompt + chosen
    assert raw.get_prompt_and_rejected(sample) == (prompt + rejected if rejected else None)


def test_texts_as_they_stand(tmp_path):
    raw = open_own(
        write(tmp_path / "mine.jsonl", [{"prompt": "def f():", "response": "\n  pass"}]), tmp_path, kind="none"
    )
    sample = raw.raw_datasets["train"].dataset[0]
    assert raw.get_prompt_and_chosen(sample) == "def f():\n  pass"
    write(tmp_path / "chats.jsonl", [{"messages": conversation("p", "c")}])
    with pytest.raises(UserError, match=r"chats\.jsonl holds conversations, which need a format"):
        open_own(tmp_path / "chats.jsonl", tmp_path, kind="none")


def test_later_phases(build, tmp_path, tokenizer):
    rows = [{"prompt": f"p {i}", "chosen": f"c {i}", "rejected": f"r {i}"} for i in range(10)]
    file = str(write(tmp_path / "train.parquet", rows))
    write(tmp_path / "eval.parquet", rows[:2])
    settings = (SEED, tokenizer, 32, "</s>")
    chosen, _ = create_prompt_dataset(0, [file], "0,1,0", str(tmp_path / "cache"), 2, *settings)
    prompts, _ = create_prompt_dataset(0, [file], "0,0,1", str(tmp_path / "cache"), 3, *settings)
    number = get_shuffle_idx(SEED, 10)[0]
    decode = AutoTokenizer.from_pretrained(DEMO).decode
    assert decode(chosen[0][0][0][chosen[0][1][0].bool()]) == f"</s> Human: p {number} Assistant: c {number}</s>"
    assert decode(chosen[0][2][0][chosen[0][3][0].bool()]) == f"</s> Human: p {number} Assistant: r {number}</s>"
    assert decode(prompts[0][0].flip(0)) == f"</s> Human: p {number} Assistant:"


def test_known_names_keep_their_meaning(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / "Dahoas" / "rm-static" / f"{split}.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "r"}])
    raw = get_raw_dataset(str(tmp_path / "Dahoas" / "rm-static"), str(tmp_path / "cache"), SEED, 0)
    assert type(raw) is RAW_DATASETS["Dahoas/rm-static"]
    assert raw.get_prompt_and_chosen(raw.get_train_data()[0]) == "pc"


# ------------------------------------------------------------------------------------------- dirty rows

GOOD = {"prompt": "p", "response": "r"}
TALK = {"messages": conversation("p", "r")}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"prompt": "p", "response": "r"}\n{"prompt": "p"}', 'record 2 (line 2): has no "response"'),
        ("a.jsonl", '{"prompt": "p", "response": "r"}\n{"prompt": "p", "response": 5}', '2): "response" is a number'),
        ("a.json", '[{"prompt": "p", "response": null}]', 'record 1 (line 1): has null for "response"'),
        ("a.jsonl", "", "is empty"),
        ("a.csv", "prompt,response\np,r\np\n", "record 2 (line 3) has 1 fields where the header has 2"),
        ("a.csv", 'prompt,response\n"a\nb",r\np,r,x\n', "record 2 (line 4) has 3 fields"),
        ("a.csv", 'prompt,response\n"p,r\n', "not valid CSV"),
        ("a.csv", "prompt,prompt\np,r\n", "two columns of the same name"),
        ("a.csv", "prompt,response\n", "holds no records"),
        ("a.csv", "prompt;response\np;r\n", "the columns are separated by ';', not by commas"),
        ("a.csv", "messages\nhello\n", '"messages" is a string where a list of messages is needed'),
        ("a.jsonl", '{"body": "t"}', "none of these formats"),
        ("a.jsonl", '{"body": "t"}', "give --columns text=body; if conversations, messages=body"),
        ("a.jsonl", '{"words": "t", "reply": "r"}', "--columns prompt=words,response=reply"),
        (
            "a.jsonl", '{"id": 1, "context": {}, "long_answer": "a", "question": "q"}',
            "--columns prompt=question,response=long_answer",
        ),
        ("a.jsonl", '{"id": 1, "talk": []}', "--columns text=talk; if conversations, messages=talk"),
        ("a.json", '[{"prompt": "p", "response": "r"},\n]', "(line 2) is not valid JSON: remove the comma before it"),
        ("a.jsonl", "{'prompt': 'p', 'response': 'r'}", "texts stand in double quotes there"),
        ("a.jsonl", json.dumps(TALK) + '\n{"messages": []}', 'record 2 (line 2): "messages" holds no message'),
        (
            "a.jsonl", json.dumps(TALK) + '\n{"messages": [{"role": "robot", "content": "p"}]}',
            """record 2 (line 2): "messages[0].role" is 'robot'""",
        ),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', 'record 1 (line 1): "messages[0].content" is null or missing'),
        ("a.jsonl", '{"messages": [{"role": "user", "content": null}]}', '"messages[0].content" is null'),
        ("a.jsonl", '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "is of type 'image'"),
        ("a.parquet", [GOOD] * 1001 + [{"prompt": "p", "response": None}], 'record 1002: "response" is null'),
        ("a.parquet", [{"prompt": "p", "response": 5}], 'the column "response" holds int64'),
        ("a.parquet", [TALK] * 3 + [{"messages": [{"role": "robot", "content": ""}]}], 'record 4: "messages[0].role"'),
        ("saved", [TALK] * 3 + [{"messages": [{"role": "robot", "content": ""}]}], 'record 4: "messages[0].role"'),
        ("a.txt", "prompt", "is no data file"),
    ],
)  # fmt: skip
def test_dirty_rows_are_named(tmp_path, name, content, words):
    path = tmp_path / "mine" / name
    if isinstance(content, list):
        write(path, content)
    else:
        path.parent.mkdir()
        path.write_text(content)
    with pytest.raises(UserError) as raised:
        open_own(path, tmp_path)
    assert words in str(raised.value) and str(path) in str(raised.value)


def test_a_folder_that_does_not_say_what_to_train_on(tmp_path):
    for names in (("test.jsonl", "eval.jsonl"), ("a-00000-of-00001.jsonl", "b-00000-of-00001.jsonl")):
        folder = tmp_path / names[0]
        for name in names:
            write(folder / name, pairs(2))
        with pytest.raises(UserError, match="does not say which of its data to train on"):
            open_own(folder, tmp_path)


def test_blank_prompts_and_answers_are_dropped_and_counted(build, tmp_path):
    rows = [*pairs(4), {"prompt": "p", "response": " \n"}, {"prompt": "", "response": "r"}]
    write(tmp_path / "eval.csv", rows[:2])
    train, _, printed = build(write(tmp_path / "train.csv", rows))
    assert len(train) == 4
    assert "Data train: 4 samples" in printed and "2 dropped (1 blank text, 1 no answer)" in printed


# ---------------------------------------------------------------------------------------------- weights


def test_weights():
    assert parse_source("/a/b.jsonl:0.3") == ("/a/b.jsonl", 0.3)
    assert parse_source("Dahoas/rm-static") == ("Dahoas/rm-static", 1.0)
    assert parse_source("c:\\data") == ("c:\\data", 1.0)
    for text in ("a:0", "a:-1", "a:inf", "a:nan", "a:1.2.3"):
        with pytest.raises(UserError, match="must be a number above 0"):
            parse_source(text)
    index = get_shuffle_idx(1, 10)
    assert weighted(index, 1).tolist() == index.tolist()
    assert weighted(index, 0.3).tolist() == index[:3].tolist()
    assert weighted(index, 2.5).tolist() == [*index, *index, *index[:5]]


def test_a_path_with_a_colon_that_exists_is_no_weight(tmp_path):
    (tmp_path / "run:2").mkdir()
    assert parse_source(str(tmp_path / "run:2")).weight == 1


def test_blends(build, tmp_path):
    """The same shuffled rows whatever the weight, evaluation whole; known sets take weights too."""
    for name in "ab":
        write(tmp_path / name / "train.jsonl", pairs(10, name))
        write(tmp_path / name / "eval.jsonl", pairs(3, name + "e"))
    known = write_json_data(
        tmp_path / "k", [{"prompt": f"k {i}", "chosen": "c"} for i in range(8)], [GOOD | {"chosen": ""}]
    )
    train, evaluation, printed = build(f"{tmp_path}/a:0.3", f"{tmp_path}/b:2", f"{known}:0.5")
    order = get_shuffle_idx(SEED, 10)
    wanted = [human_assistant(pairs(10, "a")[i]) for i in order[:3]] + 2 * list(map(human_assistant, pairs(10, "b")))
    assert sorted(text for text in train if "Human" in text) == sorted(wanted)
    assert sorted(train) != train and len(train) == 3 + 20 + 4
    assert sum("ae," in text or "be," in text for text in evaluation) == 6
    assert re.search(r"/a train: weight 0.3, 3 rows of 10$", printed, re.MULTILINE)
    assert "local/jsonfile train: weight 0.5, 4 rows of 8" in printed


# ------------------------------------------------------------------------------------------------ cache


def test_columns_format_and_weight_are_part_of_the_cache_key(build, tmp_path):
    template = tmp_path / "t.jinja"
    text = "{{ bos_token }}{% for m in messages %}{{ m['role'][0] + ': ' + m['content'] }}{% endfor %}"
    template.write_text(text)
    file = write(tmp_path / "train.jsonl", [{"prompt": "p", "response": "r", "chosen": "c"} for _ in range(4)])
    write(tmp_path / "eval.jsonl", [{"prompt": "p", "response": "r", "chosen": "c"}])
    seen = set()
    for path, changes in (
        (file, {}),
        (file, {"columns": {"prompt": "p_", "chosen": "response"} | {"prompt": "prompt"}}),
        (file, {"columns": {"prompt": "response"}}),
        (file, {"chat_template": "none"}),
        (file, {"chat_template": str(template)}),
        (f"{file}:0.5", {}),
        (f"{file}:0.25", {}),
    ):
        train, _, printed = build(path, **changes)
        assert "built (not there yet)" in printed
        seen.add(tuple(train))
        assert build(path, **changes)[0] == train and build(path, **changes)[2].count(": hit") == 1
    assert len(seen) == 7
    # The same path, but the template's content changed.
    template.write_text(text.replace(": ", " - "))
    train, _, printed = build(file, chat_template=str(template))
    assert "built (not there yet)" in printed and train[0] == "u - pa - c"
