"""What the GPU check's own processes measure and print: the profile, the estimate, the reference, the smoke test."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks.gpu import features, kernel_checks, smoke, watched_run
from benchmarks.gpu.cases import Context
from benchmarks.gpu.processes import RIGHT, WRONG, Finished
from utils.prompt_eval.show import show_answers


def test_what_bounds_a_step_is_named():
    """Of 100 ms the kernels of a GPU take 80; neither the operator that started one nor an annotation counts."""
    kernels = {
        "nvjet_tst_128x256_64x4_2x1_v_bz_TNT": 40, "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>": 10,
        "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>": 12, "multi_tensor_apply_kernel<AdamFunctor>": 8,
        "Memcpy HtoD (Pinned -> Device)": 2, "void at::native::vectorized_elementwise_kernel<4>": 8,
    }  # fmt: skip
    events = [
        SimpleNamespace(key=name, self_device_time_total=1000 * milliseconds, device_type=DeviceType.CUDA, count=3,
                        is_user_annotation=False)
        for name, milliseconds in kernels.items()
    ]  # fmt: skip
    events.append(SimpleNamespace(**{**vars(events[0]), "key": "Optimizer.step#AdamW", "is_user_annotation": True}))
    events.append(SimpleNamespace(**{**vars(events[0]), "key": "aten::mm", "device_type": DeviceType.CPU}))
    figures = watched_run.profile_figures(SimpleNamespace(key_averages=lambda: events), 0.1)
    assert figures["busy"] == "80%" and figures["most time in"] == "matrix products" and len(figures["top"]) == 6
    kinds = "matrix products 50%, attention 12%, optimizer 8%, elementwise 8%, copies 2%, no kernel 20%"
    assert figures["kinds"] == kinds


def test_the_estimate_leaves_a_runs_random_numbers_alone(monkeypatch):
    states = []
    program = SimpleNamespace(train=lambda *args: states.append(torch.get_rng_state()))
    monkeypatch.setattr(watched_run, "program", program)
    monkeypatch.setattr(watched_run, "largest_micro_batch", lambda *args: 1)
    monkeypatch.setattr(watched_run, "model_form", lambda args: None)
    figures = SimpleNamespace(total=SimpleNamespace(peak=2, moments=[]))
    monkeypatch.setattr(watched_run, "estimate_memory", lambda *args, **options: (torch.rand(9), figures)[1])
    seen, before = {}, torch.get_rng_state()
    watched_run.estimate_before_training(seen)
    config = SimpleNamespace(args=SimpleNamespace(model_name_or_path=""), layout="free")
    program.train(SimpleNamespace(config={}), SimpleNamespace(train=[]), config, None, SimpleNamespace(tokenizer=""))
    assert seen == {"estimate": 2, "moments": [], "finished": True} and torch.equal(states[0], before)


def test_the_reference_of_soft_capped_scores_is_eager():
    """transformers would take a kernel that leaves the cap out."""
    made = {family: kernel_checks.make(family).config._attn_implementation for family in ("gemma2", "mistral")}
    assert made["gemma2"] == "eager" != made["mistral"]


def test_the_smoke_test_goes_on_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert smoke.find_compiler() is None
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho Cuda compilation tools\necho Build cuda_13.0\n")
    (tmp_path / "nvcc").chmod(0o755)
    assert smoke.find_compiler() == "Build cuda_13.0"


@pytest.mark.parametrize(("second", "verdict"), [("A lens.", RIGHT), ("A mirror.", WRONG), (None, WRONG)])
def test_answers_of_a_model_beside_itself_are_the_same(second, verdict, tmp_path, capsys):
    if second is not None:
        texts = {"baseline": "A lens.", "finetuned": second}
        results = {
            name: SimpleNamespace(answers={"greedy": [[SimpleNamespace(prompt="Human: What?\n", text=text)]]})
            for name, text in texts.items()
        }
        show_answers(SimpleNamespace(prompts=["What?"], strategies=["greedy"]), results)
    made = Context("cpu", tmp_path, 10, None, {})
    printed = capsys.readouterr().out
    made.small, made.process = tmp_path, lambda command: Finished(0, printed, 1.0)
    outcome = features.answers(made)
    assert outcome.verdict == verdict and outcome.words.startswith("1 answers" if second else "0 answers")
