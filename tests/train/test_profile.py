"""--profile_steps: a trace that Chrome reads, and a table of where the time of some steps went."""

import gzip
import json
import re

import pytest
from fork_runs import finished_run

from utils.arguments.parser import parse_args
from utils.arguments.values import check_values
from utils.train.step_profile import OTHER, kind_of

WATCHED = ["--profile_steps", "3:4", "--per_device_train_batch_size", "8", "--max_steps", "6"]


def test_a_run_writes_the_trace_and_the_table_of_its_steps(tmp_path, run_arguments):
    printed = finished_run([*run_arguments, *WATCHED, "--output_dir", tmp_path])
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["steps_3-4.json.gz", "steps_3-4.txt"]
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "steps_3-4.json.gz").read_bytes()))
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert names.count("_FusedLoss") == 2  # one loss a step
    table = (tmp_path / "profile" / "steps_3-4.txt").read_text()
    shares = {kind: float(share) for share, kind in re.findall(r"^ *([\d.]+)%  (.+)$", table, flags=re.MULTILINE)}
    assert sum(shares.values()) == pytest.approx(100, abs=1) and shares["matrix products"] > 5
    assert "aten::" in table
    assert f"Profile of steps 3 to 4: {max(shares.values()):.0f}%" in printed
    assert (tmp_path / "model.safetensors").exists()


def test_a_run_that_ends_before_b_writes_what_it_saw(tmp_path, run_arguments):
    steps = ["--profile_steps", "2:9", "--per_device_train_batch_size", "8", "--max_steps", "3"]
    finished_run([*run_arguments, *steps, "--output_dir", tmp_path])
    assert (tmp_path / "profile" / "steps_2-3.txt").exists()


@pytest.mark.parametrize("steps", ["3", "0:4", "5:4", "a:b", "3-4"])
def test_other_texts_are_refused(steps):
    args = parse_args(["--model_name_or_path", "a", "--profile_steps", steps, "--output_dir", "out"])
    assert any(f"--profile_steps {steps}" in problem for problem in check_values(args))


def test_it_needs_a_folder():
    problems = check_values(parse_args(["--model_name_or_path", "a", "--profile_steps", "3:4"]))
    assert any("--profile_steps needs --output_dir" in problem for problem in problems)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopA_NTN", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128>", "matrix products"),
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128>>", "attention"),
        ("void multi_tensor_apply_kernel<TensorListMetadata<4>, AdamFunctor<float>>", "optimizer"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "communication"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor>", "elementwise"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>", "norms"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("cudaLaunchKernel", OTHER),
    ],
)
def test_kinds_of_operators_and_kernels(name, kind):
    assert kind_of(name) == kind
