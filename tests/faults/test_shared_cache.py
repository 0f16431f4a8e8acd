"""Runs that share a cache folder, cold or damaged: all end as a run with a cache of its own."""

import shutil

import pytest
from fork_runs import finished_run, outcome, start_run


@pytest.fixture(scope="module")
def alone(run_setting, tmp_path_factory):
    """(arguments, outcome) of a run with a cache of its own."""
    folder = tmp_path_factory.mktemp("alone")
    command = [*run_setting, "--num_train_epochs", "1"]
    finished_run([*command, "--output_dir", folder / "out", "--data_output_path", folder / "cache"])
    return command, outcome(folder / "out"), folder / "cache"


def test_two_runs_at_once_on_a_cold_cache(alone, tmp_path):
    command, expected, _ = alone
    runs = [
        start_run([*command, "--output_dir", tmp_path / name, "--data_output_path", tmp_path / "cache"])
        for name in "ab"
    ]
    assert [run.wait() for run in runs] == [[0], [0]], [run.output() for run in runs]
    assert [outcome(tmp_path / name) for name in "ab"] == [expected] * 2
    printed = "".join(run.output() for run in runs)
    assert printed.count(": built (not there yet)") == 1 and printed.count(": hit") == 1


def damage_every_file(cache) -> None:
    for file in [file for file in cache.rglob("*") if file.is_file() and file.stat().st_size]:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0x55
        file.write_bytes(content)


def test_two_runs_at_once_on_a_damaged_cache(alone, tmp_path):
    """Every file of it has a byte changed: nothing is taken from it."""
    command, expected, cache = alone
    shutil.copytree(cache, tmp_path / "cache")
    damage_every_file(tmp_path / "cache")
    command = [*command, "--data_output_path", tmp_path / "cache"]
    runs = [start_run([*command, "--output_dir", tmp_path / name]) for name in "ab"]
    assert [run.wait() for run in runs] == [[0], [0]], [run.output() for run in runs]
    assert [outcome(tmp_path / name) for name in "ab"] == [expected] * 2
    assert "".join(run.output() for run in runs).count(": built (") == 1


def test_two_ranks_on_a_damaged_cache(alone, tmp_path):
    command, _, cache = alone
    command = [*command, "--per_device_train_batch_size", "4", "--data_output_path"]
    finished_run([*command, cache, "--output_dir", tmp_path / "whole"], ranks=2)
    shutil.copytree(cache, tmp_path / "cache")
    damage_every_file(tmp_path / "cache")
    printed = finished_run([*command, tmp_path / "cache", "--output_dir", tmp_path / "damaged"], ranks=2)
    assert ": built (" in printed
    assert outcome(tmp_path / "damaged") == outcome(tmp_path / "whole")
