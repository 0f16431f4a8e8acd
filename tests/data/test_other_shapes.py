"""Shapes of data that are near the known ones: other names, masks of tokens, splits and values of other types."""

import datetime
import json
from decimal import Decimal
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.prepared_data import prepare
from tests.data.template_kinds import parts_of, samples_of, tokenizer_of
from tests.data.test_cases import AGAIN, ASK, DONE, LAST, OPEN, PAIR, SAY, call, talk
from tests.data.test_not_used import lines_on
from tests.data.test_own_formats import open_own, write
from utils.data.formats.chat_template import ChatFormat
from utils.data.formats.custom import OwnOptions
from utils.data.formats.roles import parse_columns
from utils.data.mixture import DataSources
from utils.data.open_sets import Preparation, open_sets
from utils.errors import UserError

END = "<|im_end|>"
IDS = [5, 6, 7, 8, 1, 1]


def labels_of(folder: Path, row: dict, name: str = "t.jsonl", **changes) -> list[str]:
    first, second = samples_of(write(folder / name, [row, row]), folder / "cache", **changes)
    assert first == second
    return first.labels


# ------------------------------------------------------------------------------------------ names of fields

NAMED = {
    "role and value": ({"conversations": [{"role": "user", "value": "q"}, {"role": "assistant", "value": "a"}]}, "q"),
    "one conversation": ({"conversation": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "q"),
    "OpenOrca": ({"system_prompt": "Be brief.", "question": "q", "response": "a"}, "system\nBe brief."),
    "functions": (talk(ASK, SAY | {"content": "a"}, functions=[OPEN["function"]]), '{"name": "open_door"'),
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("kind", ["t.jsonl", "t.parquet", "saved"])
def test_names_for_what_is_known_by_another(tmp_path, name, kind):
    row, words = NAMED[name]
    path = write(tmp_path / kind, [row, row])
    sample = samples_of(path, tmp_path / "cache")[0]
    assert sample.labels == ["a" + END] and words in sample.text
    assert not any("not used" in line for line in lines_on(path, tmp_path / "cache"))


def columns_of(messages: list[dict]) -> dict:
    return {name: [message.get(name) for message in messages] for name in ("role", "content")}


SHAPED = {
    "a column a field": columns_of([ASK, SAY]),
    "messages as JSON text": [json.dumps(ASK), json.dumps(SAY)],
    "llama's role of results": [ASK, SAY, {"role": "ipython", "content": "ok"}, SAY],
}


@pytest.mark.parametrize("name", SHAPED)
@pytest.mark.parametrize("kind", ["t.jsonl", "t.parquet", "saved"])
def test_other_shapes_of_a_conversation(tmp_path, name, kind):
    found = labels_of(tmp_path, {"messages": SHAPED[name]}, kind)
    assert found == PAIR * (2 if "llama" in name else 1)


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_preferences_whose_question_is_a_conversation(tmp_path, column):
    asked = [{"from": "human", "value": ASK["content"]}] if column == "conversations" else [ASK]
    good, bad = ([SAY], [LAST]) if column == "messages" else ({"from": "gpt", "value": SAY["content"]}, None)
    row = {column: asked, "chosen": good, "rejected": bad}
    path = write(tmp_path / "t.jsonl", [row, row])
    assert samples_of(path, tmp_path / "cache")[0].labels == PAIR
    assert f"prompt = {column}, chosen" in open_own(path, tmp_path).describe()
    whole = {"messages": [ASK, SAY], "chosen": "x", "source": "y"}
    assert labels_of(tmp_path / "whole", whole) == PAIR


def test_a_column_speaks_by_all_rows_that_are_tried(tmp_path):
    """Whether `input` holds texts does not hang on the first row."""
    rows = [{"instruction": "q", "input": 3, "output": "a"}, {"instruction": "q", "input": "x", "output": "a"}]
    for given in (rows, rows[::-1]):
        with pytest.raises(UserError, match='"input" is a number where a string is needed'):
            samples_of(write(tmp_path / "t.jsonl", given), tmp_path / "cache")


@pytest.mark.parametrize("name", ["parameters", "input"])
def test_arguments_under_their_other_names(tmp_path, name):
    function = {"name": "open_door", name: {"door": "red"}}
    for given in (function, {"type": "function", "function": function}):
        row = talk(ASK, {"role": "assistant", "content": None, "tool_calls": [given]})
        assert labels_of(tmp_path, row) == labels_of(tmp_path, talk(ASK, call()))


def test_calls_that_are_no_answers_are_named(tmp_path):
    row = talk(ASK | {"tool_calls": call()["tool_calls"]}, SAY)
    assert lines_on(write(tmp_path / "t.jsonl", [row, row]), tmp_path) == ["not used: tool_calls of user turns"]


def test_a_template_that_reads_parts_alone(tmp_path):
    """As those of models of pictures do: a text would be nothing to them."""
    said = "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    end = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (tmp_path / "t.jinja").write_text("{% for m in messages %}<|im_start|>{{ m.role }}\n" + said + end)
    path = write(tmp_path / "t.jsonl", [talk(ASK, SAY, AGAIN, LAST)] * 2)
    sample = samples_of(path, tmp_path / "cache", chat_template=str(tmp_path / "t.jinja"))[0]
    assert sample.labels == [SAY["content"] + END, LAST["content"] + END]
    assert f"user\n{ASK['content']}{END}" in sample.text


def test_the_usual_name_comes_first(tmp_path):
    row = {"system": "x", "system_prompt": "y", "prompt": "q", "response": "a"}
    path = write(tmp_path / "t.jsonl", [row, row])
    assert lines_on(path, tmp_path) == ["not used: system_prompt"]
    assert "system\nx<|im_end|>" in samples_of(path, tmp_path)[0].text


def test_messages_without_text_say_what_they_hold(tmp_path):
    for message, words in (
        ({"role": "user", "text": "q"}, r'messages\[0\].content" is null or missing.*it has text beside the role'),
        ({"from": "human", "value": None}, r'messages\[0\].value" is null or missing'),
    ):
        with pytest.raises(UserError, match=rf'record 1 \(line 1\): "{words}.*Correct or remove the record\.$'):
            samples_of(write(tmp_path / "t.jsonl", [talk(message, SAY)] * 2), tmp_path / "cache")


def test_json_text_with_line_breaks_is_a_conversation(tmp_path):
    row = {"prompt": json.dumps([ASK], indent=2), "completion": json.dumps([SAY], indent=2)}
    assert labels_of(tmp_path, row) == PAIR


def test_a_malformed_answer_beside_a_rendered_prompt(tmp_path):
    row = {"prompt": "Human: q Assistant:", "response": [{"role": "robot", "content": "a"}]}
    with pytest.raises(UserError, match=r"record 1.*is 'robot'"):
        labels_of(tmp_path, row)


# ------------------------------------------------------------------------------------------- types of Arrow

TEXT = pa.string()


def test_types_that_json_has_no_name_for(tmp_path):
    """Numbers stay numbers, bytes texts and maps objects, inside messages too; what is learned is as from JSON."""
    weights = [None, Decimal(0), None, Decimal(1)]
    turns = [{"role": one["role"].encode(), "content": one["content"].encode(), "weight": weight}
             for one, weight in zip((ASK, SAY, ASK, LAST), weights, strict=True)]  # fmt: skip
    pq.write_table(pa.table({"messages": [turns] * 2}), tmp_path / "t.parquet")
    whole = pa.table({"messages": [json.dumps([ASK, SAY]).encode()] * 2})
    pq.write_table(whole, tmp_path / "whole.parquet")
    assert samples_of(tmp_path / "whole.parquet", tmp_path / "cache")[0].labels == PAIR
    datasets.Dataset(whole).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match='saved: "messages" holds binary where text is needed: cast it to strings'):
        samples_of(tmp_path / "saved", tmp_path / "cache")
    assert samples_of(tmp_path / "t.parquet", tmp_path / "cache")[0].labels == [LAST["content"] + END]


def test_a_map_is_an_object(tmp_path):
    function = pa.struct([("name", TEXT), ("arguments", pa.map_(TEXT, TEXT))])
    message = pa.struct(
        [("role", TEXT), ("content", TEXT), ("tool_calls", pa.list_(pa.struct({"function": function})))]
    )
    turns = [
        ASK,
        {"role": "assistant", "tool_calls": [{"function": {"name": "open_door", "arguments": [("door", "red")]}}]},
    ]
    table = pa.table({"messages": pa.array([turns] * 2, pa.list_(message))})
    pq.write_table(table, tmp_path / "t.parquet")
    assert samples_of(tmp_path / "t.parquet", tmp_path / "cache")[0].labels == labels_of(tmp_path, talk(ASK, call()))


def test_dates_and_numbers_in_arguments(tmp_path):
    given = {"day": datetime.date(2024, 1, 2), "price": Decimal("1.5"), "count": Decimal(3), "share": 0.5}
    table = pa.table({"messages": [[ASK | {"tool_calls": None}, call(given, content=None), DONE | {"tool_calls": None},
                                    SAY | {"tool_calls": None}]] * 2})  # fmt: skip
    pq.write_table(table, tmp_path / "t.parquet")
    found = samples_of(tmp_path / "t.parquet", tmp_path / "cache")[0].labels[0]
    assert '"arguments": {"day": "2024-01-02", "price": 1.5, "count": 3, "share": 0.5}}' in found


# ------------------------------------------------------------------------------------------ masks of tokens


@pytest.mark.parametrize("kind", ["t.jsonl", "t.parquet", "saved"])
def test_padding_is_no_text(tmp_path, kind):
    """The tokens that attention_mask leaves out are left out, on either side."""
    for number, (ids, attended) in enumerate(((IDS, [1, 1, 1, 1, 0, 0]), (IDS[::-1], [0, 0, 1, 1, 1, 1]))):
        labels = [token if token in (7, 8) else -100 for token in ids]
        whole = {"input_ids": ids, "attention_mask": attended}
        for row, wanted in ((whole, {5, 6, 7, 8}), (whole | {"labels": labels}, {7, 8})):
            path = write(tmp_path / f"{number}{len(row)}" / kind, [row, row])
            sample = samples_of(path, tmp_path / "cache")[0]
            kept = [token for token in ids if token != 1]
            assert sample.ids == kept
            # Nothing predicts the first token.
            assert sample.is_label == [False, *(token in wanted for token in kept[1:])]
            assert lines_on(path, tmp_path / "cache") == []


@pytest.mark.parametrize("name", ["loss_mask", "completion_mask", "assistant_masks"])
def test_a_mask_says_what_is_learned(tmp_path, name):
    row = {"input_ids": IDS[:4], name: [0, 0, 1, 1]}
    path = write(tmp_path / "t.parquet", [row, row])
    assert samples_of(path, tmp_path / "cache")[0].is_label == [False, False, True, True]
    with pytest.raises(UserError, match=rf"record 1: {name} leaves tokens out: give --completion_only_loss"):
        parts_of(path, tmp_path / "cache", completion_only=False)


BAD_TOKENS = [
    ({"labels": [7, 8]}, "labels has 2 values beside 4 input_ids: it must have one for each, with -100"),
    ({"labels": []}, "labels has 0 values beside 4 input_ids"),
    ({"labels": [6, 7, 8, -100]}, "labels must be the row's own input_ids"),
    ({"attention_mask": [1, 1]}, "attention_mask has 2 values beside 4 input_ids: it must have one for each"),
    ({"loss_mask": [0, 0, 2, 1]}, "loss_mask holds other values than 0 and 1"),
]


@pytest.mark.parametrize(("more", "words"), BAD_TOKENS, ids=[words for _, words in BAD_TOKENS])
def test_columns_of_tokens_that_do_not_fit(tmp_path, more, words):
    with pytest.raises(UserError, match=f"record 1: {words}"):
        labels_of(tmp_path, {"input_ids": IDS[:4]} | more)


# -------------------------------------------------------------------------------------------------- splits


def saved(path: Path, **splits: list[dict]) -> Path:
    made = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(made).save_to_disk(path)
    return path


def test_splits_that_are_not_used_are_named(tmp_path):
    row = {"prompt": "q", "response": "a"}
    # The first split by name has other columns than the training split.
    path = saved(tmp_path / "s", corpus=[{"passage": "x"}], test=[row], train=[row], validation=[row])
    line = open_own(path, tmp_path).describe()
    assert "evaluation: validation" in line and line.endswith("not read: the split corpus, the split test")


def test_a_folder_of_splits_says_how_to_choose_one(tmp_path):
    row = {"prompt": "q", "response": "a"}
    path = saved(tmp_path / "s", train_sft=[row], train_gen=[row])
    with pytest.raises(UserError, match=rf"give --data_path one of them, for example {path}/train_"):
        open_own(path, tmp_path)
    assert len(open_own(path / "train_sft", tmp_path).raw_datasets["train"].dataset) == 1
    one = datasets.Dataset.from_list([row], split="test")
    one.save_to_disk(tmp_path / "t")
    assert len(open_own(tmp_path / "t", tmp_path).raw_datasets["train"].dataset) == 1


@pytest.mark.parametrize("kind", ["test.jsonl", "saved"])
def test_a_folder_for_evaluation_alone(tmp_path, kind):
    row = {"prompt": "q", "response": "a"}
    held = tmp_path / "held"
    if kind == "saved":
        saved(held, test=[row] * 3)
    else:
        write(held / kind, [row] * 3)
    train = write(tmp_path / "t.parquet", [{"messages": [ASK, SAY]}] * 4)
    own = open_own(train, tmp_path).options
    sources = DataSources([str(train)], None, (), [str(held)])
    opened = open_sets(sources, Preparation(0, str(tmp_path / "cache"), 1, 1), own)
    assert [len(one.raw.get_eval_data()) for one in opened][-1] == 3
    with pytest.raises(UserError, match="does not say which of its data to train on"):
        prepare([held], tmp_path / "cache", tokenizer_of("qwen"), 64)


def test_a_column_that_pandas_holds_as_numbers_since_it_is_empty(tmp_path):
    columns = {"instruction": ["q"] * 2, "output": ["a"] * 2, "input": pa.array([None, None], pa.float64())}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert samples_of(tmp_path / "t.parquet", tmp_path / "cache")[0].labels == ["a" + END]
    pq.write_table(pa.table(columns | {"input": [None, 0.5]}), tmp_path / "t.parquet")
    assert lines_on(tmp_path / "t.parquet", tmp_path / "cache") == ["not used: input"]


def test_columns_are_named_for_the_data_that_have_them(tmp_path):
    """Data sets of other formats beside them are read by their own names; a name that none has is an error."""
    other = write(tmp_path / "other.jsonl", [{"frage": "q", "antwort": "a"}] * 3)
    known = write(tmp_path / "known.parquet", [talk(ASK, SAY)] * 3)
    own = OwnOptions(parse_columns("prompt=frage,response=antwort"), ChatFormat())
    preparation = Preparation(0, str(tmp_path / "cache"), 1, 1)
    opened = open_sets(DataSources([str(other), str(known)], None), preparation, own)
    assert [one.raw.get_chosen(one.raw.raw_datasets["train"].dataset[0]) for one in opened] == [" a", " It is open."]
    lines = [one.raw.describe() for one in opened]
    assert [line.endswith("--columns names none of its columns") for line in lines] == [False, True]
    own = own._replace(columns={"prompt": "frag"})
    with pytest.raises(UserError, match="--columns: no data set of this run has a column frag"):
        open_sets(DataSources([str(known), str(known)], None), preparation, own)
    with pytest.raises(UserError, match="There is no column frag: correct --columns"):
        open_sets(DataSources([str(known)], None), preparation, own)


def test_a_run_of_sets_in_different_forms(tmp_path, tiny_opt, run_inside):
    """The checks before a run open the data as the run does."""
    (tmp_path / "rows.tsv").write_text("frage\tantwort\n" + "q\ta\n" * 12)
    turns = [{"role": "user", "value": "q"}, {"role": "assistant", "value": "a"}]
    talks = "".join(json.dumps({"conversation": turns}) + "\n" for _ in range(12))
    (tmp_path / "talks.ndjson.zst").write_bytes(pa.compress(talks.encode(), "zstd", asbytes=True))
    write(tmp_path / "held" / "test.jsonl", [{"prompt": "q", "response": "a"}] * 3)
    common = ["--model_name_or_path", tiny_opt, "--data_output_path", tmp_path / "cache", "--output_dir",
              tmp_path / "out", "--dry_run", "--max_seq_len", "64", "--eval_data_path", tmp_path / "held",
              "--data_path", tmp_path / "rows.tsv", tmp_path / "talks.ndjson.zst"]  # fmt: skip
    status, out, error = run_inside([*map(str, common), "--columns", "prompt=frage,response=antwort"])
    assert status == 0, error
    assert "Data train: 24 samples" in out and "Data eval: 3 samples" in out
    status, _, error = run_inside([*map(str, common), "--columns", "prompt=frag,response=antwor"])
    assert status == 2 and "--columns" in error
