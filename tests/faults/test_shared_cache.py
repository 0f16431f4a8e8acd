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


@pytest.mark.parametrize("ranks", [1, 2])
def test_damaged_cache(ranks, alone, tmp_path):
    """Every file of the cache has a byte changed: nothing is taken from it."""
    command, expected, cache = alone
    shutil.copytree(cache, tmp_path / "cache")
    damaged = [file for file in (tmp_path / "cache").rglob("*") if file.is_file() and file.stat().st_size]
    for file in damaged:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0x55
        file.write_bytes(content)
    command = [*command, "--per_device_train_batch_size", str(8 // ranks)]
    printed = finished_run(
        [*command, "--output_dir", tmp_path / "out", "--data_output_path", tmp_path / "cache"], ranks
    )
    assert ": built (" in printed
    if ranks == 1:
        assert outcome(tmp_path / "out") == expected
