"""fp16 without ZeRO, the default on a V100 or T4, against the float32 reference: the refusal on CPUs is patched."""

import json

import numpy as np
import pytest
from conftest import ROOT
from fork_runs import finished_run


def fp16_on_a_cpu(argv: list[str]) -> None:
    """main.py on a CPU that says it trains in fp16."""
    from deepspeed.accelerator import get_accelerator

    import main
    from utils import run_config

    type(get_accelerator()).is_fp16_supported = lambda self: True
    run_config.resolve_dtype = lambda requested: (requested, "patched")
    main.run(argv)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_losses_and_norms_are_the_references(accumulation, run_arguments, tmp_path):
    """Loss and gradient norm of every step; unscaled gradients gave norms of 4e-5 for 2.6."""
    wanted = json.loads((ROOT / "tests" / "references" / "tiny_opt.json").read_text())
    (tmp_path / "ds.json").write_text(json.dumps({"fp16": {"enabled": True, "initial_scale_power": 10}}))
    arguments = [argument.replace("fp32", "fp16") for argument in run_arguments]
    setting = ["--num_train_epochs", "2", "--learning_rate", "1e-3", "--output_dir", tmp_path / "out"]
    cut = ["--per_device_train_batch_size", 8 // accumulation, "--gradient_accumulation_steps", accumulation]
    config = ["--deepspeed_config", tmp_path / "ds.json"]
    printed = finished_run([*arguments, *setting, *cut, *config], program=fp16_on_a_cpu)
    assert "Precision: fp16" in printed and "ZeRO stage 0" in printed and "skipped" not in printed
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    losses = np.array([record["loss"] for record in steps]) - np.array(wanted["losses"])
    norms = np.array([record["grad_norm"] for record in steps]) / np.array(wanted["gradient_norms"]) - 1
    assert np.abs(losses).max() < 0.01, losses
    assert np.abs(norms).max() < 0.02, norms
