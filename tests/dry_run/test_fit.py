"""`--fit`: what it chooses fits and is the fastest, as estimated or measured; what was typed and every step stay."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from fork_runs import finished_run, losses, outcome

from tools.memory_table import opt_config
from utils.arguments.parser import parse_args
from utils.arguments.values import check_values
from utils.dry_run import measured, step_down
from utils.dry_run.choices import Choice, Row, divisors
from utils.dry_run.fit import LastFit, choose
from utils.dry_run.step_down import run_stepping_down
from utils.dry_run.step_time import ADAM_BYTES, Load, Machine, sent_bytes, step_seconds
from utils.errors import UserError

ROW = re.compile(
    r"^  (?P<mark>[* ]) micro batch (?P<micro>\d+) x (?P<accumulation>\d+) accumulation, checkpointing (?P<on>on|off), "
    r"ZeRO (?P<stage>\d)(?P<offload> \+ offload)?: (?P<size>[\d.]+) (?P<unit>[MG]B).*, time (?P<time>[\d.]+), "
    r"((?P<measured>[\d.]+) ms measured, )?(?P<fits>fits|too much)$",
    re.MULTILINE,
)
BYTES = {"MB": 1e6, "GB": 1e9}


def rows_of(printed: str) -> list[dict]:
    rows = [match.groupdict() for match in ROW.finditer(printed)]
    return [{**row, "bytes": float(row["size"]) * BYTES[row["unit"]], "time": float(row["time"])} for row in rows]


@pytest.fixture(scope="module")
def large_model(tmp_path_factory):
    """OPT-1.3b without its weights."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("large") / "model"
    opt_config("1.3b").save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt").save_pretrained(folder)
    return folder


@pytest.fixture
def planned(run_inside, large_model, json_data, cache_folder):
    def plan(*further, status: int = 0) -> tuple[str, list[dict]]:
        places = ["--model_name_or_path", large_model, "--data_path", json_data, "--data_output_path", cache_folder]
        ended, out, err = run_inside([*places, "--data_split", "10,0,0", "--max_seq_len", "64", *further])
        assert ended == status, err
        return out + err, rows_of(out)

    return plan


def test_the_fastest_that_fits_is_chosen(planned):
    """ZeRO 0 needs 18 bytes a weight, 23.7 GB; shared by 8 GPUs the same step fits and is as fast."""
    printed, rows = planned("--fit", "--dry_run", "8x24")
    (chosen,) = [row for row in rows if row["mark"] == "*"]
    assert {row["stage"] for row in rows} == set("0123") and {row["on"] for row in rows} == {"on", "off"}
    for row in rows:
        assert (row["fits"] == "fits") == (row["bytes"] <= 0.92 * 24e9)
        assert int(row["micro"]) * int(row["accumulation"]) == 16
        assert row["micro"] == "16" or row["fits"] != "fits" or row["stage"] == "0"
    assert chosen["time"] == min(row["time"] for row in rows if row["fits"] == "fits")
    assert (chosen["stage"], chosen["on"], chosen["offload"]) == ("1", "off", None)
    assert "Fit: micro batch 16 x 1 accumulation, checkpointing off, ZeRO 1, the fastest" in printed
    # The plan is that of the choice, with its own estimate.
    assert f"most at once {chosen['size']} {chosen['unit']}" in printed
    assert '"stage": 1' in printed and '"zero_stage": 0' in printed, "arguments stay as typed"


def test_what_was_typed_stays(planned):
    cut = ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2"]
    _, rows = planned("--fit", "--dry_run", "8x24", *cut, "--zero_stage", "3", "--gradient_checkpointing")
    assert rows and {(row["micro"], row["accumulation"], row["stage"], row["on"]) for row in rows} == {
        ("8", "2", "3", "on")
    }
    _, rows = planned("--fit", "40", "--dry_run", "8x24", "--zero_stage", "0")
    assert {row["stage"] for row in rows} == {"0"}, "typed, though it is the default"
    assert all(row["fits"] == "fits" for row in rows), "in 40 GB, as --fit says"
    _, rows = planned("--fit", "--dry_run", "8x24", "--torch_compile", "--packing")
    assert {row["stage"] for row in rows} == set("012"), "what is refused at ZeRO 3 keeps it away"
    printed, rows = planned("--fit", "20", "--dry_run", "8x24", "--zero_stage", "0", status=2)
    assert "error: --fit: no setting fits 20 GB (--fit): the smallest, micro batch" in printed
    assert not any(row["mark"] == "*" for row in rows)


