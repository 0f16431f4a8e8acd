"""The GPU check, as far as it can be tested without a GPU: one check is run, and results are judged."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import cases as gpu_checks
from benchmarks.gpu import check as gpu_check
from benchmarks.gpu import features, kernel_checks
from benchmarks.gpu.plan import all_checks
from benchmarks.gpu.processes import OUT_OF_MEMORY, REFUSED, RIGHT, WRONG, Finished, Outcome, run_process
from benchmarks.gpu.random_models import opt_config
from utils.engine import sweep_step
from utils.perf import Throughput, throughput_line
from utils.train.nonfinite_steps import NonfiniteSteps

GPU = "NVIDIA H100 80GB HBM3"


def context(tmp_path, *outputs: str) -> gpu_checks.Context:
    """Return a context whose runs of main.py print `outputs` one after the other."""
    made = gpu_checks.Context("cuda", tmp_path, 10, None, {})
    waiting = list(outputs)
    made.run = lambda *flags, **options: Finished(0, waiting.pop(0), 1.0)
    made.shape = lambda name: tmp_path
    made.__dict__.update(small=tmp_path, records=tmp_path, dialogues=tmp_path)
    return made


def test_a_real_check_leaves_its_result_and_is_not_done_again(tmp_path, capsys):
    out = tmp_path / "results.json"
    arguments = ["--device", "cpu", "--only", "^fused loss, fp32$", "--out", str(out)]
    assert gpu_check.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| fused loss, fp32 | right | right 5; of 5; loss " in printed and "\n1 right; results in" in printed
    result = json.loads(out.read_text())
    assert result["machine"]["device"] == "cpu" and result["machine"]["deepspeed"]
    figures = result["checks"]["fused loss, fp32"]["figures"]
    assert len(figures["cases"]) == 5 and all(case["gradients"] < 1e-4 for case in figures["cases"])
    assert gpu_check.main([*arguments, "--skip_done"]) == 0
    assert "| fused loss" not in capsys.readouterr().out
    assert json.loads(out.read_text())["checks"] == result["checks"]


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_check, "describe_machine", lambda device: {"device": "cpu"})
    assert gpu_check.main(["--out", str(tmp_path / "results.json")]) == 2
    assert "No CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("status", "output", "verdict", "words"),
    [
        (2, "error: the device ran out of memory (CUDA out of memory. Tried to", OUT_OF_MEMORY, ""),
        (1, "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", OUT_OF_MEMORY, ""),
        (2, "a line\nerror: --dtype fp16 can't be trained", REFUSED, "--dtype fp16 can't be trained"),
        (-11, "a line\nlast words", WRONG, "exit status -11: a line / last words"),
        (None, "a line", WRONG, "stopped at its time limit of 7 s"),
    ],
)
def test_how_a_run_that_failed_is_judged(status, output, verdict, words):
    seen = json.dumps({"estimate": 2e9, "allocated": 1e9, "reserved": 3e9})
    failure = Finished(status, f"{output}\nWATCHED {seen}\n", 7.0).failure()
    assert (failure.verdict, failure.words) == (verdict, words)
    assert failure.figures == {"estimated GB": 2.0, "peak GB": 1.0, "reserved GB": 3.0}


def test_a_process_is_stopped_with_its_children_at_the_limit(tmp_path):
    child = tmp_path / "child.py"
    child.write_text(
        "import subprocess, sys, time\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    done = run_process([child], "cpu", 3)
    assert done.status is None and done.failure().verdict == WRONG
    state = Path("/proc") / done.output.strip() / "status"
    for _ in range(100):
        if not state.exists() or "zombie" in state.read_text():
            return
        time.sleep(0.1)
    pytest.fail(f"the child of a stopped process still runs: {state.read_text()}")


def overflowing_run(rises: bool, counted: bool, capsys) -> str:
    """Return what main.py's `NonfiniteSteps` prints while a loss scale falls from 2^32 until gradients fit."""
    optimizer = SimpleNamespace(loss_scale=2.0**32)
    steps = NonfiniteSteps(SimpleNamespace(fp16_enabled=lambda: True, optimizer=optimizer), limit=1)
    good = 0
    for step in range(1, 60):
        print(f"Epoch: 0, Step: {step - 1}, Rank: 0, loss = {8 - step / 60}")
        if optimizer.loss_scale > 2**20:
            optimizer.loss_scale /= 2
            steps.check(step, 5.0, [1], None)
            good = 0
        else:
            steps.step_taken()
            good += 1
            optimizer.loss_scale *= 2 if rises and good % 3 == 0 else 1
    printed = capsys.readouterr().out
    return printed if counted else printed.replace("(2 such steps", "(1 such steps")


