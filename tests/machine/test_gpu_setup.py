"""What is set for a CUDA device before its first use, tried with a device that says it is one."""

import os
import subprocess
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

import main
import utils.distributed.process_group as process_group
import utils.engine.device_settings as device_settings
import utils.engine.engine as engine_file
import utils.machine.compile_locks as compile_locks
import utils.machine.gpu_setup as gpu_setup
from utils.ds_utils import merge_config
from utils.errors import UserError
from utils.notation import Gpus

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def unset(monkeypatch, name: str) -> None:
    """Remove a variable until the test ends, also where the test sets it: set first, so that this is undone."""
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)


@pytest.fixture
def cuda(monkeypatch):
    """An accelerator that calls itself cuda, with 80 GB."""
    accelerator = SimpleNamespace(device_name=lambda index=None: "cuda", total_memory=lambda: 80e9)
    for module in (gpu_setup, compile_locks, device_settings):
        monkeypatch.setattr(module, "get_accelerator", lambda: accelerator)
    for name in (*gpu_setup.ALLOCATOR, "CPATH", "CUDA_PATH", "TORCH_EXTENSIONS_DIR"):
        unset(monkeypatch, name)


def test_segments_grow_where_rows_vary(cuda, monkeypatch):
    assert gpu_setup.let_segments_grow("max_length") is None and "PYTORCH_ALLOC_CONF" not in os.environ
    assert "expandable_segments:True" in gpu_setup.let_segments_grow("free")
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize("name", gpu_setup.ALLOCATOR)
def test_a_users_own_allocator_setting_stays(cuda, monkeypatch, name):
    monkeypatch.setenv(name, "backend:cudaMallocAsync")
    assert gpu_setup.let_segments_grow("free") == f"Device memory: {name}=backend:cudaMallocAsync, as set"
    assert [key for key in gpu_setup.ALLOCATOR if key in os.environ] == [name]


def test_nothing_is_set_on_a_cpu(monkeypatch):
    before = dict(os.environ)
    assert gpu_setup.let_segments_grow("free") is None and gpu_setup.find_cuda_headers() is None
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("dtype", "device", "used"), [("fp32", CUDA, True), ("bf16", CUDA, False), ("fp32", CPU, False)]
)
def test_tf32_is_for_fp32_on_a_gpu(dtype, device, used):
    assert gpu_setup.use_tf32(False, dtype, device) is None
    before = torch.get_float32_matmul_precision()
    try:
        line = gpu_setup.use_tf32(True, dtype, device)
        assert ("not used" in line) is not used
        assert torch.get_float32_matmul_precision() == ("high" if used else "highest")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("place", ["nvidia/cu13", "nvidia/cusparse"])
def test_pips_headers_are_found_where_the_toolkit_has_none(cuda, tmp_path, monkeypatch, place):
    toolkit = tmp_path / "toolkit"
    (toolkit / "include").mkdir(parents=True)
    headers = tmp_path / "site" / place / "include"
    headers.mkdir(parents=True)
    (headers / gpu_setup.HEADER).touch()
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setenv("CPATH", "/opt/own")
    found = SimpleNamespace(submodule_search_locations=[str(headers.parent)])

    def find_spec(name):
        if name.replace(".", "/") != place:
            raise ModuleNotFoundError(name)
        return found

    monkeypatch.setattr(gpu_setup.importlib.util, "find_spec", find_spec)
    assert str(headers) in gpu_setup.find_cuda_headers()
    assert os.environ["CPATH"].split(os.pathsep)[:2] == ["/opt/own", str(headers)]
    assert gpu_setup.find_cuda_headers() is None, "they are on CPATH now"
    (toolkit / "include" / gpu_setup.HEADER).touch()
    monkeypatch.delenv("CPATH")
    assert gpu_setup.find_cuda_headers() is None and "CPATH" not in os.environ