@pytest.mark.parametrize("text", ["0", "-1", "much", "inf", "nan"])
def test_a_limit_is_a_number(text):
    problems = check_values(parse_args(["--model_name_or_path", "a", f"--fit={text}"]))
    assert any("--fit" in problem and "write gigabytes" in problem for problem in problems)


def test_cuts():
    assert divisors(16) == [16, 8, 4, 2, 1] and divisors(12) == [12, 6, 3, 1] and divisors(1) == [1]
    assert divisors(9) == [9, 3, 1]


def test_times_by_hand():
    """2 operations a weight, token and pass; 3 passes, 4 with checkpointing; rings send (n - 1) / n of each payload."""
    machine = Machine(operations=1e12, memory=1e12, in_node=1e9, to_host=1e9, host_memory=1e9)
    plain = Load(1000, 1000, 2, 500.0, 4, 1, 0, False, False)
    products, reading = 2 * 3 * 1000 * 500 / 1e12, 3 * 2 * 1000 * 4 / 1e12
    assert step_seconds(plain, machine) == pytest.approx(products + reading)
    again = plain._replace(checkpointing=True)
    assert step_seconds(again, machine) == pytest.approx((products + reading) * 4 / 3)
    frozen = plain._replace(trainable=0)
    assert step_seconds(frozen, machine) == pytest.approx((products + reading) * 2 / 3)
    four = plain._replace(ranks=4)
    sent = {stage: sent_bytes(four._replace(stage=stage)) / (3 / 4) / 2000 for stage in range(4)}
    assert sent == pytest.approx({0: 2, 1: 2, 2: 5, 3: 12})
    away = plain._replace(stage=2, offload=True)
    assert step_seconds(away, machine) - step_seconds(plain, machine) == pytest.approx((4 + ADAM_BYTES) * 1000 / 1e9)
    hidden = Machine(operations=1e12, memory=1e12, in_node=1e12)
    sending = sent_bytes(four) / 1e12
    assert step_seconds(four, hidden) == pytest.approx(products + reading + sending / 2), "half hides"
    slow = machine._replace(in_node=1e8)
    assert step_seconds(four, slow) == pytest.approx(reading + sent_bytes(four) / 1e8), "at most what products cover"


def test_only_a_fitted_run_on_one_rank_steps_down(monkeypatch):
    calls = []

    def main(args):
        calls.append((args.fit, args.resume_from_checkpoint))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(LastFit, "row", Row(Choice(4, 4, False, 2, None), int(20e9), 0, 1.0, True))
    plain, fitted = (parse_args(["--model_name_or_path", "a", *more]) for more in ([], ["--fit"]))
    with pytest.raises(torch.OutOfMemoryError):
        run_stepping_down(main, plain, lambda args: "new", lambda: None)
    calls.clear()
    run_stepping_down(main, fitted, lambda args: "new", lambda: None)
    assert calls == [("here", None), ("16", "new")] and fitted.fit == "here"
    calls.clear()
    monkeypatch.setattr(step_down, "world_size", lambda: 2)  # the others wait for the one that failed
    with pytest.raises(UserError, match=r"micro batch 4 x 4 .* with --fit 16 --resume_from_checkpoint at its end"):
        run_stepping_down(main, fitted, lambda args: "new", lambda: None)
    assert len(calls) == 1


