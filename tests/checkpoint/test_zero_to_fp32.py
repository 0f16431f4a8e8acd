"""DeepSpeed's script for checkpoints works on those of a run as its users expect."""

import subprocess
import sys

import pytest
import torch
from fork_runs import finished_run
from safetensors.torch import load_file


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_the_newest_checkpoint_as_float32(zero_stage, run_setting, tmp_path):
    saving = ["--max_steps", "2", "--save_steps", "1", "--zero_stage", zero_stage, "--output_dir", tmp_path]
    finished_run([*run_setting, *saving])
    checkpoints = tmp_path / "checkpoints"
    assert (checkpoints / "latest").read_text() == "step-000002"
    command = [sys.executable, checkpoints / "zero_to_fp32.py", checkpoints, tmp_path / "weights"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    written = torch.load(tmp_path / "weights" / "pytorch_model.bin", weights_only=True)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) <= set(written)
    assert all(torch.equal(written[name], tensor) for name, tensor in saved.items())