@pytest.mark.parametrize(
    ("rises", "counted", "fault"),
    [(True, True, ""), (False, True, "the scale never rose again"), (True, False, "they are not counted")],
)
def test_how_loss_scaling_is_judged(rises, counted, fault, tmp_path, capsys):
    outcome = gpu_checks.overflow(context(tmp_path, overflowing_run(rises, counted, capsys)))
    assert (outcome.verdict, outcome.words) == (WRONG if fault else RIGHT, fault)
    assert outcome.figures["lowest scale"] == pytest.approx(2**20, rel=1e-5)  # as rounded when printed


def speed_run(estimate: float) -> str:
    """Return the end of a run as main.py prints it on a GPU."""
    figures = "loss 8.0000, learning rate 1.00e-05, gradient norm 1.5, padding 12.5%, memory 9.00 GB, 00:01 left."
    rates = Throughput(100.0, 1.0, 1.0, 0.01), Throughput(43210.0, 270.0, 400.0, 0.404)
    lines = [
        f"Step {step}/15, epoch 1/1: {figures} {throughput_line(rate, 1, GPU)}"
        for step, rate in zip((10, 15), rates, strict=True)
    ]
    seen = {"estimate": estimate, "allocated": 40e9, "reserved": 44e9, "finished": True}
    return "\n".join([*lines, "WATCHED " + json.dumps(seen)])


def test_speed_is_the_last_throughput_line_and_memory_comes_with_its_estimate(tmp_path):
    outcome = gpu_checks.speed(context(tmp_path, speed_run(42e9)), "1.3b", 16)
    assert outcome.verdict == RIGHT
    assert outcome.figures == {
        "tokens/s": 43210, "TFLOP/s": "400", "of peak": "40.4%", "tokens a sample": 160, "padding": "12.5%",
        "estimated GB": 42.0, "peak GB": 40.0, "reserved GB": 44.0, "estimate off by": "+5.0%",
    }  # fmt: skip
    assert gpu_checks.memory(context(tmp_path, speed_run(45e9)), "1.3b", 8).verdict == RIGHT
    assert gpu_checks.memory(context(tmp_path, speed_run(47e9)), "1.3b", 8).verdict == WRONG


def curve_run(losses: list[float]) -> str:
    steps = [f"Epoch: 0, Step: {number}, Rank: 0, loss = {loss}" for number, loss in enumerate(losses)]
    return "\n".join(["Optimizer: FusedAdam", *steps, "ppl: 20.0, loss: 3.0", "WATCHED {}"])


@pytest.mark.parametrize(("factor", "verdict"), [(1.001, RIGHT), (1.01, WRONG), (float("nan"), WRONG)])
def test_a_loss_curve_is_right_within_its_tolerance(factor, verdict, tmp_path):
    made = context(tmp_path, curve_run([4.0, 3.5 * factor]))
    expected = {"losses": [4.0, 3.5], "eval_losses": [3.0]}
    made.results[gpu_checks.REFERENCE] = {"verdict": RIGHT, "figures": expected}
    assert gpu_checks.curve(made, "bf16").verdict == verdict


def test_a_run_without_the_line_of_its_feature_is_wrong(tmp_path):
    made = context(tmp_path, *[curve_run([4.0, 3.5])] * 4)
    made.small_llama = tmp_path
    made.results[gpu_checks.REFERENCE] = {"verdict": RIGHT, "figures": {"losses": [4.0, 3.5], "eval_losses": [3.0]}}
    outcome = gpu_checks.curve(made, "bf16", said=r"Compiled: \d")
    assert outcome.verdict == WRONG and "Compiled" in outcome.words
    assert features.tiled(made).verdict == WRONG, "equal to the plain run, and nothing says that MLPs were tiled"


