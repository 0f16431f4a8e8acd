"""The cache of tokenized data: hit or rebuilt for a reason, one builder at a time, whole or absent."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
from conftest import ROOT, write_json_data
from fork_runs import finished_run, start_run

from utils.data.data_utils import create_prompt_dataset
from utils.model.tokenizer import load_hf_tokenizer

DEMO = str(ROOT / "demo" / "tiny_opt")


def records(count: int, name: str = "a") -> list[dict]:
    return [{"prompt": f"{name} {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(count)]


@pytest.fixture
def source(tmp_path) -> Path:
    return write_json_data(tmp_path / "source", records(40), records(12, "b"))


@pytest.fixture
def build(tmp_path, source, capsys):
    """Build with these changes to the defaults: (training ids, what was decided about the cache, folder)."""

    def build_it(**changes) -> tuple[list, str, Path]:
        settings = {
            "data_path": [str(source)], "data_split": "2,4,4", "output_path": str(tmp_path / "cache"),
            "train_phase": 1, "seed": 1234, "tokenizer": load_hf_tokenizer(DEMO), "max_seq_len": 64,
            "end_of_conversation_token": "</s>",
        }  # fmt: skip
        capsys.readouterr()
        train, _ = create_prompt_dataset(0, **{**settings, **changes})
        folder, decision = re.search(r"^Data cache (\S+): (.*)$", capsys.readouterr().out, re.MULTILINE).groups()
        items = [train[i] for i in range(len(train))]
        ids = [(item["input_ids"] if isinstance(item, dict) else item[0]).tolist() for item in items]
        return ids, decision, Path(folder)

    return build_it


# -------------------------------------------------------------------------------------- hit or rebuild


def test_unchanged_is_a_hit(build):
    first, decision, folder = build()
    assert decision == "built (not there yet)"
    written = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    again, decision, same = build()
    assert (again, decision, same) == (first, "hit", folder)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == written
    assert build(reload=True)[:2] == (first, "built (asked for)")


@pytest.mark.parametrize(
    "change",
    [{"max_seq_len": 6}, {"seed": 7}, {"data_split": "4,3,3"}, {"train_phase": 2}, {"train_phase": 3}, {"end": 1}],
    ids=str,
)
def test_whatever_changes_the_result_is_rebuilt(build, change):
    first, _, folder = build()
    if "end" in change:
        change = {"end_of_conversation_token": "<pad>"}
    other, decision, elsewhere = build(**change)
    assert decision == "built (not there yet)" and elsewhere != folder and other != first
    assert build()[:2] == (first, "hit")  # and the first is still there


@pytest.mark.parametrize("name", ["train", "eval"])
def test_edited_data_is_rebuilt(build, source, name):
    """Even when size and time stamp stay the same."""
    build()
    file = source / f"{name}.json"
    before = file.stat()
    file.write_text(file.read_text().replace("good", "fine"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    ids, decision, _ = build()
    assert decision == "built (not there yet)"
    assert build()[:2] == (ids, "hit")


def test_moved_data_is_a_hit(build, source, tmp_path):
    first = build()[0]
    moved = tmp_path / "elsewhere" / "local"
    moved.mkdir(parents=True)
    os.rename(source, moved / "jsonfile")
    assert build(data_path=[str(moved / "jsonfile")])[:2] == (first, "hit")


def test_fewer_rows_give_no_index_out_of_range(build, source):
    """The split index kept for 40 rows is not used for 10."""
    build()
    write_json_data(source.parent.parent, records(10), records(12, "b"))
    ids, decision, _ = build()
    assert decision == "built (not there yet)" and len(ids) == 2


def test_another_tokenizer_is_noticed(build, tmp_path):
    first = build()[0]
    extended = load_hf_tokenizer(DEMO, add_special_tokens="<|done|>")
    assert build(tokenizer=extended)[1] == "built (not there yet)"
    # The same name, size and special tokens, but two ids changed places.
    content = json.loads(Path(DEMO, "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    used, unused = (
        next(token for token, number in vocabulary.items() if number == wanted) for wanted in (first[0][1], 900)
    )
    vocabulary[used], vocabulary[unused] = vocabulary[unused], vocabulary[used]
    folder = tmp_path / "tiny_opt"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(Path(DEMO, "tokenizer_config.json").read_text())
    ids, decision, _ = build(tokenizer=load_hf_tokenizer(str(folder)))
    assert decision == "built (not there yet)" and ids != first


# -------------------------------------------------------------------------------------------- damage


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


def _overwrite_middle(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "one bit of arrow": lambda folder: _overwrite_middle(next((folder / "train").glob("*.arrow"))),
    "report of an older version": lambda folder: (folder / "report.json").write_text(
        (folder / "report.json").read_text().replace("[", "").replace("]", "")
    ),
    "truncated arrow": lambda folder: _truncate(next((folder / "train").glob("*.arrow"))),
    "missing arrow": lambda folder: next((folder / "eval").glob("*.arrow")).unlink(),
    "missing state": lambda folder: (folder / "train" / "state.json").unlink(),
    "garbage report": lambda folder: (folder / "report.json").write_bytes(b"\x00\xffgarbage"),
    "empty report": lambda folder: (folder / "report.json").write_text(""),
    "other report": lambda folder: (folder / "report.json").write_text("[]"),
    "no report": lambda folder: (folder / "report.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_rebuilt(build, damage):
    first, _, folder = build()
    DAMAGES[damage](folder)
    again, decision, same = build()
    assert again == first and same == folder
    assert re.fullmatch(r"built \(.*(damaged|incomplete).*\)", decision)
    assert build()[:2] == (first, "hit")


def test_a_truncated_copy_of_the_rows_is_rebuilt(build, tmp_path):
    """The rows themselves, kept as Arrow below the cache folder, lost their end."""
    first, _, folder = build()
    for file in (tmp_path / "cache" / "arrow").glob("*.arrow"):
        _truncate(file)
    DAMAGES["no report"](folder)
    assert build()[:2] == (first, "built (incomplete)")


def test_read_only_source(build, source):
    for file in source.iterdir():
        file.chmod(0o444)
    source.chmod(0o555)
    before = sorted(os.listdir(source))
    try:
        assert len(build()[0]) == 8
    finally:
        source.chmod(0o755)
    assert sorted(os.listdir(source)) == before


# --------------------------------------------------------------------------------- several processes


def builder(argv: list[str]) -> None:
    """Build or open the cache `argv` names: source, cache, and how ("slow", "killed")."""
    from utils.data.tokenization import tokenize_rows

    source, cache, how = argv
    tokenize = tokenize_rows.tokenize

    def changed(*args, **kwargs):
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)  # long enough for the others to come to the lock
        return tokenize(*args, **kwargs)

    tokenize_rows.tokenize = changed
    train, _ = create_prompt_dataset(0, [source], "2,4,4", cache, 1, 1234, load_hf_tokenizer(DEMO), 64, "</s>")
    print("IDS", [train[i]["input_ids"].tolist() for i in range(len(train))])


def test_four_processes_at_once_build_once_and_agree(source, tmp_path):
    started = [start_run([source, tmp_path / "cache", "slow"], program=builder) for _ in range(4)]
    assert [process.wait(120) for process in started] == [[0]] * 4, [process.output() for process in started]
    outputs = [process.output() for process in started]
    decisions = [re.search(r"Data cache \S+: (.*)", out)[1] for out in outputs]
    assert sorted(decisions) == ["built (not there yet)", "hit", "hit", "hit"]
    assert len({out.split("IDS")[1] for out in outputs}) == 1


def test_a_builder_killed_in_the_middle_leaves_nothing_that_breaks_the_next(build, source, tmp_path):
    assert start_run([source, tmp_path / "cache", "killed"], program=builder).wait(120) == [-signal.SIGKILL]
    assert [name for name in os.listdir(tmp_path / "cache") if name.startswith(".incomplete")]
    ids, decision, _ = build()
    assert decision == "built (not there yet)" and len(ids) == 8
    assert not [name for name in os.listdir(tmp_path / "cache") if name.startswith(".incomplete")]
    assert build()[:2] == (ids, "hit")


SLOW_SECONDS = 10


def slow_main(argv: list[str]) -> None:
    """Run main.py so that it takes `SLOW_SECONDS` to tokenize."""
    import main
    from utils.data.tokenization import tokenize_rows

    tokenize = tokenize_rows.tokenize

    def slow(*args, **kwargs):
        time.sleep(SLOW_SECONDS / 2)  # once for the training rows, once for the evaluation rows
        return tokenize(*args, **kwargs)

    tokenize_rows.tokenize = slow
    main.run(argv)


def test_a_slow_build_does_not_run_into_the_time_out(tiny_opt, json_data, tmp_path):
    """Two ranks; one tokenizes for longer than `--ddp_timeout` while the other waits, and the run goes through."""
    started = time.monotonic()
    printed = finished_run(
        [
            "--model_name_or_path", tiny_opt, "--data_path", json_data, "--data_output_path", tmp_path / "cache",
            "--max_seq_len", "64", "--dtype", "fp32", "--ddp_timeout", "8", "--per_device_train_batch_size", "8",
        ],
        ranks=2,
        program=slow_main,
    )  # fmt: skip
    assert time.monotonic() - started > SLOW_SECONDS
    assert printed.count("built (not there yet)") == 1
    assert "***** Evaluating perplexity, Epoch 1/1 *****" in printed


# ------------------------------------------------------------------------------------------- memory

MEASURE = """
import re, sys
from pathlib import Path
from tests.data.prepared_data import prepare
from utils.model.tokenizer import load_hf_tokenizer
import main  # all that a run imports
def kilobytes(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
Path("/proc/self/clear_refs").write_text("5")  # a new peak: that of the imports would hide what comes
before = kilobytes("VmRSS")
train, _ = prepare([sys.argv[1]], sys.argv[2], load_hf_tokenizer(sys.argv[3]), 64, num_proc=1)
count = sum(len(train[i]["input_ids"]) > 1 for i in range(0, len(train), 100))
assert count == len(range(0, len(train), 100)) and len(train.lengths()) == len(train)
print("PEAK", len(train), kilobytes("VmHWM") - before)
"""


def test_memory_stays_flat(tmp_path):
    """Ten times the rows are read, tokenized and opened in about the same memory: nothing holds the set."""
    growth = {}
    for rows in (10_000, 100_000):
        source = tmp_path / str(rows) / "Dahoas" / "rm-static"
        for split, count in (("train", rows), ("test", 3)):
            table = {
                "prompt": [f"{i}" for i in range(count)],
                "chosen": ["yes " * 20] * count,
                "rejected": [""] * count,
            }
            datasets.Dataset.from_dict(table).to_parquet(source / f"{split}.parquet")
        run = subprocess.run(
            [sys.executable, "-c", MEASURE, source, tmp_path / f"cache{rows}", DEMO],
            capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300,
        )  # fmt: skip
        found = re.search(r"PEAK (\d+) (\d+)", run.stdout)
        assert found and int(found[1]) == rows, run.stderr
        growth[rows] = int(found[2]) // 1024
    # MiB above the imports, mapped pages of files among them: the rows, and their ids twice while they are mixed. Seen:
    # 43 and 84; the ids of 100,000 rows as Python lists take 75 more.
    assert growth[100_000] < growth[10_000] + 75, growth
