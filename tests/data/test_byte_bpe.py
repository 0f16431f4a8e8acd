"""Byte-level BPE by tiktoken: the ids of `tokenizers` for every text, or the tokenizer itself."""

import json
import random
from pathlib import Path

import pytest
from conftest import ROOT, SHARED, needs_shared, write_json_data
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.data.prepared_data import SEED, prepare
from utils.data.formats.custom import OwnOptions
from utils.data.prepare import Preparation
from utils.data.streaming import create_prompt_stream
from utils.data.tokenization import byte_bpe
from utils.data.tokenization.byte_bpe import ROWS_WORTH_IT, ByteBpe, quick_tokenizer, unknown_character
from utils.data.tokenization.tokenize_rows import SampleForm
from utils.model.tokenizer import load_hf_tokenizer

DEMO = ROOT / "demo" / "tiny_opt"
QWEN = (  # as in its tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BLOOM = " ?[^(\\s|[.,!?…。，、।۔،])]+"


def demo_rules() -> dict:
    return json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))


def from_rules(rules: dict) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(rules)), eos_token="</s>")


def with_words_split_by(pattern: str, nfc: bool = False) -> PreTrainedTokenizerFast:
    """The demo's vocabulary with another expression."""
    tokenizer = Tokenizer.from_str(json.dumps(demo_rules()))
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


TOKENIZERS = {
    "demo": lambda: load_hf_tokenizer(str(DEMO)),
    "qwen's words": lambda: with_words_split_by(QWEN, nfc=True),
    "opt": lambda: load_hf_tokenizer(str(SHARED / "tokenizers" / "opt-350m")),
    "gpt2": lambda: PreTrainedTokenizerFast(tokenizer_file=str(SHARED / "tokenizers" / "gpt2" / "tokenizer.json")),
    "neox": lambda: PreTrainedTokenizerFast(
        tokenizer_file=str(SHARED / "tokenizers" / "gpt-neox-20b" / "tokenizer.json")
    ),
}


@pytest.fixture(
    scope="module",
    params=[
        name if name in ("demo", "qwen's words") else pytest.param(name, marks=needs_shared) for name in TOKENIZERS
    ],
)
def pair(request):
    """A tokenizer and its `ByteBpe`."""
    tokenizer = TOKENIZERS[request.param]()
    quick = quick_tokenizer(tokenizer, ROWS_WORTH_IT)
    assert isinstance(quick, ByteBpe)
    return tokenizer, quick


def assert_same(pair, texts: list[str]) -> None:
    tokenizer, quick = pair
    for special in (True, False):
        expected = tokenizer(texts, add_special_tokens=special)["input_ids"]
        assert quick(texts, add_special_tokens=special)["input_ids"] == expected


@pytest.mark.parametrize("name", ["demo", "qwen's words"])
def test_every_character_in_every_neighbourhood(name):
    """65,536 characters, each between letters, figures, spaces, signs and line ends; most are encoded by tiktoken."""
    tokenizer = TOKENIZERS[name]()
    quick = quick_tokenizer(tokenizer, ROWS_WORTH_IT)
    letters = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]
    texts = [f"a{c}1{c}b {c}.{c}{c}\n{c}\t {c}'{c}" for c in letters]
    assert_same((tokenizer, quick), texts)
    assert sum(map(quick.takes, texts)) > 40_000


def test_words_that_tell_expressions_apart(pair):
    assert_same(
        pair,
        [
            "", " ", "  ", "\n", "a", "I'm you'RE they'll we'd 's'T 'x", "  two   spaces\t\ttabs\r\n\r\n  ",
            "3.14 12345 ½ ٣", "naïve",
            "café", "cafe\u0301 e\u0301", "日本語 テキスト。", "😀 and \U0001f469\u200d\U0001f467 end",
            "\u017fs '\u017f \u212a", "a</s>b<pad>", "<|endoftext|>", "x" * 3000, "ab" * 2000,
            "\x1c\x1d\x85\xa0\u2028\u3000 .", "\ufdd0 noncharacter \ufdd0", "\U0001d54f math", "\x00\x01",
        ],
    )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"])) | st.text("ab '\n\t.1é日sS", max_size=60),
        min_size=1,
        max_size=8,
    )
)
def test_any_texts(pair, texts):
    assert_same(pair, texts)


@needs_shared
def test_real_texts_in_many_languages(pair):
    import pyarrow.parquet as pq

    texts = []
    for file in sorted((SHARED / "hub").rglob("*.parquet")):
        table = pq.read_table(file)
        for name in table.column_names:
            if str(table.schema.field(name).type) in ("string", "large_string"):
                texts += [text for text in table[name].to_pylist()[:200] if text]
    assert len(texts) > 5_000
    assert_same(pair, texts)
    assert sum(map(pair[1].takes, texts)) > 0.75 * len(texts)


def test_one_thread_gives_the_same(pair, monkeypatch):
    texts = [f"sentence {number}: {'and so on ' * (number % 7)}" for number in range(300)]
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    many = pair[1](texts)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert pair[1](texts) == many == {"input_ids": pair[0](texts)["input_ids"]}


# ------------------------------------------------------------------------------------- what is left alone


