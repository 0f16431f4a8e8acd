"""The shipped demo: data, tokenizer and tiny model are what the demo needs, and can be made again as shipped."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from demo import make_demo_data, make_tiny_opt

ROOT = Path(__file__).resolve().parents[2]
ASSETS_DIR = ROOT / "demo" / "tiny_opt"

TEXTS = [
    " Human: What is the capital of France? Assistant: The capital of France is Paris.",
    "no space in front,  two inside, a line\nend and a tab\t",
    "bytes outside the training texts: Füße, 東京, 🙂, \x00\x7f",
    "",
]


def read_records(name: str) -> list[dict[str, str]]:
    return json.loads((ROOT / "data" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS_DIR)


@pytest.fixture(scope="module")
def tiny_opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "tiny_opt"
    make_tiny_opt.make_model(folder)
    return folder


@pytest.mark.parametrize(("name", "at_least"), [("train", 2000), ("eval", 200)])
def test_records_have_shape_and_number(name: str, at_least: int) -> None:
    records = read_records(name)
    assert len(records) >= at_least
    for record in records:
        assert list(record) == ["prompt", "chosen", "rejected"]
        assert all(isinstance(value, str) and value and value == value.strip() for value in record.values())
        assert record["prompt"].startswith("Human: ")
        assert record["prompt"].endswith(" Assistant:")
        assert record["chosen"] != record["rejected"]


def test_no_prompt_twice_and_none_shared() -> None:
    train, evaluation = ([record["prompt"] for record in read_records(name)] for name in ("train", "eval"))
    assert len(set(train)) == len(train)
    assert len(set(evaluation)) == len(evaluation)
    assert not set(train) & set(evaluation)


def test_built_in_prompts_are_held_out() -> None:
    prompts = {record["prompt"] for record in read_records("train")}
    assert not prompts & {f"Human: {question} Assistant:" for question in make_demo_data.BUILT_IN_QUESTIONS}


def test_every_held_out_fact_is_trained_in_other_words() -> None:
    train, evaluation = make_demo_data.make_records()
    trained = [record.fact for record in train]
    assert all(trained.count(fact) >= make_demo_data.MIN_TRAIN_PER_FACT for fact in {r.fact for r in evaluation})


def test_generator_reproduces_the_committed_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["make_demo_data.py", "--output_dir", str(tmp_path)])
    make_demo_data.main()
    for name in ("train.json", "eval.json"):
        assert (tmp_path / name).read_bytes() == (ROOT / "data" / name).read_bytes()


def test_assets_can_be_made_again_as_committed(tokenizer, tmp_path: Path) -> None:
    make_tiny_opt.make_assets(tmp_path)
    # By content, since other releases of the tokenizers library may lay out the file in another way.
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again(TEXTS).input_ids == tokenizer(TEXTS).input_ids
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((ASSETS_DIR / "config.json").read_text())


def test_tokenizer_has_the_ids_of_opt(tokenizer) -> None:
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.is_fast
    ids = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert ids == (2, 1, 2, 2)
    assert tokenizer("a</s>").input_ids[-1] == 2


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_reads_any_text_back(tokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == 2
    assert 2 not in ids[1:]
    assert tokenizer.decode(ids[1:]) == text


def test_tokenizer_keeps_ids_when_saved(tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXTS).input_ids == tokenizer(TEXTS).input_ids
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (again.bos_token_id, again.pad_token_id, again.eos_token_id) == (2, 1, 2)


def test_vocabulary_and_lengths_fit(tokenizer) -> None:
    config = AutoConfig.from_pretrained(ASSETS_DIR)
    assert config.vocab_size % 8 == 0
    assert config.vocab_size >= len(tokenizer)
    texts = [f" {r['prompt']} {r['chosen']}</s>" for name in ("train", "eval") for r in read_records(name)]
    assert max(map(len, tokenizer(texts).input_ids)) <= 64


def test_tiny_opt_loads_whole(tiny_opt: Path, tokenizer) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_opt)
    assert 3e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 6e6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 1)
    assert AutoTokenizer.from_pretrained(tiny_opt)(TEXTS).input_ids == tokenizer(TEXTS).input_ids


def test_tiny_opt_is_the_same_each_time(tiny_opt: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    make_tiny_opt.make_model(tmp_path / "again")
    for name in (*make_tiny_opt.MODEL_FILES, *make_tiny_opt.TOKENIZER_FILES):
        assert (tmp_path / "again" / name).read_bytes() == (tiny_opt / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_second_run_changes_nothing(tiny_opt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in tiny_opt.iterdir()}
    make_tiny_opt.make_model(tiny_opt)
    assert "nothing to do" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in tiny_opt.iterdir()} == before


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="remove it first"):
        make_tiny_opt.make_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_failure_while_saving_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_copy(*_args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(make_tiny_opt.shutil, "copyfile", broken_copy)
    with pytest.raises(OSError, match="disk full"):
        make_tiny_opt.make_model(tmp_path / "tiny_opt")
    assert not list(tmp_path.iterdir())