def row_of(cut: int, seconds: float, **more) -> Row:
    return Row(
        Choice(cut, 16 // cut, more.pop("on", False), 0, None), int(1e9), 0, seconds, more.pop("fits", True), **more
    )


def test_measured_times_decide():
    """Nearly equal ones leave it to the estimate; so does a best setting that could not be measured."""
    first, second = row_of(16, 1.0), row_of(8, 1.2)
    assert choose([second, first])[0] == first
    by_time = [first._replace(measured=0.2), second._replace(measured=0.1)]
    assert choose(by_time) == (by_time[1], "the fastest as measured")
    nearly = [first._replace(measured=0.104), second._replace(measured=0.1)]
    assert choose(nearly) == (nearly[0], "the best estimate, and within 5% of the fastest as measured")
    failed = [first._replace(problem="no port"), second._replace(measured=0.1)]
    assert choose(failed)[0] == failed[0]
    slow = [first._replace(problem="took more than 9 s", too_slow=True), second._replace(measured=0.1)]
    assert choose(slow)[0] == slow[1]
    full = [first._replace(problem="ran out of memory", fits=False), second._replace(measured=0.1)]
    assert choose(full)[0] == full[1]
    assert choose([first._replace(fits=False)])[0] is None


def test_what_is_worth_measuring(monkeypatch):
    config = SimpleNamespace(gpus=None, offload=None)
    monkeypatch.setattr(measured, "real_cut", lambda config, data, row: row.choice[:2])
    monkeypatch.setattr(measured, "free_memory", lambda: 1e9)
    rows = [row_of(16, 1.0), row_of(8, 1.1), row_of(16, 1.33, on=True), row_of(4, 1.2, on=True), row_of(2, 1.4),
            row_of(1, 1.6), row_of(1, 1.0, fits=False)]  # fmt: skip
    found = measured.contest(config, None, rows, 1000)
    # Checkpointing of the same cut only adds work; three are tried, of those within 1.5 times the best.
    assert [row.seconds for row in found.rows] == [1.0, 1.1, 1.2] and found.why_not is None
    for other, words in (
        (rows[:1], "nothing else that could be faster is estimated to be within 1.5 times"),
        ([row._replace(seconds=100 * row.seconds) for row in rows], "estimated to take more than 180 s"),
    ):
        assert words in measured.contest(config, None, other, 1000).why_not
    assert "does not fit the CPU's free memory" in measured.contest(config, None, rows, int(3e8)).why_not
    assert "other GPUs" in measured.contest(SimpleNamespace(gpus=2), None, rows, 1000).why_not
    monkeypatch.setattr(measured, "real_cut", lambda config, data, row: "as the others")
    assert "nothing else" in measured.contest(config, None, rows[:2], 1000).why_not


@pytest.mark.parametrize(("script", "found"), [
    ("kill -9 $$", {"problem": "ran out of memory"}),  # as the system ends what takes too much
    ("exit 3", {"problem": "its process ended with status 3"}),
    ("exec sleep 60", {"problem": "took more than 1 s", "too_slow": True}),
])  # fmt: skip
def test_how_a_measuring_process_can_end(script, found, tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(measured.sys, "executable", str(program))
    assert measured._one(None, None, 1.0) == found
    row = measured._agreed(row_of(16, 1.0), [{"seconds": 0.1}, found])
    assert (row.measured, row.fits, row.too_slow) == (None, "memory" not in row.problem, "too_slow" in found)
    assert measured._agreed(row, [{"seconds": 0.1}, {"seconds": 0.2}]).measured == 0.2, "of the slowest rank"


# ------------------------------------------------------------------------------------------ whole runs


def out_of_memory_once(argv: list[str]) -> None:
    """main.py whose device runs out of memory once, in the third step; nothing is timed."""
    import main

    measured.SECONDS = 0.0
    micro_step, steps, failed = main.micro_step, [], []

    def failing(engine, batch, device):
        steps.append(batch.is_last)
        if sum(steps) == 3 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return micro_step(engine, batch, device)

    main.micro_step = failing
    main.run(argv)


@pytest.fixture(scope="module")
def plain_losses(tmp_path_factory, run_arguments) -> dict[int, float]:
    """Of six steps of 16 samples."""
    folder = tmp_path_factory.mktemp("plain")
    finished_run([*run_arguments, "--max_steps", "6", "--output_dir", folder])
    return losses(folder)


def timing_two(argv: list[str]) -> None:
    """main.py that times two settings at most."""
    import main

    measured.CONTENDERS = 2
    main.run(argv)


def test_a_fitted_run_on_two_ranks_is_that_of_its_settings_typed(tmp_path, run_arguments, plain_losses):
    """Bit for bit: what was timed for it, on both ranks together, leaves no trace. Its steps are those of one rank.

    In 4.5 MB the estimate has no room for ZeRO 0.
    """
    arguments = [*run_arguments, "--max_steps", "6", "--per_device_train_batch_size", "8"]
    fitted, typed, again = (tmp_path / name for name in ("fitted", "typed", "again"))
    printed = finished_run([*arguments, "--fit", "0.0045", "--output_dir", fitted], ranks=2, program=timing_two)
    rows = rows_of(printed)
    timed = [float(row["measured"]) for row in rows if row["measured"]]
    (chosen,) = [row for row in rows if row["mark"] == "*"]
    assert len(timed) == 2 and float(chosen["measured"]) <= 1.05 * min(timed)
    assert "Fit: timed up to 3 steps of each of the 2 settings" in printed and "as measured" in printed
    assert all(row["fits"] == "too much" for row in rows if row["stage"] == "0")
    assert losses(fitted) == pytest.approx(plain_losses, rel=1e-4)
    run = json.loads((fitted / "run.json").read_text())
    assert run["starts"][0]["zero_stage"] == run["decisions"]["zero_stage"] == int(chosen["stage"])
    assert run["arguments"]["zero_stage"] == 0 and run["arguments"]["fit"] == "0.0045"
    setting = ["--gradient_accumulation_steps", chosen["accumulation"], "--zero_stage", chosen["stage"]]
    setting += ["--gradient_checkpointing"] if chosen["on"] == "on" else []
    setting += ["--per_device_train_batch_size", chosen["micro"]]
    finished_run([*arguments, *setting, "--output_dir", typed], ranks=2)
    assert outcome(fitted) == outcome(typed)
    printed = finished_run(["--like", fitted, "--output_dir", again], ranks=2)
    assert "as the earlier run; takes" in printed and not rows_of(printed)
    assert outcome(again) == outcome(fitted)


def test_a_run_that_runs_out_of_memory_steps_down_once(tmp_path, run_arguments, plain_losses):
    """It goes on from its last checkpoint by smaller micro batches, and its steps are those of a plain run."""
    arguments = [*run_arguments, "--max_steps", "6", "--logging_steps", "1"]
    # The whole batch without checkpointing is estimated to take 8.6 MB, at ZeRO 0, the only one on one CPU.
    fitted = [*arguments, "--fit", "0.009", "--save_steps", "2", "--output_dir", tmp_path / "fitted"]
    printed = finished_run(fitted, program=out_of_memory_once)
    assert "Fit: nothing was timed: building the model and its steps are estimated to take more than 0 s" in printed
    first, second = re.findall(r"^  \* (.*?): ", printed, re.MULTILINE)
    assert first == "micro batch 16 x 1 accumulation, checkpointing off, ZeRO 0"
    assert re.search(
        r"Fit: the device ran out of memory \(CUDA out of memory.*\) with micro batch 16 x 1 .*; once, it goes on with "
        rf"--fit 0.00\d+, a fifth less than estimated, from {tmp_path}/fitted/checkpoints/step-000002",
        printed,
    )
    assert "chosen anew" in printed and second != first
    assert "step 2 of 6 is done" in printed
    assert losses(tmp_path / "fitted") == pytest.approx(plain_losses, rel=1e-4)
    run = json.loads((tmp_path / "fitted" / "run.json").read_text())
    assert run["status"] == "finished" and [start["status"] for start in run["starts"]] == ["failed", "finished"]
    assert run["arguments"]["per_device_train_batch_size"] == 16 and not run["arguments"]["gradient_checkpointing"]
    assert run["arguments"]["fit"] == "0.009" and run["arguments"]["resume_from_checkpoint"] is None, "as typed"
    assert float(run["decisions"]["fit"]) < 0.009
    assert run["decisions"]["resume_from_checkpoint"].endswith("step-000002")
    decided = run["decisions"]
    cut = f"{decided['per_device_train_batch_size']} x {decided['gradient_accumulation_steps']}"
    checkpointing = "on" if decided["gradient_checkpointing"] else "off"
    assert second == f"micro batch {cut} accumulation, checkpointing {checkpointing}, ZeRO {decided['zero_stage']}"
    again = finished_run([*fitted, "--resume_from_checkpoint"])
    assert f"Fit: {second}, as the earlier run" in again