def changed(**model) -> PreTrainedTokenizerFast:
    rules = demo_rules()
    rules["model"].update(model)
    return from_rules(rules)


def with_prefix_space() -> PreTrainedTokenizerFast:
    rules = demo_rules()
    rules["pre_tokenizer"]["add_prefix_space"] = True
    return from_rules(rules)


def small(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """All bytes, and these merges."""
    tokens = [*byte_bpe.BYTES, *dict.fromkeys("".join(merge) for merge in merges), "</s>"]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


OTHERS = {
    "dropout": lambda: changed(dropout=0.1),
    "whole words first": lambda: changed(ignore_merges=True),
    "a space first": with_prefix_space,
    "words that leave characters over": lambda: with_words_split_by(BLOOM),
    "words that leave one character over": lambda: with_words_split_by("[^\u0e2a]+"),
    "a token made in two ways": lambda: small([("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]),
    "a token that is never made": lambda: small([("b", "c"), ("a", "b"), ("ab", "c")]),
    "sentencepiece's kind": lambda: AutoTokenizer.from_pretrained(SHARED / "stories260K"),
}


@pytest.mark.parametrize(
    "kind", [name if name != "sentencepiece's kind" else pytest.param(name, marks=needs_shared) for name in OTHERS]
)
def test_other_kinds_are_left_to_the_tokenizer_itself(kind):
    tokenizer = OTHERS[kind]()
    assert quick_tokenizer(tokenizer, ROWS_WORTH_IT) is tokenizer


def test_a_token_that_is_never_made_would_be_made_by_tiktoken():
    """Why the whole vocabulary is looked through: `bc` comes first, `a bc` is no pair, and tiktoken joins them."""
    tokenizer = OTHERS["a token that is never made"]()
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    unchecked = ByteBpe(tokenizer, byte_bpe.r50k_pat_str, byte_bpe._ids_in_order(rules["model"]), nfc=False)
    assert len(tokenizer("abc")["input_ids"]) == 2
    assert len(unchecked(["abc"])["input_ids"][0]) == 1
    assert isinstance(quick_tokenizer(small([("a", "b"), ("b", "c"), ("ab", "c")]), ROWS_WORTH_IT), ByteBpe)


def test_few_rows_are_not_worth_it():
    tokenizer = TOKENIZERS["demo"]()
    assert quick_tokenizer(tokenizer, ROWS_WORTH_IT - 1) is tokenizer


def test_without_tiktoken_the_tokenizer_does_all(monkeypatch):
    tokenizer = TOKENIZERS["demo"]()
    monkeypatch.setattr(byte_bpe, "tiktoken", None)
    assert quick_tokenizer(tokenizer, ROWS_WORTH_IT) is tokenizer


def test_known_characters_hold_the_common_ones():
    assert not unknown_character().search("Text, \n\t “quotes” – naïve Ελληνικά кириллица 日本語テキスト 한국어 עברית")
    assert all(unknown_character().search(letter) for letter in ("😀", "\ufdd0", "\u017f", "\U00020000"))


# ------------------------------------------------------------------------------------------- data sets


@pytest.fixture
def data(tmp_path) -> Path:
    """60 rows: plain ones, some with added tokens, some with characters that go to the tokenizer itself."""
    draw = random.Random(0)
    ends = ("", "</s> and on", " 😀", " e\u0301")
    records = [
        {"prompt": f"number {n}? {'more ' * draw.randrange(30)}", "chosen": f"yes {n}{ends[n % 4]}", "rejected": "no"}
        for n in range(60)
    ]
    return write_json_data(tmp_path, records, records[:5])


@pytest.mark.parametrize("workers", [None, 2])
@pytest.mark.parametrize("phase", [1, 2, 3])
def test_data_sets_are_the_same(data, tmp_path, monkeypatch, capsys, phase, workers):
    def build(folder: str) -> list:
        tokenizer = load_hf_tokenizer(str(DEMO))
        parts = prepare([data], tmp_path / folder, tokenizer, 48, "4,3,3", phase, num_proc=workers)
        return [part.table.with_format(None)[:] for part in parts]

    expected = build("plain")
    monkeypatch.setattr(byte_bpe, "ROWS_WORTH_IT", 1)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    taken = []
    monkeypatch.setattr(ByteBpe, "__call__", _counting(ByteBpe.__call__, taken))
    assert build("quick") == expected
    assert workers or sum(taken) > 10
    assert " rows tokenized by tiktoken, with this tokenizer's ids" in capsys.readouterr().out


def _counting(call, taken: list[int]):
    def counted(self, texts, **options):
        taken.append(sum(map(self.takes, texts)))
        return call(self, texts, **options)

    return counted


def test_streams_are_the_same(data, tmp_path, monkeypatch):
    def window() -> list:
        sample = SampleForm(load_hf_tokenizer(str(DEMO)), "</s>", 48)
        preparation = Preparation(0, str(tmp_path / "unused"), 1, SEED)
        stream, _ = create_prompt_stream([str(data)], sample, OwnOptions(), preparation, 20)
        return [stream[place]["input_ids"].tolist() for place in range(len(stream))]

    expected = window()
    monkeypatch.setattr(byte_bpe, "ROWS_WORTH_IT", 1)
    assert window() == expected
