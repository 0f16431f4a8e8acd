"""Chat templates: the ids transformers gives, one BOS, labels on what the assistant says, and whole runs."""

import json
import re

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from tests.data.prepared_data import prepare
from utils.data.formats.chat_template import render, resolve_chat_format
from utils.data.formats.conversations import Conversation
from utils.data.formats.labels import answer_spans
from utils.errors import UserError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# As Qwen 3's: the last answer is written in another way than the same one in the middle.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = INST.replace(
    "{{ ' ' + m['content'] + eos_token }}", "{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}"
)
TEMPLATES = {"chatml": CHATML, "inst": INST, "thinking": THINKING, "marked": MARKED}
SPOKEN = {
    "chatml": ["Paris.<|im_end|>", "Rome.<|im_end|>\n</s>"], "inst": [" Paris.</s>", " Rome.</s>"],
    "thinking": ["Paris.<|im_end|>", "<think>\n\n</think>\n\nRome.<|im_end|>\n</s>"],
    "marked": [" Paris.</s>", " Rome.</s>"],
}  # fmt: skip
TALK = [
    {"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy?"}, {"role": "assistant", "content": "Rome."},
]  # fmt: skip


def tokenizer_with(template: str | None):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt")
    tokenizer.chat_template = template
    return tokenizer


def build(folder, tokenizer, rows, max_seq_len=192, **changes):
    folder.mkdir(exist_ok=True)
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    settings = {"completion_only": True, **changes}
    return prepare([folder], f"{folder}_cache", tokenizer, max_seq_len, **settings)[0]


def labelled(item: dict, tokenizer) -> list[str]:
    """The texts of the runs of labelled tokens."""
    texts, run = [], []
    for token, label in zip(item["input_ids"].tolist(), [*item["labels"].tolist()[1:], -100], strict=True):
        del token
        if label == -100 and run:
            texts.append(tokenizer.decode(run))
            run = []
        elif label != -100:
            run.append(label)
    return texts


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers_and_labels_the_assistants(name, tmp_path):
    tokenizer = tokenizer_with(TEMPLATES[name])
    item = build(tmp_path / "d", tokenizer, [TALK])[0]
    ids = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
    ids = ids if ids[-1] == 2 else [*ids, 2]
    assert item["input_ids"].tolist() == ids, "one end token, whoever wrote it"
    bos = ids[0] == 2
    assert bos == ("bos_token" in TEMPLATES[name]) and ids[1] != 2, "one BOS where the template writes one"
    assert labelled(item, tokenizer) == SPOKEN[name]
    everything = build(tmp_path / "d", tokenizer, [TALK], completion_only=False)
    assert everything[0]["input_ids"].equal(item["input_ids"]) and everything.label_counts().tolist() == [len(ids) - 1]


def test_a_marked_template_gives_the_mask_of_transformers(tmp_path):
    tokenizer = tokenizer_with(MARKED)
    train = build(tmp_path / "d", tokenizer, [TALK])
    wanted = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert (train[0]["labels"] != -100).int().tolist() == wanted["assistant_masks"]
    assert train.label_counts().tolist() == [sum(wanted["assistant_masks"])]


def test_label_counts_of_several_spans_and_truncated_samples(tmp_path):
    tokenizer = tokenizer_with(INST)
    rows = [TALK, TALK[:2], [TALK[0], {"role": "assistant", "content": "word " * 100}], TALK * 3]
    train = build(tmp_path / "d", tokenizer, rows, max_seq_len=96)
    counts = [(train[i]["labels"][1:] != -100).sum().item() for i in range(4)]
    assert train.label_counts().tolist() == counts and len(set(counts)) == 4
    assert train.lengths().max() == 96


def test_an_answer_beyond_max_seq_len_is_dropped(tmp_path, capsys):
    rows = [TALK, [{"role": "user", "content": "word " * 200}, TALK[1]]]
    assert len(build(tmp_path / "d", tokenizer_with(INST), rows)) == 1
    assert "1 dropped (1 answer cut off entirely by --max_seq_len)" in capsys.readouterr().out