@pytest.mark.parametrize(("factor", "verdict"), [(1.001, RIGHT), (1.01, WRONG)])
def test_a_run_beside_one_in_float32_on_the_cpu(factor, verdict, tmp_path):
    tiled = "Tiled MLP: 2 LlamaMLP in pieces of 64 tokens\n"
    made = context(tmp_path, tiled + curve_run([4.0, 3.5 * factor]), curve_run([4.0, 3.5]))
    made.small_llama = tmp_path
    assert features.tiled(made).verdict == verdict


@pytest.mark.parametrize(("difference", "verdict"), [(0.0, RIGHT), (1e-6, WRONG)])
def test_master_weights_are_right_bit_for_bit(difference, verdict, tmp_path):
    seen = {"masters": {"restored": 36, "largest difference": difference}}
    assert features.masters(context(tmp_path, "WATCHED " + json.dumps(seen))).verdict == verdict
    assert features.masters(context(tmp_path, "WATCHED {}")).verdict == WRONG


@pytest.mark.parametrize(
    ("settings", "loss", "verdict"),
    [(["micro batch 8", "micro batch 4"], 3.0, RIGHT), (["micro batch 8"], 3.0, WRONG),
     (["micro batch 8", "micro batch 4"], 3.1, WRONG)],
)  # fmt: skip
def test_how_stepping_down_is_judged(settings, loss, verdict, tmp_path):
    chosen = [f"  * {setting}: 8.6 MB, time 1.00, fits" for setting in settings]
    made = context(tmp_path, "\n".join([*chosen, f"ppl: 20.0, loss: {loss}"]))
    made.results[gpu_checks.REFERENCE] = {"verdict": RIGHT, "figures": {"losses": [], "eval_losses": [3.0]}}
    outcome = features.stepped_down(made)
    assert outcome.verdict == verdict and outcome.figures["settings"] == ", then ".join(settings)


@pytest.mark.parametrize(("factor", "right"), [(1, True), (1.001, False)])
def test_the_optimizer_step_is_compared_with_that_of_deepspeed(factor, right, monkeypatch):
    norm = sweep_step.gradient_norm
    monkeypatch.setattr(sweep_step, "gradient_norm", lambda pieces, buffer: factor * norm(pieces, buffer))
    monkeypatch.setitem(sweep_step.PIECE, "cpu", sweep_step.PIECE["cpu"])
    cases = {case["case"]: case for case in kernel_checks.step("bf16", torch.device("cpu"))}
    assert len(cases) == 5 and all(case["right"] for case in cases.values()) is right
    assert cases["gradients of inf"]["norm"] == 0, "infinite in both: a skipped step"


@pytest.mark.parametrize(("later", "verdict", "words"), [(3.5, RIGHT, "bit for bit"), (3.501, RIGHT, "not bit"),
    (3.6, WRONG, "not bit")])  # fmt: skip
def test_a_resumed_run_is_compared_from_its_checkpoint_on(later, verdict, words, tmp_path):
    whole = [5.0] * 7 + [4.0, 3.5]
    outcome = gpu_checks.resume(context(tmp_path, curve_run(whole), curve_run([4.0, later])))
    assert outcome.verdict == verdict and words in outcome.words and outcome.words.startswith("2 losses")


def test_the_shapes_are_the_published_sizes():
    from transformers import AutoModelForCausalLM

    published = {"125m": 0.125, "350m": 0.331, "2.7b": 2.652}
    for name, billions in published.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(opt_config(name))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.005), name
        assert f"speed {name}, LoRA" in all_checks("cuda")


