"""`--streaming`: what is read window by window is what prepared data gives, and a run goes on in mid-stream."""

import json
import signal

import datasets
import numpy as np
import pytest
from conftest import ROOT, SHARED, needs_shared
from fork_runs import checkpoint_steps, finished_run, losses, outcome, start_run
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from utils.data import streaming as stream
from utils.data.data_utils import get_raw_dataset
from utils.data.formats import base as raw_base
from utils.data.formats.custom import own_options
from utils.data.prepare import Preparation
from utils.data.prompt_dataset import PromptDataset
from utils.data.raw_datasets import RAW_DATASETS
from utils.data.reading import hub
from utils.data.splits import get_shuffle_idx
from utils.data.tokenization.tokenize_rows import SampleForm
from utils.errors import UserError

SEED = 1234
ROWS = 170
WINDOW = 40


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt")


def record(number: int) -> dict[str, str]:
    """Every tenth has no answer, and so gives no sample."""
    answer = f"It is {number}, {'very ' * (number % 7)}true."
    return {"prompt": f"What is {number}?", "response": "" if number % 10 == 9 else answer}


def write_jsonl(folder, name: str, numbers) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(record(number)) + "\n" for number in numbers))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three files to train on and one to evaluate on."""
    folder = tmp_path_factory.mktemp("shards") / "set"
    for shard, first in enumerate((0, 60, 120)):
        write_jsonl(folder, f"train-{shard:05}-of-00003", range(first, min(first + 60, ROWS)))
    write_jsonl(folder, "eval", range(500, 512))
    return folder


def open_stream(paths, tokenizer, size=WINDOW, **options):
    paths = [str(path) for path in (paths if isinstance(paths, list) else [paths])]
    sample = SampleForm(tokenizer, tokenizer.eos_token, 64, options.pop("completion_only", False))
    own, preparation = own_options(tokenizer, sample.end_id), Preparation(1, "unused", 1, SEED)
    return stream.create_prompt_stream(paths, sample, own, preparation, size, **options)


def texts(data: PromptDataset, tokenizer) -> list[str]:
    return [tokenizer.decode(data[place]["input_ids"], skip_special_tokens=True) for place in range(len(data))]


def windows(data, tokenizer, count: int, begins=None) -> list[tuple[dict, list[str]]]:
    """(where it begins, its texts) of `count` windows in a row."""
    found = [(data.follow(begins), texts(data, tokenizer))]
    while len(found) < count:
        found.append((data.follow(data.after), texts(data, tokenizer)))
    return found


# -------------------------------------------------------------------------------------------- windows


def test_a_pass_gives_each_sample_once_and_in_full_windows(shards, tokenizer):
    data, evaluation = open_stream(shards, tokenizer)
    found = [texts for _, texts in windows(data, tokenizer, 8)]
    assert [len(window) for window in found] == [40, 40, 40, 33, 40, 40, 40, 33]
    expected = [f" Human: What is {n}? Assistant: {record(n)['response']}" for n in range(ROWS) if n % 10 != 9]
    assert [text for window in found[:4] for text in window] == expected
    second = [text for window in found[4:] for text in window]
    assert sorted(second) == sorted(expected)
    assert len(evaluation) == 11
    third = windows(data, tokenizer, 1, data.after)[0][1]
    assert sorted(third) != sorted(found[0])  # files come in another order


@pytest.mark.parametrize("ahead", [False, True])
def test_any_window_is_found_again_from_plain_values(shards, tokenizer, ahead, tmp_path):
    """From every window on, twice through the data, with two sources and only responses labelled."""
    write_jsonl(tmp_path / "small", "train", range(1000, 1031))
    write_jsonl(tmp_path / "small", "eval", range(2))
    paths = [shards, f"{tmp_path / 'small'}:0.5"]
    data, _ = open_stream(paths, tokenizer, 30, completion_only=True)
    whole = windows(data, tokenizer, 16)
    assert len({tuple(found) for _, found in whole}) == 16
    for first in (0, 1, 5, 11, 15):
        again, _ = open_stream(paths, tokenizer, 30, completion_only=True, ahead=ahead)
        begins = json.loads(json.dumps(whole[first][0]))
        found = windows(again, tokenizer, 16 - first, begins)
        assert [window for _, window in found] == [window for _, window in whole[first:]]
        assert [place["window"] for place, _ in found] == list(range(first, 16))


def test_weights_are_shares_of_every_window(shards, tokenizer, tmp_path):
    write_jsonl(tmp_path / "small", "train", range(1000, 1028))
    write_jsonl(tmp_path / "small", "eval", range(2))
    data, evaluation = open_stream([shards, f"{tmp_path / 'small'}:0.5"], tokenizer, 30)
    for _, found in windows(data, tokenizer, 6):
        assert [
            text.split("?")[0].split()[-1] >= "1000" and len(text.split("?")[0].split()[-1]) == 4 for text in found
        ] == [False] * 20 + [True] * 10
    assert len(evaluation) == 11 + 2


def test_only_responses_are_labelled(shards, tokenizer):
    data, _ = open_stream(shards, tokenizer, completion_only=True)
    sample = data[3]
    labelled = sample["input_ids"][sample["labels"] >= 0]
    assert tokenizer.decode(labelled) == " It is 3, very very very true.</s>"
    assert data.label_counts()[3] == len(labelled)


def make_source(kind: str, folder) -> str:
    """The same records in another form; returns what to give as `--data_path`."""
    rows = datasets.Dataset.from_list([record(number) for number in range(ROWS)])
    folder.mkdir()
    if kind == "parquet":
        for shard in range(2):
            part = rows.select(range(100 * shard, min(100 * (shard + 1), ROWS)))
            part.to_parquet(folder / f"train-{shard:05}-of-00002.parquet", batch_size=7)
    elif kind == "csv":
        rows.to_csv(folder / "train.csv")
    elif kind == "json":
        (folder / "train.json").write_text(json.dumps(rows.to_list()))
    elif kind == "save_to_disk":
        datasets.DatasetDict({"train": rows}).save_to_disk(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["parquet", "csv", "json", "save_to_disk"])
def test_every_format_is_streamed(kind, tokenizer, tmp_path, monkeypatch):
    """Without an evaluation split the first rows are kept for it, and never trained on."""
    monkeypatch.setattr(raw_base, "STREAM_EVAL_ROWS", 20)
    data, evaluation = open_stream(make_source(kind, tmp_path / kind), tokenizer, size=1000)
    numbers = [number for number in range(ROWS) if number % 10 != 9]
    found = [*texts(evaluation, tokenizer), *texts(data, tokenizer)]
    assert [text.split("?")[0].split()[-1] for text in found] == [str(number) for number in numbers]
    assert len(evaluation) == 18
    assert not (tmp_path / "unused").exists()


@needs_shared
@pytest.mark.parametrize("name", list(RAW_DATASETS))
def test_known_data_sets_give_the_texts_of_prepared_data(name, tmp_path, monkeypatch):
    monkeypatch.setattr(raw_base, "STREAM_EVAL_ROWS", 5)
    path = name
    if name != "local/jsonfile":
        path = str(SHARED / "hub" / name)
    streamed = get_raw_dataset(path, str(tmp_path), SEED, 1, streaming=True)
    prepared = get_raw_dataset(path, str(tmp_path), SEED, 1)
    rows = prepared.raw_datasets[prepared.train_split].dataset
    expected = [prepared.get_prompt_and_chosen(row) for row in rows]
    found = [streamed.get_prompt_and_chosen(row) for row in streamed.get_train_data()]
    held_out = [streamed.get_prompt_and_chosen(row) for row in streamed.get_eval_data()]
    if prepared.eval_split is None:
        found = held_out + found
    assert found == expected
    assert len(held_out) == min(5, len(prepared.raw_datasets[prepared.eval_split or "train"].dataset))


# -------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def stub_hub(monkeypatch, tmp_path):
    """The real `load_dataset(..., streaming=True)`, on a folder that stands in for the hub's."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(hub, "unreachable_reason", lambda name: None)
    load = hub.load_dataset
    monkeypatch.setattr(hub, "load_dataset", lambda name, config, streaming: load(str(folder), streaming=streaming))
    return folder


