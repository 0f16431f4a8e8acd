"""Special tokens in what users bring: one BOS whoever wrote it, prompts rendered already, markers in plain words."""

import json

import pytest
from conftest import ROOT, needs_shared
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from tests.data.prepared_data import prepare
from tests.data.test_chat_format import CHATML, labelled
from utils.data.formats.rendered import MARKED, SPOKEN, rendering_of

CASES = ROOT.parent / "shared" / "cases" / "data"
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# BOS, whether the tokenizer adds it, other special tokens, template.
KINDS = {
    "llama": ("<s>", True, [], None),
    "gpt2": ("<|endoftext|>", False, [], None),
    "gemma": ("<bos>", True, ["<start_of_turn>", "<end_of_turn>"], None),
    "llama3": (
        "<|begin_of_text|>", True, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], LLAMA3,
    ),
    "qwen": (None, False, ["<|im_start|>", "<|im_end|>"], CHATML),
    "opt": ("</s>", True, [], None),
}  # fmt: skip


def tokenizer_of(kind: str):
    """A tokenizer with the special tokens of a family; samples end in `</s>`."""
    bos, adds, others, template = KINDS[kind]
    made = AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt")
    made.add_special_tokens({"additional_special_tokens": others} | ({"bos_token": bos} if bos else {}))
    made.bos_token = bos
    rule = TemplateProcessing(f"{bos} $A", special_tokens=[(bos, made.bos_token_id)]) if adds else None
    made.backend_tokenizer.post_processor = rule or TemplateProcessing("$A")
    made.chat_template = template
    return made


def built(folder, tokenizer, rows: list[dict], **changes):
    """Training samples of these rows, in their order: (ids, texts of labelled runs)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"completion_only": True, **changes}
    train = prepare([folder], f"{folder}_cache", tokenizer, 256, **settings)[0]
    made = [(train[i]["input_ids"].tolist(), labelled(train[i], tokenizer)) for i in range(len(train))]
    return sorted(made, key=lambda pair: pair[0])


def ended(ids: list[int]) -> list[int]:
    return ids if ids[-1] == 2 else [*ids, 2]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma", "llama3", "opt"])
@pytest.mark.parametrize("only", [True, False])
def test_a_text_that_begins_with_bos_gets_no_second_one(tmp_path, kind, only, capsys):
    """Each row for itself: the first 100 rows, which are looked at before, say nothing about the last ones."""
    tokenizer = tokenizer_of(kind)
    bos = tokenizer.bos_token
    texts = [f"Plain text {number}." for number in range(101)]
    texts += [f"{bos}With its own {number}." for number in range(3)] + [f"\n {bos} After white space."]
    made = built(tmp_path / "d", tokenizer, [{"text": text} for text in texts], completion_only=only)
    wanted = [ended(tokenizer(text, add_special_tokens=bos not in text)["input_ids"]) for text in texts]
    assert [ids for ids, _ in made] == sorted(wanted)
    for ids, _ in made:
        assert ids[:-1].count(tokenizer.bos_token_id) == (KINDS[kind][1] or bos in tokenizer.decode(ids[:-1]))
    out = capsys.readouterr().out
    assert "8 of 210 rows begin with BOS in the text: no other is added" in out
    assert "special tokens inside" not in out


@pytest.mark.parametrize("kind", ["llama", "gemma", "opt"])
def test_prompts_as_they_stand_get_one_bos(tmp_path, kind):
    tokenizer = tokenizer_of(kind)
    bos = tokenizer.bos_token
    rows = [{"prompt": "Q: a\nA:", "response": " b"}, {"prompt": f"{bos}Q: c\nA:", "response": " d"}]
    made = built(tmp_path / "d", tokenizer, rows, chat_template="none")
    assert [ids.count(tokenizer.bos_token_id) for ids, _ in made] == [1 + (kind == "opt")] * 2
    assert sorted(spans for _, spans in made) == [[" b</s>"], [" d</s>"]]


@pytest.mark.parametrize("kind", KINDS)
@needs_shared
def test_rendered_prompts_are_not_rendered_again(tmp_path, kind, capsys):
    """Llama 3's rendering, whatever the tokenizer: its own BOS, another one, or none."""
    tokenizer = tokenizer_of(kind)
    rows = [json.loads(line) for line in (CASES / "08_prerendered_bos" / "p.jsonl").read_text().splitlines()]
    made = built(tmp_path / "d", tokenizer, rows)
    for (ids, spans), row in zip(made, sorted(rows, key=lambda row: made_of(tokenizer, row)), strict=True):
        assert ids == made_of(tokenizer, row)
        assert spans == [row["completion"] + "</s>"]
        assert ids[:-1].count(tokenizer.bos_token_id) == (1 if KINDS[kind][1] else 0) or tokenizer.bos_token is None
    assert "40 of 40 rows have a prompt that is rendered already" in capsys.readouterr().out


def made_of(tokenizer, row: dict) -> list[int]:
    text = row["prompt"] + row["completion"]
    own = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return ended(tokenizer(text, add_special_tokens=not own)["input_ids"])


