"""What is there and not used is said, wherever it is: columns and fields of late rows, words that a template omits."""

import json

import pytest

from tests.data.prepared_data import prepare
from tests.data.template_kinds import parts_of, tokenizer_of
from tests.data.test_own_formats import open_own, write
from tests.data.test_same_everywhere import streamed
from utils.data.outcomes import added, notes_on

Q, A = {"role": "user", "content": 'write {"inner": 1}'}, {"role": "assistant", "content": "a"}
CALL = {
    "id": "c1",
    "index": 0,
    "type": "function",
    "function": {"name": "look", "arguments": {"name": "x"}, "strict": 1},
}
CALLED = [Q, {"role": "assistant", "content": None, "tool_calls": [CALL]},
          {"role": "tool", "tool_call_id": "c1", "content": "ok", "name": "look"}, A]  # fmt: skip


def lines_on(path, cache, **changes) -> list[str]:
    """What a run says of the rows of a data set, its special tokens aside."""
    raw = open_own(path, cache)
    return notes_on(added(part.counts for part in parts_of(path, cache, **changes)), {}, raw.unused_columns())


@pytest.fixture(scope="module")
def late(tmp_path_factory):
    """Rows of which single ones, far behind the first, have more than all others."""
    rows = [{"messages": [Q, A]} for _ in range(2600)]
    rows[1500] = {"messages": [Q | {"weight": 0}, A | {"mood": "glad"}]}
    rows[1900] |= {"source": "x", "system": "Be brief."}
    rows[2500] = {"messages": [Q, A | {"content": "<think>so</think>b"}, Q, A]}
    return write(tmp_path_factory.mktemp("late") / "late.jsonl", rows)


def test_columns_and_fields_of_late_rows(tmp_path, late, capsys):
    train, evaluation = prepare([late], tmp_path, tokenizer_of("qwen"), 64, completion_only=True)
    out = capsys.readouterr().out
    assert f"Data {late}: not used: source, mood of assistant turns, weight of user turns\n" in out
    assert "1 of 2600 rows have reasoning that the chat template leaves out" in out and "system turn" not in out
    assert f"Data {late}: messages, system; texts" in out
    assert len(train) + len(evaluation) == 2600


def test_columns_and_fields_of_late_rows_of_a_stream(tmp_path, late, capsys):
    streamed(late, tmp_path, size=3000)
    out = capsys.readouterr().out
    assert "Stream window 1: not used: mood of assistant turns, source, weight of user turns\n" in out


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet", "saved"])
def test_ids_of_calls_and_all_else_the_template_never_reads(tmp_path, name):
    path = write(tmp_path / name, [{"messages": CALLED, "id": 1}] * 3)
    assert lines_on(path, tmp_path) == [
        "not used: id, id of tool_calls, index of tool_calls, name of tool turns, strict of tool_calls, "
        "tool_call_id of tool turns"
    ]


def test_a_field_that_some_rows_need_is_used(tmp_path):
    """The template reads it in answers that call nothing, and such an answer comes late."""
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{{ m.role }}{% if m.name and m.content != 'a' %}{{ m.name }}{% endif %}: "
        "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    rows = [{"messages": [Q, A | {"name": "Ann"}]}] * 40
    template = {"chat_template": str(tmp_path / "t.jinja")}
    assert lines_on(write(tmp_path / "t.jsonl", rows), tmp_path, **template) == ["not used: name of assistant turns"]
    rows = [*rows, {"messages": [Q, A | {"name": "Ann", "content": "b"}]}] * 2
    assert lines_on(write(tmp_path / "u.jsonl", rows), tmp_path, **template) == []


def test_tools_that_the_template_has_no_place_for(tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.role + ': ' + m.content }}\n{% endfor %}")
    path = write(tmp_path / "t.jsonl", [{"messages": CALLED, "tools": [{"name": "look"}]}] * 2)
    assert lines_on(path, tmp_path, chat_template=str(tmp_path / "t.jinja"))[0].endswith(" of tool turns, tools")


def test_what_parts_of_text_hold_beside_it(tmp_path):
    parts = [{"type": "text", "text": "q", "cache_control": {"type": "ephemeral"}}]
    path = write(tmp_path / "t.jsonl", [{"messages": [Q | {"content": parts}, A]}] * 2)
    assert lines_on(path, tmp_path) == ["not used: cache_control of parts"]


def test_other_answers_beside_a_prompt_that_is_rendered_already(tmp_path):
    rows = [{"question": "Human: q Assistant:", "answers": {"text": ["a", "b"], "answer_start": [0, 1]}}] * 2
    assert lines_on(write(tmp_path / "t.jsonl", rows), tmp_path) == [
        "not used: answer_start of answers",
        "2 of 2 rows have a prompt that is rendered already: prompt and answer are used as they stand",
        "2 of 2 rows have other answers than the first: not used",
    ]


def test_what_an_answer_holds_beside_its_words(tmp_path):
    answers = {"text": ["a", "b"], "answer_start": [0, 1]}
    rows = [{"question": "q", "context": "c", "answers": answers, "title": "t"}] * 3
    rows += [{"question": "q", "context": "c", "answers": {"text": [], "answer_start": []}, "title": "t"}]
    parts = parts_of(write(tmp_path / "t.jsonl", rows), tmp_path)
    counts = added(part.counts for part in parts)
    assert counts["dropped"] == {"NO_ANSWER": 1} and counts["unread"] == {"answer_start of answers": 3}
    assert notes_on(counts, {}, ["title"]) == [
        "not used: title, answer_start of answers", "3 of 4 rows have other answers than the first: not used",
    ]  # fmt: skip


def test_rows_of_texts_and_of_messages_in_one_column(tmp_path):
    """Each row for itself, in any order."""
    texts, lists = {"prompt": "q", "completion": '["a"]'}, {"prompt": [Q], "completion": [A]}
    for number, rows in enumerate(([texts] * 200 + [lists], [lists] * 200 + [texts])):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        raw = open_own(path, tmp_path)
        found = {raw.get_prompt_and_chosen(row) for row in raw.raw_datasets["train"].dataset}
        assert found == {' Human: q Assistant: ["a"]', f" Human: {Q['content']} Assistant: a"}


def test_answers_that_a_program_wrote_for_a_missing_value(tmp_path):
    (tmp_path / "t.csv").write_text("prompt,response\nq,nan\nq,None\nq,None of them\nq,null\nnan,b\n")
    assert lines_on(tmp_path / "t.csv", tmp_path) == [
        "3 of 5 rows have an answer that is the word nan, None or null alone, as programs write a missing value"
    ]


LEFT = "2 of 2 rows have a prompt or a history that the whole conversation beside it does not hold: not used"
BESIDE_WHOLE = {
    "another prompt": ({"prompt": "other"}, [LEFT]),
    "another task": ({"instruction": "other", "input": "x"}, [LEFT]),
    "a history": ({"history": [["x", "y"]]}, [LEFT]),
    "the same prompt": ({"prompt": Q["content"]}, []),
    "the same prompt as messages": ({"prompt": [Q]}, []),
    "the same prompt rendered": ({"prompt": f"Human: {Q['content']} Assistant:"}, []),
    "an empty history": ({"history": []}, []),
}


@pytest.mark.parametrize("name", BESIDE_WHOLE)
def test_what_stands_beside_a_whole_conversation(tmp_path, name):
    more, lines = BESIDE_WHOLE[name]
    answer = "output" if "instruction" in more else "chosen"
    assert lines_on(write(tmp_path / "t.jsonl", [more | {answer: [Q, A]}] * 2), tmp_path) == lines