def rm_static(number: int) -> dict[str, str]:
    return {"prompt": f"Human: {number}? Assistant:", "response": "x", "chosen": f" c{number}", "rejected": " r"}


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_hub_data_set_is_streamed(kind, stub_hub, tokenizer):
    for split, numbers in (("train", range(50)), ("test", range(50, 60))):
        rows = datasets.Dataset.from_list([rm_static(number) for number in numbers])
        getattr(rows, {"parquet": "to_parquet", "jsonl": "to_json"}[kind])(stub_hub / f"{split}.{kind}")
    data, evaluation = open_stream("Dahoas/rm-static", tokenizer, 20)
    assert [len(found) for _, found in windows(data, tokenizer, 3)] == [20, 20, 10]
    assert texts(data, tokenizer)[-1] == "Human: 49? Assistant: c49"
    assert len(evaluation) == 10


def test_hub_rows_are_checked_as_they_come(stub_hub, tokenizer):
    rows = [rm_static(number) for number in range(50)]
    rows[33]["chosen"] = None
    for split, part in (("train", rows), ("test", rows[:5])):
        datasets.Dataset.from_list(part).to_parquet(stub_hub / f"{split}.parquet")
    data, _ = open_stream("Dahoas/rm-static", tokenizer, 20)
    assert len(data) == 20  # nulls are dropped in this set
    assert [len(found) for _, found in windows(data, tokenizer, 3)] == [20, 20, 9]
    datasets.Dataset.from_list([{"question": "q"}]).to_parquet(stub_hub / "train.parquet")
    with pytest.raises(UserError, match='Dahoas/rm-static, split "train", record 1: has no "prompt"'):
        open_stream("Dahoas/rm-static", tokenizer, 20)


