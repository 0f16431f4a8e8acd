"""The same rows give the same ids and the same labels, whatever file they come from, prepared or streamed."""

import json

import pytest

from tests.data.template_kinds import KINDS, as_samples, samples_of, tokenizer_of
from tests.data.test_own_formats import write
from utils.data.formats import chat_template
from utils.data.formats.custom import own_options
from utils.data.open_sets import Preparation
from utils.data.streaming import SFT_PHASE, create_prompt_stream
from utils.data.tokenization.tokenize_rows import SampleForm

FILES = ("t.jsonl", "t.json", "t.jsonl.gz", "t.JSONL", "t.parquet", "t.csv", "saved", "shards.jsonl", "shards.parquet")


def talk(number: int) -> list[dict]:
    """A conversation with fields that the next one does not have."""
    asked = {"role": "user", "content": f"Question {number}?"}
    answer = {"role": "assistant", "content": f"Answer {number}."}
    if number % 4 == 0:
        given = {"town": f"Town {number}"} if number % 8 else {"days": number, "names": ["a", "b"]}
        call = {"id": f"c{number}", "type": "function", "function": {"name": f"look{number}", "arguments": given}}
        asking = {"role": "assistant", "content": None if number % 8 else "", "tool_calls": [call]}
        return [asked, asking, {"role": "tool", "tool_call_id": f"c{number}", "content": f"{number}"}, answer]
    if number % 4 == 1:
        return [asked, answer | {"weight": 0}, asked | {"name": "Ann"}, answer | {"weight": 1, "content": "Better."}]
    if number % 4 == 2:
        return [{"role": "system", "content": "Be brief."}, asked, answer | {"reasoning_content": f"Since {number}."}]
    return [asked, answer, asked, answer | {"content": ""}, asked, answer, asked]


def rows() -> list[dict]:
    made = []
    for number in range(12):
        tool = {"name": f"look{number}", "parameters": {"properties": {f"x{number % 2}": {"type": "string"}}}}
        made.append({"messages": talk(number), "source": f"s{number}"})
        made[-1] |= {"tools": [{"type": "function", "function": tool}]} if number % 4 == 0 else {}
    return made


def write_rows(path, found: list[dict]):
    """Write rows in the way that a name says; `shards.*` is a folder of two files, the second with more fields."""
    if path.name.startswith("shards"):
        for number, half in enumerate((found[1:4], found[4:] + found[:1])):
            write(path.parent / "set" / f"train-{number:05d}-of-00002{path.suffix}", half)
        return path.parent / "set"
    if path.suffix == ".csv":
        names = ("messages", "tools", "source")
        found = [{name: json.dumps(row[name]) if name in row else "" for name in names} for row in found]
    if path.suffix == ".JSONL":
        return write(path.with_suffix(".jsonl"), found).rename(path)
    return write(path, found)


def streamed(path, cache, size: int = 100) -> list:
    """All training samples of one pass of a stream."""
    tokenizer = tokenizer_of("qwen")
    form = SampleForm(tokenizer, tokenizer.eos_token, 1024, completion_only=True)
    own, preparation = own_options(tokenizer, form.end_id), Preparation(0, str(cache), SFT_PHASE, 1234)
    stream, _ = create_prompt_stream([str(path)], form, own, preparation, size, eval_data_path=[str(path)])
    return as_samples([stream[place] for place in range(len(stream))], tokenizer)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory) -> list:
    """The samples from one object per line, whose labels are looked at here."""
    folder = tmp_path_factory.mktemp("wanted")
    samples = samples_of(write(folder / "t.jsonl", rows()), folder / "cache")
    labels = {text for sample in samples for text in sample.labels}
    assert len(samples) == 12 and "<think>\nSince 2.\n</think>\n\nAnswer 2.<|im_end|>" in labels
    assert {"Better.<|im_end|>", "Answer 4.<|im_end|>"} <= labels and "Answer 1.<|im_end|>" not in labels
    assert (
        '<tool_call>\n{"name": "look8", "arguments": {"days": 8, "names": ["a", "b"]}}\n</tool_call><|im_end|>'
        in labels
    )
    assert sum('"x0"' in sample.text for sample in samples) == 3
    return samples


@pytest.mark.parametrize("name", FILES)
def test_every_file_prepared_and_streamed(tmp_path, wanted, name):
    path = write_rows(tmp_path / name, rows())
    assert samples_of(path, tmp_path / "cache") == wanted
    assert streamed(path, tmp_path / "cache") == wanted


def test_calls_as_text_are_the_same_calls(tmp_path, wanted):
    """As OpenAI writes them: arguments, tools and whole conversations as JSON text."""
    found = rows()
    for row in found:
        for message in row["messages"]:
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        row |= {name: json.dumps(row[name]) for name in ("messages", "tools") if name in row}
    for name in ("t.jsonl", "t.parquet"):
        assert samples_of(write(tmp_path / name, found), tmp_path / "cache") == wanted


# ------------------------------------------------------------------------------------------ work a turn

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)


ESCAPED = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{{ m.content | tojson }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)


@pytest.mark.parametrize("kind", ["qwen", "llama", "gemma", "marked", "last turn", "escaped"])
def test_a_conversation_twice_as_long_takes_twice_the_work(tmp_path, monkeypatch, kind):
    """Work is the number of messages rendered: at most three renderings of a conversation, however long it is."""
    base = kind if kind in KINDS else "qwen"
    more = {"last turn": {"train_turns": "last"}}
    for name, template in (("marked", MARKED), ("escaped", ESCAPED)):
        (tmp_path / f"{name}.jinja").write_text(template)
        more[name] = {"chat_template": str(tmp_path / f"{name}.jinja")}
    rendered = []
    as_read = chat_template._as_read
    monkeypatch.setattr(chat_template, "_as_read", lambda chat, said: rendered.append(len(said)) or as_read(chat, said))
    work = {}
    for turns in (200, 400):
        said = [{"role": ("user", "assistant")[place % 2], "content": f'a "word"\n{place}'} for place in range(turns)]
        path = write(tmp_path / f"{turns}.jsonl", [{"messages": said}] * 2)
        rendered.clear()
        samples = samples_of(path, tmp_path / "cache", base, max_seq_len=100_000, **more.get(kind, {}))
        assert [len(sample.labels) for sample in samples] == 2 * [1 if kind == "last turn" else turns // 2]
        work[turns] = sum(rendered)
    few = 50  # small conversations that are rendered to learn what the template does
    assert 2 * 200 <= work[200] <= 3 * 2 * 200 + few and work[400] <= 2 * work[200]
