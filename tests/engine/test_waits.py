"""How often a step waits for the device: each read of a value, and each synchronization, does on a GPU."""

import json
import re

import pytest
from fork_runs import copy_at_step, finished_run, outcome


def count(argv: list[str]) -> None:
    """main.py that prints the waits of each micro batch with its optimizer step."""
    import main
    from benchmarks.waits import allow_fp16, count_waits

    if "fp16" in argv:
        allow_fp16()
    found = count_waits(main)
    main.run(argv)
    print("WAITS " + json.dumps(found), flush=True)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_waits_do_not_grow_with_the_number_of_tensors(dtype, run_arguments):
    """DeepSpeed by itself reads a value for each tensor, and synchronizes twice in a micro batch from the third on."""
    arguments = [argument.replace("fp32", dtype) for argument in run_arguments]
    printed = finished_run([*arguments, "--max_steps", "4", "--per_device_train_batch_size", "8"], program=count)
    found = json.loads(re.search(r"WAITS (.*)", printed)[1])
    assert len(found) == 4
    # One of the reads is of the host: OPT's layer drop draws a number with transformers 5.17.
    assert all(one["reads"] <= 5 < one["trained"] / 4 for one in found), found
    assert not any(one["synchronizations"] or one["reductions"] for one in found), found


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_that_is_not_finite_is_still_skipped_in_bf16(ranks, run_arguments, tmp_path):
    arguments = [argument.replace("fp32", "bf16") for argument in run_arguments]
    command = [*arguments, "--learning_rate", "1e30", "--max_bad_steps", "2", "--output_dir", tmp_path]
    printed = finished_run([*command, "--per_device_train_batch_size", "8"], ranks, status=2)
    assert "2 steps in a row" in printed and "skipped: its" in printed and "Traceback" not in printed


def count_reductions(argv: list[str]) -> None:
    """main.py that prints how often gradients were reduced; with `--reduce` first, as DeepSpeed does by itself."""
    from deepspeed import DeepSpeedEngine

    import main
    import utils.engine.engine as engine_file

    if argv[0] == "--reduce":
        engine_file.leave_out_reduction_of_one_rank = lambda engine: None
    calls, reduce = [], DeepSpeedEngine.buffered_allreduce_fallback
    DeepSpeedEngine.buffered_allreduce_fallback = lambda *args, **named: (calls.append(1), reduce(*args, **named))
    main.run(argv[1:])
    print("REDUCTIONS", len(calls), flush=True)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_one_rank_reduces_nothing_and_gets_the_same(dtype, run_arguments, tmp_path):
    """Losses, gradient norms and weights, bit for bit."""
    common = [argument.replace("fp32", dtype) for argument in run_arguments]
    common += ["--max_steps", "3", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    printed = [
        finished_run([flag, *common, "--output_dir", tmp_path / flag], program=count_reductions)
        for flag in ("--reduce", "--leave")
    ]
    assert [re.search(r"REDUCTIONS (\d+)", one)[1] for one in printed] == ["3", "0"]
    assert outcome(tmp_path / "--reduce") == outcome(tmp_path / "--leave")


def run_ahead(argv: list[str]) -> None:
    """main.py that treats the CPU as a device that works on by itself, and prints when a step has been given to it."""
    import main
    import utils.train.progress as progress_file

    progress_file.can_run_ahead = lambda device: True
    original, given = main.micro_step, []

    def told(*args):
        loss = original(*args)
        given.append(loss)
        print(f"GIVEN {len(given)}", flush=True)
        return loss

    main.micro_step = told
    main.run(argv)


@pytest.fixture(scope="module")
def ahead(run_setting, tmp_path_factory):
    """Six steps, each logged, with a checkpoint after the third: arguments, folder, and what was printed."""
    folder = tmp_path_factory.mktemp("ahead") / "run"
    setting = [*run_setting, "--max_steps", "6", "--logging_steps", "1", "--save_steps", "3"]
    setting.remove("--print_loss")
    return setting, folder, finished_run([*setting, "--output_dir", folder], program=run_ahead)


def step_lines(printed: str) -> list[str]:
    """The lines of steps, up to what depends on time."""
    return re.findall(r"^(Step \d+/.*), memory", printed, re.MULTILINE)


def test_figures_come_one_step_late_and_are_the_same(ahead, tmp_path):
    """Before a checkpoint, an evaluation and the end they come at once; a run without lateness has the same lines."""
    setting, folder, printed = ahead
    order = re.findall(r"^(GIVEN \d|Step \d|Checkpoint|[*]+ Evaluating)", printed, re.MULTILINE)
    assert order == [
        "***** Evaluating", "GIVEN 1", "GIVEN 2", "Step 1", "GIVEN 3", "Step 2", "Step 3", "Checkpoint", "GIVEN 4",
        "GIVEN 5", "Step 4", "GIVEN 6", "Step 5", "Step 6", "***** Evaluating", "Checkpoint",
    ]  # fmt: skip
    at_once = finished_run([*setting, "--output_dir", tmp_path / "at_once"])
    assert step_lines(printed) == step_lines(at_once) and len(step_lines(printed)) == 6
    assert outcome(folder) == outcome(tmp_path / "at_once")
    places = [one / "metrics.jsonl" for one in (folder, tmp_path / "at_once")]
    fields = [[list(json.loads(line)) for line in place.read_text().splitlines()] for place in places]
    assert fields[0] == fields[1]


def test_a_resumed_run_has_the_same_records(ahead, tmp_path):
    setting, folder, _ = ahead
    resumed = copy_at_step(folder, tmp_path / "resumed", 3)
    finished_run([*setting, "--resume_from_checkpoint", "--output_dir", resumed], program=run_ahead)
    assert outcome(resumed) == outcome(folder)


def test_no_record_is_lost_where_steps_end_the_run(run_setting, tmp_path):
    broken = [*run_setting, "--learning_rate", "1e30", "--max_bad_steps", "2", "--logging_steps", "1"]
    printed = finished_run([*broken, "--output_dir", tmp_path], status=2, program=run_ahead)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = int(re.search(r"the last step (\d+), had a loss", printed)[1])
    assert steps[-1] == last and printed.index(f"Step {last}/") < printed.index(f"Step {last} skipped")