# -------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("ahead", [False, True])
def test_a_bad_record_is_named_when_it_comes(tokenizer, ahead, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "ROWS_AT_ONCE", 10)
    write_jsonl(tmp_path / "set", "train-00000-of-00002", range(1200))  # more than are tried before a run
    (tmp_path / "set" / "train-00001-of-00002.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": 1}\n')
    write_jsonl(tmp_path / "set", "eval", range(3))
    data, _ = open_stream(tmp_path / "set", tokenizer, 400, ahead=ahead)
    with pytest.raises(UserError, match=r'train-00001-of-00002\.jsonl, record 2 \(line 2\).*"prompt" is a') as fault:
        windows(data, tokenizer, 4)
    assert "DataLoader" not in str(fault.value)


def test_a_stream_that_breaks_off_says_how_to_go_on(shards, tokenizer, monkeypatch):
    monkeypatch.setattr(stream, "ROWS_AT_ONCE", 10)
    data, _ = open_stream(shards, tokenizer)

    def broken(*_):
        raise OSError("Connection reset by peer")

    monkeypatch.setattr("utils.data.reading.arrow_files.iter_records", broken)
    with pytest.raises(UserError, match=r"can't be read on after \d+ samples of pass 1: OSError.*--resume_from"):
        windows(data, tokenizer, 6)


def test_a_weight_that_gives_no_sample_is_refused(shards, tokenizer):
    with pytest.raises(UserError, match=r"set:0.01 is less than one sample of a window of 40"):
        open_stream([shards, f"{shards}:0.01"], tokenizer)


def test_too_few_rows_are_refused(tokenizer, tmp_path):
    write_jsonl(tmp_path / "set", "train", range(50))
    with pytest.raises(UserError, match=r"gives no training sample.*the first 1000"):
        open_stream(tmp_path / "set", tokenizer)