def test_each_prompt_is_rendered_or_not_for_itself(tmp_path, capsys):
    """Plain ones among rendered ones, beyond the rows that are looked at before."""
    tokenizer = tokenizer_of("qwen")
    rendered = "<|im_start|>user\nq{}<|im_end|>\n<|im_start|>assistant\n"
    rows = [{"prompt": rendered.format(number), "response": "a<|im_end|>"} for number in range(101)]
    rows += [{"prompt": f"plain {number}", "response": "b"} for number in range(2)]
    rows += [{"prompt": "Human: c Assistant:", "response": "d"}]
    made = built(tmp_path / "d", tokenizer, rows)
    texts = [tokenizer.decode(ids) for ids, _ in made]
    assert all(text.count("<|im_start|>user") == 1 for text in texts if "Human:" not in text)
    assert sum("plain" in text for text in texts) == 2 and "Human: c Assistant: d</s>" in texts
    out = capsys.readouterr().out
    assert "204 of 208 rows have a prompt that is rendered already: prompt and answer are used as they stand" in out


def test_the_human_assistant_guess_is_made_for_each_row(tmp_path, capsys):
    rows = [{"prompt": f"Human: {number}? Assistant:", "response": "yes"} for number in range(101)]
    rows.append({"prompt": "Not finished", "response": "no"})
    made = built(tmp_path / "d", tokenizer_of("llama"), rows)
    texts = [tokenizer_of("llama").decode(ids) for ids, _ in made]
    assert "<s> Human: Not finished Assistant: no</s>" in texts and "<s>Human: 7? Assistant: yes</s>" in texts
    assert "202 of 204 rows have a prompt that is rendered already" in capsys.readouterr().out


def test_none_adds_no_character(tmp_path):
    tokenizer = tokenizer_of("gpt2")
    rows = [{"prompt": prompt, "response": answer} for prompt, answer in
            (("def f():", "\n  pass"), ("Say it", "!"), ("Human: c Assistant:", "d"), ("e ", " f"))]  # fmt: skip
    made = built(tmp_path / "d", tokenizer, rows, chat_template="none")
    wanted = {row["prompt"] + row["response"] + "</s>": [row["response"] + "</s>"] for row in rows}
    assert {tokenizer.decode(ids): spans for ids, spans in made} == wanted


def test_text_beside_a_rendered_prompt_is_counted(tmp_path, capsys):
    rows = [{"prompt": "[INST] a [/INST]", "response": "b", "system": "Be brief."},
            {"prompt": "a", "response": "b", "system": "Be brief."}]  # fmt: skip
    made = built(tmp_path / "d", tokenizer_of("llama"), rows)
    assert sum("Be brief." in tokenizer_of("llama").decode(ids) for ids, _ in made) == 1
    assert "2 of 4 rows have a system text, history or tools beside a prompt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "rows", "words"),
    [
        (
            "qwen", [{"messages": [{"role": "user", "content": "What is <|im_end|>, and <|im_start|>system?"},
                                   {"role": "assistant", "content": "<|im_end|> closes a turn."}]}],
            "2 of 4 rows have special tokens inside their own texts, which the tokenizer reads as such: "
            "<|im_start|> (in 2), <|im_end|> (in 2)",
        ),
        ("llama", [{"prompt": "Strike <s>it</s> out.", "response": "So: <s>it"}], "<s> (in 2), </s> (in 2)"),
        ("llama", [{"text": "<s>One</s><s>two</s>"}], "<s> (in 2), </s> (in 2)"),
        ("gemma", [{"prompt": "What is <bos>?", "response": "BOS"}], "reads as such: <bos> (in 2)"),
    ],
)  # fmt: skip
def test_special_tokens_in_plain_words_are_counted(tmp_path, kind, rows, words, capsys):
    plain = {key: value for key, value in rows[0].items() if key == "text"} and {"text": "plain"}
    plain = plain or ({"prompt": "p", "response": "r"} if "prompt" in rows[0] else {"messages": [
        {"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]})  # fmt: skip
    built(tmp_path / "d", tokenizer_of(kind), [*rows, plain])
    out = capsys.readouterr().out
    assert f"{words}\n" in out, out
    assert out.count("special tokens inside") == 1


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("<|im_start|>user\nhi<|im_end|>\n", MARKED),
        ("You are a bot.\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n", MARKED),
        ("<|begin_of_text|>Once", MARKED),
        ("<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n", MARKED),
        ("<s>[INST] hi [/INST]", MARKED),
        ("[INST] <<SYS>>\nx\n<</SYS>>\n\nhi [/INST]", MARKED),
        ("<|user|>\nhi</s>\n<|assistant|>\n", MARKED),
        ("<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜>", MARKED),
        ("<|start|>user<|message|>hi<|end|><|start|>assistant", MARKED),
        ("<own_bos>hi", MARKED),
        ("<turn>user hi<turn>model\n", MARKED),
        ("USER: hi ASSISTANT:", SPOKEN),
        ("### Instruction:\nhi\n\n### Response:\n", SPOKEN),
        ("What does <|im_end|> mean in a prompt, and <|im_start|>system?", None),
        ("<|im_start|>system? What is that?", None),
        ("Strike <s>word</s> out.", None),
        ("<s>word</s> is struck.", None),
        ("Who said [INST] first?", None),
        ("<turn> is what?", None),
        ("Write an ad for a voice assistant", None),
    ],
)
def test_what_a_rendered_prompt_is(prompt, found):
    assert rendering_of(prompt, "<own_bos>", ("<own_bos>", "<turn>")) is found


def test_struck_words_of_html_are_no_bos():
    """`<s>` is BOS of one family: followed by words in plain or by a marker it begins a rendering."""
    assert rendering_of("<s>word</s> is struck.", "<s>") is None
    for prompt in ("<s>Q: a", "<s>[INST] a [/INST] b</s><s>[INST] c [/INST]", "<s>a</s>", "<s>a</s><s>b"):
        assert rendering_of(prompt, "<s>") is MARKED
