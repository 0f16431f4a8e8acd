"""Which rows of which data sets a run uses: defaults of --data_split, data for evaluation, sets of one name."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, write_json_data
from fork_runs import finished_run

from utils.arguments.parser import parse_args
from utils.checkpoint.resume import arguments_record
from utils.data.formats.custom import own_options
from utils.data.mixture import DataSources, shares_of
from utils.data.prepare import Preparation, prepare_prompt_data
from utils.data.streaming import create_prompt_stream
from utils.data.tokenization.tokenize_rows import SampleForm
from utils.errors import UserError
from utils.model.tokenizer import load_hf_tokenizer

DEMO = str(ROOT / "demo" / "tiny_opt")


def write_rows(path: Path, rows: int, word: str = "row") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    records = ({"prompt": f"{word} {number}?", "response": f"It is {number}."} for number in range(rows))
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def build(tmp_path, capsys):
    """Prepare these sources: (train texts, eval texts, printed)."""
    tokenizer = load_hf_tokenizer(DEMO)
    sample = SampleForm(tokenizer, "</s>", 64)

    def texts(data) -> list[str]:
        return [
            tokenizer.decode(data[place]["input_ids"], skip_special_tokens=True).strip() for place in range(len(data))
        ]

    def build_it(data_path, data_split=None, streaming=False, **more):
        own = own_options(tokenizer, sample.end_id)
        preparation = Preparation(0, str(tmp_path / "cache"), 1, 1234)
        if streaming:
            pair = create_prompt_stream([*map(str, data_path)], sample, own, preparation, 1000, **more)
        else:
            sources = DataSources([*map(str, data_path)], data_split, **more)
            pair = prepare_prompt_data(sources, sample, own, preparation)
        return (*map(texts, pair), capsys.readouterr().out)

    return build_it


# --------------------------------------------------------------------------------------- --data_split left out


def test_data_of_ones_own_are_all_for_this_phase(tmp_path, build):
    path = write_rows(tmp_path / "a" / "x.jsonl", 100)
    train, evaluation, printed = build([path])
    assert (len(train), len(evaluation)) == (90, 10)
    assert f"Data {path}: 90 of 90 training rows are for this phase (all data of your own" in printed
    assert "0 not used" in printed
    given = build([path], "2,4,4")
    assert (len(given[0]), len(given[1])) == (18, 2)
    assert "18 of 90 training rows are for this phase (--data_split 2,4,4), 72 not used" in given[2]
    assert build([path], "10,0,0")[:2] == (train, evaluation)


def test_known_data_sets_keep_rows_for_the_other_phases(tmp_path, build):
    rows = [{"prompt": f"{number}?", "chosen": f"It is {number}."} for number in range(50)]
    folder = write_json_data(tmp_path, rows, rows[:10])
    train, evaluation, printed = build([folder])
    assert (len(train), len(evaluation)) == (10, 2)
    assert (
        "10 of 50 training rows are for this phase (--data_split 2,4,4, the default of known data sets), 40" in printed
    )
    assert build([folder], "2,4,4")[:2] == (train, evaluation)
    own = write_rows(tmp_path / "own" / "x.jsonl", 100)
    assert len(build([folder, own])[0]) == 10 + 90
    assert shares_of("Dahoas/rm-static:0.5", None) == "2,4,4"
    assert shares_of(f"{own}:0.5", None) == "10,0,0"


def test_a_checkpoint_of_a_run_without_the_flag(tmp_path):
    """What is recorded is what was done, so that a run may go on with the flag, and with older checkpoints."""

    def record(*argv: str) -> str:
        return arguments_record(parse_args(["--model_name_or_path", "m", *argv]), 1)["data_split"]

    own = str(write_rows(tmp_path / "x.jsonl", 3))
    assert record("--data_path", "Dahoas/rm-static") == "2,4,4"
    assert record("--data_path", own) == record("--data_path", own, "--data_split", "10,0,0") == "10,0,0"
    assert record("--data_path", own, "Dahoas/rm-static") == "10,0,0 and 2,4,4"
    assert record("--data_path", own, "--data_split", "2,4,4") == "2,4,4"
    assert record("--data_path", "--sft_only_data_path", own) == "2,4,4"
    assert isinstance(parse_args(["--model_name_or_path", "m"]), Namespace)
    assert parse_args(["--model_name_or_path", "m"]).data_split is None


def test_a_stream_of_ones_own_needs_no_split(run_inside, tiny_opt, tmp_path):
    own = write_rows(tmp_path / "x.jsonl", 1100)
    common = ["--model_name_or_path", tiny_opt, "--data_output_path", tmp_path / "cache", "--max_seq_len", "64"]
    common += ["--streaming", "50", "--max_steps", "3", "--per_device_train_batch_size", "4", "--dry_run"]
    status, _, err = run_inside([*common, "--data_path", own])
    assert status == 0, err
    status, _, err = run_inside([*common, "--data_path", own, "Dahoas/rm-static"])
    assert status == 2
    assert "as --data_split 2,4,4 (the default of known data sets) says: give --data_split 10,0,0" in err


# ------------------------------------------------------------------------------------------ --eval_data_path


@pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streamed"])
def test_data_for_evaluation(tmp_path, build, streaming):
    """They are evaluated whole and in their order, and no row is kept from training."""
    train, other = write_rows(tmp_path / "a" / "x.jsonl", 30), write_rows(tmp_path / "b" / "y.jsonl", 7, "other")
    where = {"eval_data_path": [str(other)]} if streaming else {"evaluation": [str(other)]}
    trained, evaluated, printed = build([train], streaming=streaming, **where)
    assert sorted(trained) == sorted(f"Human: row {number}? Assistant: It is {number}." for number in range(30))
    assert evaluated == [f"Human: other {number}? Assistant: It is {number}." for number in range(7)]
    assert "evaluation: the data of --eval_data_path" in printed
    assert not list((tmp_path / "cache").glob("*train_eval*"))


def test_evaluation_files_of_the_training_data_give_way(tmp_path, build):
    write_rows(tmp_path / "set" / "train.jsonl", 20)
    write_rows(tmp_path / "set" / "eval.jsonl", 9, "own")
    other = write_rows(tmp_path / "b" / "y.jsonl", 4, "other")
    trained, evaluated, _ = build([tmp_path / "set"], evaluation=[str(other), str(tmp_path / "set")])
    assert len(trained) == 20
    assert sorted(text.split()[1] for text in evaluated) == ["other"] * 4 + ["own"] * 9
    assert len(build([tmp_path / "set"])[1]) == 9


def test_known_data_sets_are_evaluated_on_their_evaluation_rows(tmp_path, build):
    rows = [{"prompt": f"{number}?", "chosen": f"It is {number}."} for number in range(50)]
    known = write_json_data(tmp_path, rows, rows[:10])
    own = write_rows(tmp_path / "own" / "x.jsonl", 20)
    assert list(map(len, build([own], evaluation=[str(known)])[:2])) == [20, 10]


def test_evaluation_data_are_checked_before_the_run(run_inside, tiny_opt, tmp_path):
    own = write_rows(tmp_path / "x.jsonl", 30)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "p"}\n')
    common = ["--model_name_or_path", tiny_opt, "--data_output_path", tmp_path / "cache", "--max_seq_len", "64"]
    common += ["--dry_run", "--data_path", own, "--eval_data_path"]
    for name, words in (
        (bad, "bad.jsonl"),
        (f"{own}:0.5", "has a weight"),
        (tmp_path / "none", "is no file or folder"),
    ):
        status, _, err = run_inside([*common, name])
        assert status == 2, name
        assert words in err
    status, out, err = run_inside([*common, own])
    assert status == 0, err
    assert "30 of 30 training rows" in out


# --------------------------------------------------------------------------------------- data sets of one name


def indexes(folder: Path) -> dict[str, int]:
    return {path.name: len(np.load(path)) for path in folder.glob("*.npy")}


def test_one_data_set_has_the_published_names(tmp_path, build):
    build([write_rows(tmp_path / "a" / "set" / "x.jsonl", 20)])
    parts = [f"train_10,0,0_{part}" for part in range(3)] + [f"eval_10,0,0_{part}" for part in range(3)]
    parts += [f"train_eval_9,1_{part}" for part in range(2)]
    assert sorted(indexes(tmp_path / "cache")) == sorted(f"set_x.jsonl_seed1234_{part}.npy" for part in parts)


def test_two_data_sets_of_one_name_keep_two_sets_of_indexes(tmp_path, build):
    paths = [write_rows(tmp_path / place / "set" / "x.jsonl", rows, place) for place, rows in (("a", 20), ("b", 30))]
    train, _, printed = build(paths)
    found = indexes(tmp_path / "cache")
    assert found["set_x.jsonl_seed1234_train_10,0,0_0.npy"] == 18
    second = [name for name in found if name.endswith("_seed1234_train_10,0,0_0.npy") and found[name] == 27]
    assert len(second) == 1 and len(found) == 16
    assert f"Data {paths[1]}: its split indexes are named {second[0].split('_seed')[0]}" in printed
    assert {text.split()[1] for text in train} == {"a", "b"} and len(train) == 45
    again = build(paths)
    assert again[0] == train and indexes(tmp_path / "cache") == found


def test_equal_sizes_of_one_name_are_two_sets_too(tmp_path, build):
    paths = [write_rows(tmp_path / place / "set" / "x.jsonl", 20, place) for place in ("a", "b")]
    build(paths)
    assert len(indexes(tmp_path / "cache")) == 16
    build([paths[0], paths[0]])
    assert len(indexes(tmp_path / "cache")) == 16


def test_an_empty_part_is_still_refused(tmp_path, build):
    with pytest.raises(UserError, match="no training sample"):
        build([write_rows(tmp_path / "a" / "x.jsonl", 20)], "0,1,0")


# ------------------------------------------------------------------------------------------------- small data sets


@pytest.mark.parametrize(("rows", "weight", "ranks"), [(1, "", 2), (3, ":3", 2), (3, ":0.5", 1)])
def test_small_sets_train(tiny_opt, tmp_path, rows, weight, ranks):
    """Batches larger than the set, more ranks than rows, more steps than data, weights above 1."""
    own = write_rows(tmp_path / "x.jsonl", rows)
    arguments = ["--model_name_or_path", tiny_opt, "--data_path", f"{own}{weight}", "--max_steps", "3"]
    arguments += ["--data_output_path", tmp_path / "cache", "--max_seq_len", "64", "--dtype", "fp32"]
    finished_run([*arguments, "--per_device_train_batch_size", "8", "--output_dir", tmp_path / "out"], ranks)
    assert (tmp_path / "out" / "model.safetensors").is_file()