def test_human_assistant_labels_every_turn(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    item = build(tmp_path / "d", tokenizer, [TALK], chat_template="human_assistant")[0]
    text = " Human: Capital of France? Assistant: Paris. Human: And of Italy? Assistant: Rome."
    assert item["input_ids"].tolist() == [*tokenizer(text)["input_ids"], 2]
    assert labelled(item, tokenizer) == [" Paris.", " Rome.</s>"]
    plain = tokenizer_with(None)
    assert build(tmp_path / "e", plain, [TALK])[0]["input_ids"].equal(item["input_ids"]), "auto without a template"


def test_a_template_without_bos_is_said(tmp_path, capsys):
    build(tmp_path / "d", tokenizer_with(CHATML), [TALK])
    assert "texts: the tokenizer's chat template; evaluation: eval.jsonl; no BOS" in capsys.readouterr().out
    build(tmp_path / "d", tokenizer_with(INST), [TALK])
    assert "no BOS" not in capsys.readouterr().out


def test_a_template_that_marks_nothing(tmp_path):
    """With the marks in the wrong place the mask is all zero: an error, not a run that learns nothing."""
    wrong = INST.replace("{{ '[INST] '", "{% generation %}{% endgeneration %}{{ '[INST] '")
    chat = resolve_chat_format("auto", tokenizer_with(wrong), "</s>")
    _, marked = render_jinja_template([TALK], chat_template=wrong, return_assistant_tokens_mask=True, eos_token="</s>")
    assert all(start >= end for start, end in marked[0])
    with pytest.raises(UserError, match="marks no word of the assistant's"):
        answer_spans(chat, Conversation(TALK), render(chat, TALK))
    with pytest.raises(UserError, match="marks no word of the assistant's"):
        build(tmp_path / "d", tokenizer_with(wrong), [TALK])


def test_a_template_that_hides_answers(tmp_path):
    """What it makes of an answer depends on what follows, so it can't be found: each answer is a sample of its own."""
    template = CHATML.replace("m['content']", "(m['content'] | upper if loop.last else m['content'])")
    tokenizer = tokenizer_with(template)
    chat = resolve_chat_format("auto", tokenizer, "</s>")
    assert answer_spans(chat, Conversation(TALK), render(chat, TALK)) is None
    train = build(tmp_path / "d", tokenizer, [TALK])
    assert [labelled(train[i], tokenizer) for i in range(2)] == [["PARIS.<|im_end|>\n</s>"], ["ROME.<|im_end|>\n</s>"]]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_row_refused_late_is_named_with_its_file(tmp_path, processes):
    """Beyond the rows tried at the start, in the second of two files."""
    late = [{"role": "tool", "content": "late"}, TALK[1]]
    for number, rows in enumerate(([TALK] * 130, [TALK] * 4 + [late])):
        file = tmp_path / "d" / f"train-{number:05d}-of-00002.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    tokenizer = tokenizer_with(INST)
    with pytest.raises(UserError, match=r"train-00001-of-00002\.jsonl, record 5: .*only user and assistant"):
        prepare([tmp_path / "d"], tmp_path / "cache", tokenizer, 96, num_proc=processes)


@pytest.mark.parametrize(
    ("choice", "template", "words"),
    [
        ("no_such_file.jinja", None, "is no file: give auto, human_assistant, none"),
        ("auto", "{% for m in messages %}", "the tokenizer's chat template fails"),
        ("auto", "{{ raise_exception('never') }}", "never"),
    ],
)
def test_bad_templates(choice, template, words):
    with pytest.raises(UserError, match=re.escape(words)):
        resolve_chat_format(choice, tokenizer_with(template), "</s>")


# ------------------------------------------------------------------------------------------ whole runs


@pytest.fixture
def arguments(tiny_opt, tmp_path):
    """A run on two sets of one's own, conversations and instructions, by a template of one's own."""
    rows = [
        [{"role": "user", "content": f"Number {i}?"}, {"role": "assistant", "content": f"It is {i}."}]
        for i in range(20)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    lines = "".join(f"Say {i},,Said {i}\n" for i in range(20))
    (tmp_path / "tasks.csv").write_text("task,input,output\n" + lines)
    (tmp_path / "inst.jinja").write_text(INST)
    return [
        "--model_name_or_path", tiny_opt, "--data_path", tmp_path / "chats.jsonl", "--data_split", "10,0,0",
        "--data_output_path", tmp_path / "cache", "--max_seq_len", "64", "--dtype", "fp32", "--print_loss",
        "--chat_template", tmp_path / "inst.jinja", "--completion_only_loss", "--output_dir", tmp_path / "out",
    ]  # fmt: skip


def test_a_run_on_conversations(arguments, run_inside, tmp_path):
    status, out, err = run_inside([*arguments, "--learning_rate", "5e-3", "--num_train_epochs", "2"])
    assert status == 0, out + err
    before, *_, after = (float(number) for number in re.findall(r"^ppl: (\S+),", out, re.MULTILINE))
    assert after < 0.5 * before
    assert "Data train: 18 samples" in out and "Data eval: 2 samples" in out
    assert all(torch.isfinite(tensor).all() for tensor in load_file(tmp_path / "out" / "model.safetensors").values())


def test_columns_and_weights_on_the_command_line(arguments, run_inside, tmp_path):
    data = ["--data_path", f"{tmp_path}/tasks.csv:0.5", "--columns", "instruction=task", "--dry_run"]
    status, out, err = run_inside([*arguments, *data])
    assert status == 0, out + err
    assert "instruction = task, output, input" in out and "weight 0.5, 9 rows of 18" in out
    assert "Data train: 9 samples" in out


def test_mistakes_are_shown_together(arguments, run_inside, tmp_path):
    """Before a model is loaded or anything is written."""
    chats = [*TALK, {"role": "system", "content": "late"}, TALK[1]]
    (tmp_path / "refused.jsonl").write_text(json.dumps({"messages": TALK}) + "\n" + json.dumps({"messages": chats}))
    changes = [
        "--data_path", f"{tmp_path}/chats.jsonl:0", f"{tmp_path}/refused.jsonl", tmp_path / "nowhere.jsonl",
        "--columns", "prompt:question", "--dropout", "2",
    ]  # fmt: skip
    status, _, err = run_inside([*arguments, *changes])
    assert status == 2 and "Traceback" not in err and "5 problems" in err
    for words in (
        "must be a number above 0", "refused.jsonl, record 2: ", "only user and assistant",
        "is no file or folder that exists", "'prompt:question' is not ROLE=COLUMN", "--dropout",
    ):  # fmt: skip
        assert words in err, err
    assert not (tmp_path / "out").exists()
    known = ["--data_path", "local/jsonfile", "--columns", "prompt=q", "--chat_template", "nothing.jinja"]
    status, _, err = run_inside([*arguments, *known])
    assert status == 2 and "2 problems" in err
    assert "--columns is for data of your own" in err and "nothing.jinja is no file" in err