def test_what_a_stream_cannot_do_is_said_at_once(run_inside, tiny_opt, shards, tmp_path):
    arguments = ["--model_name_or_path", tiny_opt, "--data_path", shards, "--output_dir", tmp_path / "out"]
    refused = ["--streaming", "--data_split", "2,4,4", "--preprocessing_num_workers", "2", "--save_strategy", "epoch"]
    status, _, err = run_inside([*arguments, *refused])
    assert status == 2
    for words in (
        "--streaming needs --max_steps N",
        "give --data_split 10,0,0",
        "--preprocessing_num_workers is for data that is prepared before the run",
        "--save_strategy epoch: with --streaming there are no epochs",
    ):
        assert words in err
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------- whole runs


def setting(model, data, cache, *extra) -> list:
    places = ["--model_name_or_path", model, "--data_path", data, "--data_output_path", cache]
    return [*places, "--data_split", "10,0,0", "--max_seq_len", "64", "--dtype", "fp32", "--print_loss", *extra]


def test_a_stream_trains_as_prepared_data_does(tiny_opt, tmp_path):
    """Two passes of one window each: with rows in the order prepared data has them, weights are equal bit for bit."""
    order = get_shuffle_idx(SEED, 77)
    for name, numbers in (("prepared", np.arange(77)), ("streamed", order)):
        write_jsonl(tmp_path / name, "train", [10 * int(number) for number in numbers])
        write_jsonl(tmp_path / name, "eval", range(8))
    common = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--packing"]
    prepared = setting(tiny_opt, tmp_path / "prepared", tmp_path / "cache", *common, "--num_train_epochs", "2")
    finished_run([*prepared, "--output_dir", tmp_path / "a"])
    steps = len(losses(tmp_path / "a"))
    streamed = setting(tiny_opt, tmp_path / "streamed", tmp_path / "none", *common, "--streaming")
    printed = finished_run([*streamed, "--max_steps", steps, "--output_dir", tmp_path / "b"])
    assert "Stream window 2: 77 samples" in printed
    assert printed.count("Beginning of Epoch") == 1
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all((first[name] == second[name]).all() for name in first)
    assert not list((tmp_path / "none").rglob("*.arrow"))


def test_interrupted_stream_goes_on_bit_for_bit(tiny_opt, shards, tmp_path):
    """Two ranks, stopped within a window of the second pass; one rank takes the same steps."""
    extra = ["--streaming", "24", "--max_steps", "24", "--eval_steps", "9", "--disable_dropout"]
    command = setting(tiny_opt, shards, tmp_path / "cache", *extra, "--resume_from_checkpoint")
    ranks = [*command, "--per_device_train_batch_size", "4", "--zero_stage", "2"]
    finished_run([*ranks, "--output_dir", tmp_path / "whole"], 2)
    run = start_run([*ranks, "--output_dir", tmp_path / "stopped"], 2)
    run.wait_for("Step: 20,")
    run.kill(signal.SIGTERM, ranks=[1])
    assert run.wait() == [75, 75], run.output()
    assert checkpoint_steps(tmp_path / "stopped")[-1] < 24
    printed = finished_run([*ranks, "--output_dir", tmp_path / "stopped"], 2)
    assert "of the stream are used" in printed
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    finished_run([*command, "--per_device_train_batch_size", "8", "--output_dir", tmp_path / "alone"])
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)


def test_dry_run_of_a_stream(run_inside, tiny_opt, shards, tmp_path):
    arguments = setting(tiny_opt, shards, tmp_path / "cache", "--streaming", "50", "--max_steps", "30", "--dry_run")
    status, out, err = run_inside([*arguments, "--per_device_train_batch_size", "8"])
    assert status == 0, err
    assert "Training data, the first window of the stream: 56 samples" in out
    assert "Plan: 30 optimizer steps over a stream in windows of 56 samples" in out
    assert "Time: about" in out


def test_inspecting_a_stream_is_refused(tiny_opt, shards):
    from tools import inspect_data as inspect

    arguments = ["--model_name_or_path", str(tiny_opt), "--data_path", str(shards), "--streaming", "--max_steps", "3"]
    with pytest.raises(UserError, match="--streaming: all rows are read here"):
        inspect.main([*arguments, "--data_split", "10,0,0"])