def test_the_order_is_by_value():
    """Smoke, equality, 1.3b, larger models, then the rest; each speed of 1.3b has its padded ones beside it."""
    names = list(all_checks("cuda"))
    first, large, rest = (
        next(place for place, name in enumerate(names) if name.startswith(words))
        for words in ("speed 1.3b", "speed 2.7b", "attention kernels, fp16")
    )
    assert names[0].startswith("smoke") and {"bf16, ZeRO 0", "attention kernels, bf16"} <= set(names[:first])
    assert first < 8 and all("1.3b" in name for name in names[first:large])
    for kind in ("full", "LoRA", "LoRA, checkpointing"):
        beside = {f"speed 1.3b, {kind}, {way}" for way in ("packed 512", "packed 2048", "longest", "max_length")}
        assert beside <= set(names[first:large])
    assert {"speed 13b, LoRA"} <= set(names[large:rest]) and {"SIGTERM", "memory 350m, ZeRO 0"} <= set(names[rest:])
    assert "optimizer step, bf16" in names[:first] and "speed 1.3b, full, packed 512, compiled" in names[first:large]
    new = {"bf16, torch_compile", "ZeRO 3, master weights", "LoRA, 4 bits", "tiled MLP", "--fit, out of memory"}
    assert new <= set(names[rest:])


def test_a_check_that_is_cut_short_is_left_for_another_call(tmp_path, monkeypatch, capsys):
    def cut(context):
        time.sleep(max(0.0, context.deadline - time.monotonic()))
        return Outcome(WRONG, "stopped at its time limit")

    wrong = Outcome(WRONG, "its own fault")
    monkeypatch.setattr(gpu_check, "all_checks", lambda device: {"fails": lambda context: wrong, "is cut": cut})
    args = gpu_check.build_parser().parse_args(["--minutes", "0.005", "--out", str(tmp_path / "results.json")])
    results = {"checks": {}}
    gpu_check.run_checks(args, results, tmp_path)
    assert list(results["checks"]) == ["fails"] and "is cut was cut short" in capsys.readouterr().out


def test_no_process_has_more_time_than_is_left(tmp_path):
    made = gpu_checks.Context("cpu", tmp_path, 400, None, {}, time.monotonic() + 20)
    assert 15 < made.limit <= 20
    assert gpu_checks.Context("cpu", tmp_path, 400, None, {}).limit == 400


def test_the_whole_output_of_a_failed_process_is_kept(tmp_path):
    script, log = tmp_path / "fails.py", tmp_path / "check.log"
    script.write_text("import sys\nfor n in range(100): print('line', n)\nsys.exit('its error output')\n")
    made = gpu_checks.Context("cpu", tmp_path, 60, None, {}, log=log)
    assert made.process([script]).status == 1
    kept = log.read_text()
    assert f"===== {script}\n===== exit status 1" in kept and "line 0\n" in kept and "its error output" in kept
    script.write_text("")
    assert made.process([script]).status == 0 and log.read_text() == kept


def test_the_machine_is_described_without_git_and_a_failed_import_is_shown(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_check.current_commit() == "unknown"
    monkeypatch.setattr(gpu_check, "MACHINE", "raise ImportError('libcudart is missing')")
    with pytest.raises(SystemExit, match="libcudart is missing"):
        gpu_check.describe_machine("cpu")


def test_the_smoke_test(tmp_path):
    outcome = gpu_checks.smoke(gpu_checks.Context("cpu", tmp_path, 400, None, {}, log=tmp_path / "log"))
    assert outcome.verdict in (RIGHT, WRONG)
    if outcome.verdict == WRONG:  # this machine is too busy for a minute
        assert "time limit" in outcome.words, (tmp_path / "log").read_text()
        return
    assert set(outcome.figures) == {"imports", "step", "collective"} and "bf16" in outcome.figures["step"]


def test_only_one_run_is_profiled_and_thirty_steps_are_timed(tmp_path):
    checks = all_checks("cuda")
    profiled = [name for name, check in checks.items() if getattr(check, "keywords", {}).get("profiled")]
    assert profiled == ["speed 1.3b, full, packed 512"]
    made, flags = context(tmp_path, speed_run(42e9)), []
    run = made.run
    made.run = lambda *given, **options: (flags.extend([*given, *options["watch"]]), run())[1]
    checks[profiled[0]](made)
    after = {flag: flags[flags.index(flag) + 1] for flag in ("--max_steps", "--logging_steps", "--profile_at")}
    assert after == {"--max_steps": 40, "--logging_steps": 10, "--profile_at": "5"}, "the first ten are not timed"
