"""The files of real cases in the folder beside the repository: every one of them is tried, and none left over."""

import csv
import json
import re
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from conftest import SHARED, needs_shared

from tests.data.template_kinds import parts_of, samples_of, tokenizer_of
from tests.data.test_own_formats import open_own
from utils.data.outcomes import added
from utils.errors import UserError

END = "<|im_end|>"
FOLDER = SHARED.parent / "cases" / "data"
# What is refused, and how the message leads on.
BAD_FILES = {
    "10_blank_turns/none_at_all.jsonl": r"record 20 \(line 20\): .messages. holds no message",
    "14_json_shapes/field.json": r"the records are in its field .data.: write that list alone",
    "14_json_shapes/utf16.jsonl": "UTF-16 .*save it as UTF-8",
    "15_csv/dup.csv": "two columns of the same name .*response, response",
    "15_csv/latin1.csv": r"not UTF-8 text.*line 2.*save it as UTF-8",
    "15_csv/semicolon.csv": "separated by ';', not by commas",
    "36_small/ev/train.jsonl": "does not begin with a list or an object",  # the path that it once was a link to
}


def shared_files() -> list[str]:
    kinds = (".json", ".jsonl", ".csv", ".parquet")
    found = [str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.name.endswith(kinds)]
    found = [name for name in found if not Path(name).name.startswith(("dataset_info", "state"))]
    return sorted([*found, "23_null_field/saved"]) if FOLDER.is_dir() else []


def rows_in(path: Path) -> list[dict]:
    """The rows of a file, read in the simplest way there is."""
    if path.is_dir():
        return datasets.load_from_disk(str(path)).to_list()
    if path.suffix == ".csv":
        with open(path, encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file, skipinitialspace=True))
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    lines = path.read_text("utf-8-sig").replace("\ufeff", "").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def answers_in(row: dict) -> list[str]:
    """What a template of Qwen's kind has the model write for a row."""
    talk = row.get("messages") or row.get("conversations")
    if isinstance(talk, str):
        talk = json.loads(talk)
    if "text" in row:
        tokenizer = tokenizer_of("qwen")  # without BOS, so nothing predicts the first token
        return [tokenizer.decode(tokenizer(row["text"])["input_ids"][1:]) + END]
    if talk is None:
        before = [answer + END for _, answer in row.get("history") or ()]
        last = next(row[name] for name in ("response", "completion", "output", "answer") if name in row)
        return [*before, (last if isinstance(last, str) else last[0]["content"]) + END]
    asked = max(place for place, one in enumerate(talk) if one.get("role", one.get("from")) in ("user", "human"))
    return [written(one, place > asked) + END for place, one in enumerate(talk) if is_learned(one)]


def is_learned(one: dict) -> bool:
    answers = one.get("role", one.get("from")) in ("assistant", "gpt") and one.get("weight") != 0
    return answers and bool(one.get("content") or one.get("value") or one.get("tool_calls"))


def written(one: dict, is_last: bool) -> str:
    content = one.get("content") or one.get("value") or ""
    content = "".join(part["text"] for part in content) if isinstance(content, list) else content
    if "</think>" in content and not is_last:
        content = content.split("</think>")[1].lstrip("\n")
    thought = f"<think>\n{one['reasoning_content']}\n</think>\n\n" if one.get("reasoning_content") else ""
    calls = [json.dumps(entry["function"]) for entry in one.get("tool_calls") or ()]
    return thought + "\n".join([*filter(None, [content]), *(f"<tool_call>\n{text}\n</tool_call>" for text in calls)])


@needs_shared
@pytest.mark.parametrize("name", shared_files())
def test_every_case_beside_the_repository(tmp_path, name):
    path = FOLDER / name
    if name in BAD_FILES:
        with pytest.raises(UserError, match=BAD_FILES[name]):
            samples_of(path, tmp_path)
        return
    samples, rows = samples_of(path, tmp_path), rows_in(path)
    assert len(samples) == len(rows)
    wanted = sorted(answers_in(row) for row in rows)
    assert sorted(sample.labels for sample in samples) == wanted
    assert all(word in "".join(sample.text for sample in samples) for row in rows for word in words_in(row))


def words_in(row: dict) -> list[str]:
    """What a row holds beside its answers, up to the last one."""
    talk = row.get("messages") or row.get("conversations")
    if isinstance(talk, list):
        last = max(place for place, one in enumerate(talk) if is_learned(one))
        row = {"messages": talk[:last]}
    names = "value|content|instruction|input|prompt|question|context|text|system"
    return [json.loads(f'"{text}"').strip() for text in re.findall(rf'"(?:{names})": "([^"\\<]+)', json.dumps(row))]


@needs_shared
@pytest.mark.parametrize("name", ["07_thinking/think_multi.jsonl", "11_roles/system.jsonl", "12_chat/chat.jsonl"])
def test_a_template_that_leaves_reasoning_and_system_turns_out(tmp_path, name):
    """It is said, and no reason to refuse: the answers are labelled as they are rendered."""
    template = str(FOLDER / "28_reason_strip" / "strip.jinja")
    samples = samples_of(FOLDER / name, tmp_path, chat_template=template)
    wanted = [[answer.split("</think>\n\n")[-1] for answer in answers_in(row)] for row in rows_in(FOLDER / name)]
    assert sorted([label.lstrip("\n") for label in sample.labels] for sample in samples) == sorted(wanted)
    counts = added(part.counts for part in parts_of(FOLDER / name, tmp_path, chat_template=template))
    assert counts["notes"] == {"07": {"LEFT_REASONING": 20}, "11": {"LEFT_SYSTEM": 20}, "12": {}}[name[:2]]


@needs_shared
def test_rendered_prompts_keep_their_one_bos(tmp_path):
    """Texts of Llama's kind, rendered already, stay as they are."""
    path = FOLDER / "08_prerendered_bos" / "p.jsonl"
    wanted = {row["prompt"] + row["completion"] for row in rows_in(path)}
    assert {sample.text for sample in samples_of(path, tmp_path, "llama")} == wanted


@needs_shared
def test_shards_with_other_columns_and_copies_that_differ(tmp_path):
    """Both shards of a set are read with the columns of both; a copy that was cut off has other content."""
    samples = samples_of(FOLDER / "24_parquet_optional", tmp_path)
    assert len(samples) == 20 and sum("INPUT SEEN" in sample.text for sample in samples) == 10
    copies = [open_own(FOLDER / "34_two_nodes" / node / "train.jsonl", tmp_path) for node in ("nodeA", "nodeB")]
    assert copies[0].fingerprint("train") != copies[1].fingerprint("train")
    tried = {name.split("/")[0] for name in shared_files()} | {"28_reason_strip"}
    assert tried == {path.name for path in FOLDER.iterdir()}
