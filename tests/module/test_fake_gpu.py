"""Every family's forward, loss and backward on a GPU of shapes alone: devices, waits, kernels and dtypes.

One process computes all cases and prints what it found; the tests read that.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from fake_gpu import Operations, compile_fake_device, move_to_gpu, on_fake_gpu
from fork_runs import finished_run
from packaging.version import Version

LENGTHS = (19, 11, 2)
TINY = ("deepseek_v3", "gemma4_text")  # values narrower than queries; layers with heads of two sizes
# With soft-capped scores (Gemma 2) or attention of its own (BLOOM) there is no kernel for documents.
WITH_KERNEL = ("opt", "gpt2", "gpt_neox", "llama", "qwen3", "mistral", *TINY)
CASES: dict[str, dict[str, Any]] = {
    "free": {},
    "longest": {"padding": "longest"},
    "LoRA, checkpointing": {"lora": True, "checkpointing": True},
}
OPT_CASES = {  # of one family, as nothing in them depends on it
    "fp16": {"dtype": "float16"},
    "fp32": {"dtype": "float32"},
    "fp16, Volta": {"dtype": "float16", "capability": (7, 0)},
    "LoRA": {"lora": True},
    "longest, checkpointing": {"padding": "longest", "checkpointing": True},
}


# Before 5.21 transformers makes the zero of a mask of scores (`eager_mask`) on the host and copies it, once in a
# forward. Of the families here BLOOM alone has such a mask; its one wait is left, as a newer version has none.
ZEROS_OF_MASKS = 1 if Version(transformers.__version__) < Version("5.21") else 0


class Engine:
    """Stands in for DeepSpeed's engine, whose start reads values: the forward and backward of the bare model."""

    def __init__(self, model: Any) -> None:
        self.model, self.optimizer, self.stepped = model, None, False

    def __call__(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        pass

    def zero_optimization(self) -> bool:
        return False

    def backward(self, loss: Any) -> None:
        loss.backward()

    def step(self) -> None:
        self.stepped = True


def build(family: str, dtype: str, padding: str, lora: bool, checkpointing: bool) -> Any:
    """Make the family's model as a run does: on the CPU, then moved; with its own dropout."""
    import torch
    from model.test_families import CONFIGS
    from transformers import AutoModelForCausalLM

    from tools.tiny_families import tiny_config
    from utils.model.model_utils import enable_checkpointing
    from utils.module.attention import use_document_attention
    from utils.module.fused_loss import can_fuse, install_loss
    from utils.module.lora import (
        convert_linear_layer_to_lora,
        make_model_gradient_checkpointing_compatible,
        only_optimize_lora_parameters,
    )

    config = tiny_config(family) if family in TINY else CONFIGS[family]
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    if lora:
        convert_linear_layer_to_lora(model, "auto", 4)
        only_optimize_lora_parameters(model)
    if checkpointing:
        make_model_gradient_checkpointing_compatible(model)
        enable_checkpointing(model, offload=False)
    move_to_gpu(model).train()
    if padding == "free":
        use_document_attention(model)
    install_loss(model, can_fuse(model))
    return model


def one_step(
    mode: Any, family: str, padding: str = "free", dtype: str = "bfloat16", lora: bool = False,
    checkpointing: bool = False, capability: tuple[int, int] = (9, 0),
) -> dict:  # fmt: skip
    """Run a micro step of a row or batch of documents; return its operations and where its results are."""
    import torch

    from utils.data.batching.batches import TrainBatch, collate_for
    from utils.train.step import micro_step

    torch.cuda.get_device_capability = lambda device=None: capability
    model = build(family, dtype, padding, lora, checkpointing)
    engine = Engine(model)
    with torch.utils._python_dispatch._disable_current_modes():
        batch = collate_for(padding, 1, 64)(
            [{"input_ids": torch.full((n,), 5), "labels": torch.full((n,), 5)} for n in LENGTHS]
        )
    batch = {key: mode.from_tensor(value) if torch.is_tensor(value) else value for key, value in batch.items()}
    tensors = sum(torch.is_tensor(value) for value in batch.values())
    with Operations() as operations:
        loss = micro_step(engine, TrainBatch(batch, 1.0, True, None), "cuda")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = operations.count
    return {
        "loss": [str(loss.device), str(loss.dtype)],
        "gradients": sorted({f"{p.grad.device} {p.grad.dtype}" if p.grad is not None else "none" for p in trained}),
        "layers": model.config.get_text_config().num_hidden_layers,
        "stepped": engine.stepped,
        "copies": [count["copy_to_cuda"] - tensors, count["copy_to_cpu"]],
        "kernels": {name: number for name, number in count.items() if "attention" in name or "varlen" in name},
    }


def figures_of_steps() -> dict[str, Any]:
    """Note two steps and send their figures to the host, as a run does after a step; return how often values moved."""
    import torch

    from utils.distributed.ranks import sum_on_device
    from utils.machine.later import OnItsWay
    from utils.module.fused_loss import BatchFigures
    from utils.train.step_losses import StepLosses

    loss, hits = torch.ones((), device="cuda"), torch.ones((), dtype=torch.int64, device="cuda")
    experts = torch.ones(3, 4, device="cuda")
    with Operations() as operations:
        losses = StepLosses(torch.device("cuda"))
        for _ in range(2):
            losses.add(loss, True, BatchFigures(hits, loss, experts), labels=7)
            losses.finish_step(7)
        losses.begin_collecting()
        losses.begin_collecting_load()
        OnItsWay([sum_on_device(5, "cuda")])
    return {"copies": [operations.count["copy_to_cuda"], operations.count["copy_to_cpu"]]}


def all_steps(argv: list[str]) -> None:
    """Print the result of every family and case; an error is a result."""
    import torch
    from model.test_families import CONFIGS

    from utils.module import row_kernels

    row_kernels.find_fault = lambda *args: None  # it compares values
    torch.rand = lambda size: 1.0  # with transformers 5.17 OPT's layer drop draws a number, on the host
    with on_fake_gpu(Path(argv[0])) as mode:
        for family in (*CONFIGS, *TINY):
            for case, settings in (CASES | OPT_CASES if family == "opt" else CASES).items():
                if family == "bloom" and settings.get("padding") != "longest":
                    continue
                try:
                    found = one_step(mode, family, **settings)
                except Exception as err:
                    found = {"error": f"{type(err).__name__}: {err}"}
                print("FOUND " + json.dumps([family, case, found]), flush=True)
        print("FIGURES " + json.dumps(figures_of_steps()), flush=True)
        value = torch.ones(2, device="cuda")
        for fault in (value.sum().item, value.nonzero, lambda: value + torch.ones(2), lambda: value.to("cpu").tolist()):
            try:
                fault()
                print("UNNOTICED")
            except Exception:
                print("NOTICED")


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> str:
    return finished_run([compile_fake_device(tmp_path_factory.mktemp("fake_gpu"))], program=all_steps)


@pytest.fixture(scope="module")
def found(printed) -> dict[str, dict[str, dict]]:
    """By case and family, what `one_step` returned."""
    lines = [json.loads(line[6:]) for line in printed.splitlines() if line.startswith("FOUND ")]
    cases: dict[str, dict[str, dict]] = {case: {} for case in CASES | OPT_CASES}
    for family, case, result in lines:
        cases[case][family] = result
    return cases


@pytest.mark.parametrize("case", CASES | OPT_CASES)
def test_every_family_stays_on_the_gpu_without_a_wait(case, found):
    settings = {**CASES, **OPT_CASES}[case]
    assert len(found[case]) == (1 if case in OPT_CASES else 10 if case == "longest" else 9)
    for family, result in found[case].items():
        assert "error" not in result, (family, result)
        assert result["loss"] == ["cuda:0", "torch.float32"], family
        assert result["gradients"] == [f"cuda:0 torch.{settings.get('dtype', 'bfloat16')}"], family
        expected = [ZEROS_OF_MASKS if family == "bloom" else 0, 0]
        assert result["stepped"] and result["copies"] == expected, (family, "the batch is all that is copied")


@pytest.mark.parametrize("case", [case for case in CASES | OPT_CASES if "longest" not in case])
def test_documents_go_through_the_kernel(case, found):
    """Forward and backward of every layer; checkpointing computes the forward twice."""
    for family, result in found[case].items():
        layers = result["layers"]
        forwards = layers * 2 if "checkpointing" in case else layers
        name = "efficient" if case in ("fp32", "fp16, Volta") else "flash"
        # Flash attention has heads of at most 256: those of the second layer have 512.
        names = ("flash", "efficient") if family == "gemma4_text" else (name,)
        expected = {f"_{one}_attention_forward": forwards // len(names) for one in names}
        expected |= {f"_{one}_attention_backward": layers // len(names) for one in names}
        assert result["kernels"] == (expected if family in WITH_KERNEL else {}), family


def test_figures_of_steps_are_sent_without_a_wait(printed):
    """Losses, hits, router losses, the load of experts and the padding, each once however many steps there are."""
    (line,) = [line for line in printed.splitlines() if line.startswith("FIGURES ")]
    assert json.loads(line[8:]) == {"copies": [0, 5]}


def test_the_fake_gpu_notices_waits_and_wrong_devices(printed):
    assert printed.count("\nNOTICED") == 4 and "UNNOTICED" not in printed
