"""`--dry_run`: the plan it prints, for this machine and for other GPUs."""

import os
import re
import shutil
import subprocess

import pytest
from conftest import ROOT

from utils.notation import Gpus, parse_gpus


@pytest.fixture(scope="module")
def without_weights(tiny_opt, tmp_path_factory):
    """A model folder with configuration and tokenizer alone."""
    folder = tmp_path_factory.mktemp("bare") / "model"
    shutil.copytree(tiny_opt, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def replaced(arguments: list, **changes) -> list:
    """The arguments with other values."""
    arguments = list(arguments)
    for name, value in changes.items():
        arguments[arguments.index(f"--{name}") + 1] = str(value)
    return arguments


def test_plan_of_this_machine(run_inside, run_arguments, tmp_path):
    further = ["--completion_only_loss", "--num_warmup_steps", "3", "--output_dir", tmp_path / "out", "--dry_run"]
    status, out, err = run_inside([*run_arguments, "--per_device_train_batch_size", "8", *further])
    assert status == 0, err
    assert '"max_seq_len": 64' in out and '"train_micro_batch_size_per_gpu": 8' in out
    order = ["Training data: ", "Plan: ", "Memory per device: ", "Time: ", "Arguments: {", "DeepSpeed configuration: {"]
    places = [re.search(rf"^{re.escape(begin)}", out, re.MULTILINE).start() for begin in order]
    assert places == sorted(places), "what a person wants comes first"
    samples, tokens = map(int, re.search(r"Training data: (\d+) samples, (\d+) tokens", out).groups())
    assert samples == 77
    bars = re.findall(r"^ +\d+ to \d+ +#* (\d+)$", out, re.MULTILINE)
    assert len(bars) == 8 and sum(map(int, bars)) == samples
    assert "--max_seq_len 64 cuts 1 samples (1.3%)" in out
    wasted = 1 - tokens / (samples * 64)
    assert f"Padding: {wasted:.1%} of all tokens with --padding max_length" in out
    assert "Plan: 10 optimizer steps" in out
    assert "3 warm-up steps (30.0%) to the peak rate 0.001" in out
    assert re.search(r"Assistant:⟦ [^⟦]*</s>⟧", out)
    assert re.search(r"most at once .* fits: ", out)
    assert re.search(r"Time: about .* tokens/s, from 3 steps", out)
    assert "loading weights" not in err.lower()
    assert not (tmp_path / "out").exists()


def test_every_token_but_the_first_is_a_label_without_completion_only(run_inside, run_arguments):
    status, out, err = run_inside([*run_arguments, "--packing", "--zero_stage", "3", "--dry_run"])
    assert status == 0, err
    assert re.search(r"^  </s>⟦ Human: .*</s>⟧$", out, re.MULTILINE)
    assert "Packing: 77 samples in" in out
    assert re.search(r"Time: about .* tokens/s", out)


def test_plan_for_other_gpus(run_inside, run_arguments, without_weights):
    arguments = replaced(run_arguments, model_name_or_path=without_weights, dtype="auto")
    status, out, err = run_inside([*arguments, "--zero_stage", "2", "--dry_run", "4x16"])
    assert status == 0, err
    assert "Precision: bf16 (taken to be what the planned GPUs have)" in out
    assert "x 1 accumulation x 4 rank(s)" in out
    assert "4 GPUs of 16 GB" in out
    # Two buckets of 5e8 elements in 16 bits, whatever the model.
    assert "buffers 2.0 GB" in out
    assert "Time: not measured, the plan is for other GPUs than this machine's" in out
    assert f"Weights: none in {without_weights}" in out


def test_a_model_that_does_not_fit(run_inside, run_arguments, without_weights):
    arguments = replaced(run_arguments, model_name_or_path=without_weights, dtype="auto")
    status, out, err = run_inside([*arguments, "--zero_stage", "2", "--dry_run", "4x2"])
    assert status == 0, err
    assert "DOES NOT FIT" in out
    assert "2: 2.0 GB (too much)" in out and "0: " in out


def test_a_run_still_needs_weights(run_inside, run_arguments, without_weights):
    status, _, err = run_inside(replaced(run_arguments, model_name_or_path=without_weights))
    assert status == 2
    assert "no weights" in err


def test_a_name_that_can_not_be_reached_is_an_error(run_inside, run_arguments):
    status, _, err = run_inside([*replaced(run_arguments, model_name_or_path="facebook/opt-66b"), "--dry_run", "64x80"])
    assert status == 2
    assert "no usable model configuration at facebook/opt-66b" in err and "Traceback" not in err


def test_gpus_in_words(run_inside, run_arguments):
    assert parse_gpus("64x80") == Gpus(64, 80.0)
    assert parse_gpus("1X22.5") == Gpus(1, 22.5)
    assert parse_gpus(None) is parse_gpus("here") is None
    status, _, err = run_inside([*run_arguments, "--dry_run", "64"])
    assert status == 2
    assert "--dry_run 64: write GPUs x gigabytes, as in 64x80" in err


def test_labels_are_green_in_a_terminal(tiny_opt, monkeypatch):
    import torch

    from utils.dry_run import dry_run
    from utils.model.tokenizer import load_hf_tokenizer

    tokenizer = load_hf_tokenizer(str(tiny_opt))
    ids = torch.tensor(tokenizer("Human: one Assistant:")["input_ids"])
    labels = ids.clone()
    labels[:3] = -100
    sample = [{"input_ids": ids, "labels": labels}]
    monkeypatch.setattr(dry_run.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = dry_run.first_sample(sample, tokenizer)
    assert shown.startswith("green") and shown.count("\033[32m") == shown.count("\033[0m") == 1
    assert shown.endswith(tokenizer.decode(ids[3:]) + "\033[0m")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦" in dry_run.first_sample(sample, tokenizer)


def test_a_rate_far_from_the_usual_one_is_said_as_in_a_run(run_inside, run_arguments, without_weights, tmp_path):
    from tools.memory_table import opt_config

    model = tmp_path / "opt"
    shutil.copytree(without_weights, model)
    opt_config("1.3b").save_pretrained(model)
    arguments = replaced(run_arguments, model_name_or_path=model)
    for rate, said in (("1e-3", 1), ("1e-5", 0)):
        status, out, err = run_inside([*arguments, "--learning_rate", rate, "--dry_run", "8x80"])
        assert status == 0, err
        assert (
            out.count("Learning rate: 0.001 is high for full training of 1.3 billion weights: 1e-05 is usual") == said
        )
        assert out.count("Learning rate:") == said


def test_66b_on_64_gpus(run_inside, run_arguments, without_weights, tmp_path):
    """The published shape with LoRA of rank 128, against sums done by hand."""
    from tools.memory_table import opt_config

    model = tmp_path / "opt66b"
    shutil.copytree(without_weights, model)
    opt_config("66b").save_pretrained(model)
    lora = [
        "--lora_dim",
        "128",
        "--lora_learning_rate",
        "0.05",
        "--gradient_checkpointing",
        "--zero_stage",
        "3",
        "--per_device_train_batch_size",
        "4",
    ]
    arguments = replaced(run_arguments, model_name_or_path=model, dtype="bf16")
    status, out, err = run_inside([*arguments, *lora, "--dry_run", "64x80"])
    assert status == 0, err
    parameters, trained = re.search(r"per device: ([\d,]+) parameters, ([\d,]+) of them train", out).groups()
    wrapped = 64 * 128 * (4 * 2 * 9216 + 2 * 5 * 9216)
    tables_and_vectors = (50272 + 2050) * 9216 + 64 * (9 * 9216 + 4 * 9216) + 2 * 9216
    assert int(trained.replace(",", "")) == wrapped + tables_and_vectors
    assert int(parameters.replace(",", "")) == wrapped + tables_and_vectors + 64 * 12 * 9216**2
    assert "Learning rate: --lora_learning_rate 0.05 is high" in out
    weights = 2 * int(parameters.replace(",", "")) / 64 / 1e9
    assert f"weights {weights:.1f} GB" in out
    assert "; fits: 73.6 GB each of 64 GPUs of 80 GB" in out


def test_script_for_66b_plans_without_a_host_file(tmp_path):
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\necho "plain $*"\n')
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}", "HOSTFILE": str(tmp_path / "nowhere")}
    done = subprocess.run(
        ["bash", ROOT / "training_scripts/multi_node/run_66b.sh", tmp_path / "out", "3", "--dry_run", "64x80"],
        capture_output=True, text=True, env=environment, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"plain {ROOT}/main.py --model_name_or_path facebook/opt-66b")
    assert done.stdout.rstrip().endswith("--dry_run 64x80")