def test_the_line_that_names_the_error_is_shown(monkeypatch, capsys):
    output = "[1/3] nvcc -c a.cu\nIn file included from a.cu:1:\nb.h:5:10: fatal error: cusparse.h: No such file\nno"

    def build(*args, **options):
        raise RuntimeError(output)

    monkeypatch.setattr(engine_file, "FusedAdam", type("FusedAdam", (), {"__new__": build}))
    optimizer = engine_file.create_optimizer(torch.nn.Linear(2, 2), 1e-3)
    assert type(optimizer) is torch.optim.AdamW and not optimizer.defaults["fused"]
    printed = capsys.readouterr().out
    assert "Optimizer: torch AdamW, since FusedAdam can't be built here (b.h:5:10: fatal error: cusparse.h" in printed
    assert gpu_setup.first_error("a\n  b") == "a b"
    assert gpu_setup.first_error(str(subprocess.CalledProcessError(1, "ninja"))).startswith("Command 'ninja'")


def test_the_fall_back_is_fused_where_all_weights_are_on_a_gpu(monkeypatch, capsys):
    """Weights of shapes alone: no step is taken. With --offload the weights that AdamW gets are in CPU memory."""
    monkeypatch.setattr(engine_file, "FusedAdam", lambda *args, **options: (_ for _ in ()).throw(OSError("no nvcc")))
    monkeypatch.setattr(engine_file, "DeepSpeedCPUAdam", engine_file.FusedAdam)
    with FakeTensorMode():
        model = torch.nn.Module()
        model.weight = torch.nn.Parameter(torch.empty(2, 2, device="cuda"))
        fused = [engine_file.create_optimizer(model, 1e-3, offload=offload).defaults["fused"] for offload in (0, 1)]
        model.other = torch.nn.Parameter(torch.empty(2, device="cpu"))
        fused.append(engine_file.create_optimizer(model, 1e-3).defaults["fused"])
    assert fused == [True, None, None]
    lines = [line.split(", since")[0] for line in capsys.readouterr().out.splitlines() if "Optimizer" in line]
    assert lines == ["Optimizer: torch AdamW, fused", "Optimizer: torch AdamW", "Optimizer: torch AdamW"]


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_the_nccl_group_is_destroyed_where_a_run_succeeds(backend, monkeypatch):
    """A run that failed leaves it: its ranks may be stuck in a collective, where destroying the group would wait."""
    calls = []
    group = SimpleNamespace(
        is_initialized=lambda: True,
        get_backend=lambda: backend,
        destroy_process_group=lambda: calls.append("destroyed"),
    )
    monkeypatch.setattr(process_group, "dist", group)
    monkeypatch.setattr(main, "main", lambda args: calls.append("trained"))
    main.run(["--model_name_or_path", "a"])
    assert calls == ["trained", *["destroyed"] * (backend == "nccl")]
    calls.clear()
    monkeypatch.setattr(main, "main", lambda args: (_ for _ in ()).throw(UserError("wrong")))
    with pytest.raises(SystemExit):
        main.run(["--model_name_or_path", "a"])
    assert not calls


def test_kernels_of_a_gpu_have_a_folder_of_their_own(cuda, monkeypatch):
    on_gpu = compile_locks.extension_folder()
    unset(monkeypatch, "TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr(compile_locks, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cpu"))
    assert on_gpu.name == compile_locks.extension_folder().name + "-cuda"


def settings(**options):
    config = Namespace(**{"gpus": None, "device": CUDA, "offload": None, "zero_stage": 3, **options})
    return device_settings.zero_settings_of_device(config)


def test_limits_of_zero_3_grow_with_the_device(cuda, capsys):
    assert settings(device=CPU, offload="cpu") == {}
    assert settings() == {"stage3_max_live_parameters": 10**9, "stage3_prefetch_bucket_size": 5 * 10**7}
    assert "1000 million" in capsys.readouterr().out
    small = settings(gpus=Gpus(8, 16.0))
    assert small == {"stage3_max_live_parameters": 2 * 10**8, "stage3_prefetch_bucket_size": 3 * 10**7}
    assert settings(zero_stage=2) == {}


def test_offload_pins_memory(cuda, capsys):
    made = merge_config({"offload_optimizer": {"device": "cpu"}}, settings(zero_stage=2, offload="cpu"))
    assert made["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert "pinned" in capsys.readouterr().out
