"""The step in 16 bits without ZeRO goes over pieces of the weights, and does what DeepSpeed's does."""

import json
from types import SimpleNamespace

import pytest
import torch
from deepspeed.ops.adam import FusedAdam
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from fork_runs import finished_run, losses
from safetensors.torch import load_file

from utils.engine.sweep_step import cut, gradient_norm, sweep_in_steps
from utils.logging.metrics_file import curve, read_metrics


def with_own_step(argv: list[str]) -> None:
    """main.py in pieces of a thousand elements; with `--deepspeed` first, in DeepSpeed's own way."""
    import main
    import utils.engine.engine as engine_file
    import utils.engine.sweep_step as sweep

    sweep.PIECE["cpu"] = 1000
    found = []
    engine_file.sweep_in_steps = (
        (lambda engine: None)
        if argv[0] == "--deepspeed"
        else (lambda engine: found.append(sweep.sweep_in_steps(engine)))
    )
    main.run(argv[1:])
    print("SWEEPS", found, flush=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_weights_as_by_deepspeed(ranks, run_arguments, tmp_path):
    """Bit for bit where no step is clipped; LoRA's weights and those without decay are groups of their own."""
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"gradient_clipping": 1e9}))
    common = [argument.replace("fp32", "bf16") for argument in run_arguments]
    common += ["--lora_dim", "4", "--weight_decay", "0.1", "--learning_rate", "1e-3", "--deepspeed_config", file]
    common += ["--per_device_train_batch_size", "8"]
    printed = {
        flag: finished_run([flag, *common, "--output_dir", tmp_path / flag], ranks, program=with_own_step)
        for flag in ("--deepspeed", "--sweep")
    }
    assert "SWEEPS [True]" in printed["--sweep"] and "SWEEPS []" in printed["--deepspeed"]
    theirs, ours = (load_file(tmp_path / flag / "model.safetensors") for flag in printed)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert losses(tmp_path / "--sweep") == losses(tmp_path / "--deepspeed")
    theirs, ours = (curve(read_metrics(str(tmp_path / flag)), "grad_norm") for flag in printed)
    assert [norm for _, norm in ours] == pytest.approx([norm for _, norm in theirs], rel=1e-5) and len(ours) > 4


def test_clipped_steps():
    """Against DeepSpeed's own step, over gradients of all sizes and a weight that has none."""

    def wrapped():
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(30, 30) for _ in range(4))).bfloat16()
        groups = [{"params": [one for one in model.parameters() if (one.dim() > 1) is two]} for two in (True, False)]
        inner = FusedAdam(groups, lr=1e-2, weight_decay=0.1)
        return model, FP16_Optimizer(inner, low_precision_dtype=torch.bfloat16, clip_grad=1.0)

    (theirs, reference), (ours, optimizer) = wrapped(), wrapped()
    assert sweep_in_steps(SimpleNamespace(optimizer=optimizer, device=torch.device("cpu")))
    for size in (1e-3, 1.0, 30.0, float("inf"), 1e-2):
        for one, two in zip(theirs.parameters(), ours.parameters(), strict=True):
            one.grad = torch.randn_like(one) * size
            two.grad = one.grad.clone()
        theirs[1].bias.grad = ours[1].bias.grad = None
        skipped = reference.step(), optimizer.step()
        assert skipped == (size == float("inf"),) * 2
        assert float(optimizer._global_grad_norm) == pytest.approx(float(reference._global_grad_norm), rel=1e-6)
        assert all(one.grad is None for one in ours.parameters())
    for one, two in zip(reference.fp32_groups_flat, optimizer.fp32_groups_flat, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(one, two) for one, two in zip(theirs.parameters(), ours.parameters(), strict=True))


def test_pieces_cover_every_parameter_once():
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((7,), (3, 5), (), (40,))]
    groups = [parameters[:2], [], parameters[2:]]
    pieces = list(cut(groups, 10))
    assert [(one.group, one.begin, one.end) for one in pieces] == [
        (0, 0, 10), (0, 10, 20), (0, 20, 22), (2, 0, 10), (2, 10, 20), (2, 20, 30), (2, 30, 40), (2, 40, 41),
    ]  # fmt: skip
    for number, group in enumerate(groups):
        flat = torch.cat([one.detach().reshape(-1) for one in group]) if group else torch.empty(0)
        again = [
            (one.begin + place, parameter.detach().reshape(-1)[begin:end])
            for one in pieces if one.group == number
            for parameter, begin, end, place in one.segments
        ]  # fmt: skip
        assert all(torch.equal(flat[start : start + len(part)], part) for start, part in again)
        assert sum(len(part) for _, part in again) == len(flat)


def test_the_norm_is_that_of_all_gradients():
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in ((300,), (20, 50), (4,))]
    for one in parameters[:2]:
        one.grad = torch.randn_like(one)
    pieces, buffer = list(cut([parameters], 128)), torch.empty(128)
    whole = torch.cat([one.grad.double().reshape(-1) for one in parameters[:2]]).norm().item()
    # The way of a GPU, whose kernels compute on a CPU too, reads all gradients at once.
    buffers = buffer, SimpleNamespace(device=torch.device("cuda"))
    for one in buffers:
        assert gradient_norm(pieces, one) == pytest.approx(whole, rel=1e-6)
    parameters[1].grad[3, 3] = float("nan")
    assert not any(gradient_norm(pieces, one) < float("inf") for one in buffers)
    for one in parameters:
        one.grad = None
    assert [gradient_norm(pieces, one) for one in buffers] == [0, 0]
