"""Every mistake of a user ends in one clear message and a non-zero status, before anything is trained or written."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import SHARED, deepspeed_ranks, launch, make_json_data, make_tiny_opt, needs_shared


@pytest.fixture
def good(tiny_opt, json_data, cache_folder, tmp_path) -> dict[str, list[str]]:
    """Arguments of a run that would work, by name, to be spoilt one at a time."""
    return {
        "--model_name_or_path": [str(tiny_opt)], "--data_path": [str(json_data)], "--data_split": ["10,0,0"],
        "--data_output_path": [str(cache_folder)], "--max_seq_len": ["64"], "--dtype": ["fp32"],
        "--output_dir": [str(tmp_path / "out")], "--dry_run": [],
    }  # fmt: skip


def words(arguments: dict[str, list[str]]) -> list[str]:
    return [word for name, values in arguments.items() for word in (name, *values)]


def fails(run_inside, arguments: dict, *expected: str) -> str:
    status, _, err = run_inside(words(arguments))
    assert status == 2
    assert "Traceback" not in err
    assert err.count("error:") == 1
    for text in expected:
        assert text in err, err
    assert not Path(arguments["--output_dir"][0]).exists()
    return err


def test_the_good_run_is_good(run_inside, good):
    status, out, err = run_inside(words(good))
    assert status == 0, err
    assert "Dry run" in out and "77 samples" in out


def test_unknown_data_set(run_inside, good):
    fails(
        run_inside,
        {**good, "--data_path": ["nobody/knows-this"]},
        "nobody/knows-this",
        "Dahoas/rm-static",
        "local/jsonfile",
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, ["train.json"]),
        ("", ["train.json", "empty"]),
        ('[{"prompt": "a", "chosen": "b"}, {"prompt": "c"', ["train.json", "record 2"]),
        ('[{"prompt": "a", "chosen": "b"}, {"chosen": "d"}]', ["record 2", '"prompt"']),
        ('[{"prompt": "a", "chosen": "b"}, {"prompt": "c"}]', ["record 2", '"chosen"']),
        ('[{"prompt": "a", "chosen": null}]', ["record 1", "null"]),
        (json.dumps([{"prompt": "a", "chosen": "b"}] * 2 + [{"prompt": 7, "chosen": "e"}]), ["record 3", "number"]),
    ],
    ids=["missing", "empty", "truncated", "no prompt", "no chosen", "null", "number"],
)  # fmt: skip
def test_json_file(run_inside, good, tmp_path, content, expected):
    data = make_json_data(tmp_path)
    (data / "train.json").unlink()
    if content is not None:
        (data / "train.json").write_text(content)
    fails(run_inside, {**good, "--data_path": [str(data)]}, *expected)


@pytest.mark.parametrize("split", ["a,b,c", "2,-4,4", "0,0,0", "2,4,", "nan,1,1"])
def test_data_split(run_inside, good, split):
    fails(run_inside, {**good, "--data_split": [split]}, "--data_split", split)


def test_split_part_without_a_sample(run_inside, good):
    fails(run_inside, {**good, "--data_split": ["0,5,5"]}, "--data_split 0,5,5", "larger share")


def test_max_seq_len_beyond_positions(run_inside, good):
    fails(run_inside, {**good, "--max_seq_len": ["257"]}, "257", "256 positions")


@pytest.mark.parametrize("missing", ["config.json", "tokenizer", "weights"])
def test_incomplete_model_folder(run_inside, good, tiny_opt, tmp_path, missing):
    folder = shutil.copytree(tiny_opt, tmp_path / "model")
    for file in folder.iterdir():
        if (
            file.name == missing
            or (missing == "tokenizer" and "token" in file.name)
            or (missing == "weights" and file.suffix == ".safetensors")
        ):
            file.unlink()
    arguments = {**good, "--model_name_or_path": [str(folder)]}
    if missing == "weights":
        del arguments["--dry_run"]  # which does without
    fails(run_inside, arguments, str(folder), missing)


def test_fp16_on_cpu(run_inside, good):
    fails(run_inside, {**good, "--dtype": ["fp16"]}, "fp16", "--dtype bf16")


def test_lora_name_that_matches_nothing(run_inside, good):
    fails(
        run_inside,
        {**good, "--lora_dim": ["8"], "--lora_module_name": ["model.blocks."]},
        "model.blocks.",
        "model.decoder.layers.",
    )


def test_one_of_several_lora_names_that_matches_nothing(run_inside, good):
    fails(
        run_inside,
        {**good, "--lora_dim": ["8"], "--lora_module_name": ["decoder.layers.,model.blocks."]},
        "'model.blocks.'",
        "model.decoder.layers.",
    )


def test_an_adapter_that_would_not_give_the_trained_model(run_inside, good, tmp_path):
    """Other weights that train, no LoRA at all, or rows the base model does not have."""
    adapter = {**good, "--save_lora_adapter": []}
    fails(run_inside, adapter, "--save_lora_adapter needs --lora_dim")
    fails(run_inside, {**adapter, "--lora_dim": ["4"]}, "--save_lora_adapter needs --only_optimize_lora")
    adapter = {**adapter, "--lora_dim": ["4"], "--only_optimize_lora": []}
    small = make_tiny_opt(tmp_path / "small", vocab_size=1800)
    fails(run_inside, {**adapter, "--model_name_or_path": [str(small)]}, "1809 entries", "1800 rows")
    status, _, err = run_inside(words({**adapter, "--add_eot_token": []}))  # 1810 of 1816 rows
    assert status == 0, err
    status, _, err = run_inside(words({name: value for name, value in adapter.items() if name != "--output_dir"}))
    assert status == 2 and "--save_lora_adapter needs --output_dir" in err


def test_lora_values(run_inside, good):
    values = {"--lora_dim": ["4"], "--lora_alpha": ["0"], "--lora_dropout": ["1"]}
    fails(run_inside, {**good, **values}, "2 problems", "--lora_alpha must", "--lora_dropout must")


def test_output_folder_that_cannot_be_written(run_inside, good, tmp_path):
    (tmp_path / "file").write_text("")
    fails(run_inside, {**good, "--output_dir": [str(tmp_path / "file" / "out")]}, "--output_dir", "can't be written")


@pytest.mark.parametrize(
    "name", ["per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"]
)
def test_batch_size_zero(run_inside, good, name):
    fails(run_inside, {**good, f"--{name}": ["0"]}, f"--{name} must be at least 1")


def test_no_network_and_a_hub_name(run_inside, good):
    fails(run_inside, {**good, "--data_path": ["Dahoas/rm-static"]}, "Dahoas/rm-static")
    fails(run_inside, {**good, "--model_name_or_path": ["facebook/opt-125m"]}, "facebook/opt-125m", "hub")


def test_bad_deepspeed_configuration(run_inside, good, tmp_path):
    config = tmp_path / "ds.json"
    config.write_text("{")
    fails(run_inside, {**good, "--deepspeed_config": [str(config)]}, "ds.json", "JSON")
    config.write_text(json.dumps({"optimizer": {"type": "Adam", "params": {"lr": 0.1}}, "train_batch_size": 3}))
    fails(run_inside, {**good, "--deepspeed_config": [str(config)]}, "--learning_rate", "--per_device_train_batch_size")


def test_all_problems_are_shown_together(run_inside, good):
    changes = {"--dtype": ["fp16"], "--max_seq_len": ["999"], "--data_path": ["nobody/knows-this"]}
    fails(run_inside, {**good, **changes}, "3 problems", "fp16", "999", "nobody/knows-this")
    changes = {"--dropout": ["1.5"], "--learning_rate": ["nan"], "--only_optimize_lora": [], "--data_split": ["x"]}
    fails(run_inside, {**good, **changes, "--dtype": ["fp16"]}, "5 problems")


def test_more_processes_than_the_machine_has(good):
    """Through the real launcher: one message, status passed on, and soon."""
    cores = os.cpu_count()
    run = launch(deepspeed_ranks(cores + 1), words(good))
    assert run.returncode == 2, run.stdout + run.stderr
    assert f"{cores + 1} processes were started" in run.stderr and f"--num_gpus {cores}" in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stderr.count("processes were started") == 1


@needs_shared
def test_truncated_parquet(run_inside, good, tmp_path):
    folder = tmp_path / "Dahoas" / "rm-static"
    shutil.copytree(SHARED / "hub" / "Dahoas" / "rm-static", folder, copy_function=shutil.copyfile)
    file = next(folder.rglob("train*.parquet"))
    content = file.read_bytes()
    os.chmod(file.parent, 0o755)
    file.write_bytes(content[: len(content) // 2])
    fails(run_inside, {**good, "--data_path": [str(folder)]}, str(file), "parquet")
