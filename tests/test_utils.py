"""What every run leans on: perplexity, the optimizer's fall-back, launchers, records, and a quiet start."""

import json
import math
import platform
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, launch, make_json_data, write_json_data
from transformers import AutoModelForCausalLM

from utils.data.batching.batches import eval_batches
from utils.data.batching.collate import collate_padded
from utils.data.data_utils import create_prompt_dataset
from utils.distributed.ranks import get_all_reduce_mean, print_rank_0
from utils.engine.engine import create_optimizer
from utils.logging.loss_curve import draw_losses
from utils.logging.metrics_file import MetricsFile, read_metrics
from utils.machine.device import set_random_seed, to_device
from utils.machine.precision import cpu_has_bf16
from utils.model.tokenizer import load_hf_tokenizer
from utils.module.fused_loss import install_loss
from utils.run_config import BatchCut
from utils.train.perplexity import evaluate
from utils.train.step_losses import StepLosses

CPU = torch.device("cpu")


@pytest.fixture
def data_set(tiny_opt, json_data, cache_folder):
    """(tokenizer, evaluation data) of the small json data."""
    tokenizer = load_hf_tokenizer(str(tiny_opt))
    return tokenizer, create_prompt_dataset(
        0, [str(json_data)], "10,0,0", str(cache_folder), 1, 1234, tokenizer, 64, "</s>"
    )[1]  # fmt: skip


# ------------------------------------------------------------------------------------------ perplexity


def test_perplexity_is_the_same_for_any_batch_size(tiny_opt, data_set):
    """And it is the sum over all tokens by their number, counted here one sample at a time without padding."""
    tokenizer, evaluation = data_set
    model = AutoModelForCausalLM.from_pretrained(tiny_opt, dtype=torch.float32).train()
    install_loss(model, fused=False)
    collate = partial(collate_padded, pad_token_id=tokenizer.pad_token_id)
    found = [
        evaluate(model, eval_batches(evaluation, collate, BatchCut(size)), CPU)[1]
        for size in (1, 2, 7, 16, len(evaluation))
    ]
    assert model.training, "left as it was found"
    total, labels = 0.0, 0
    model.eval()
    for i in range(len(evaluation)):
        ids = evaluation[i]["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
        labels += len(ids) - 1
    assert found == pytest.approx([total / labels] * 5, rel=1e-5)
    # Batches of unequal length: a mean of their means is another number.
    means = [evaluate(model, [batch], CPU)[1] for batch in eval_batches(evaluation, collate, BatchCut(7))]
    assert sum(means) / len(means) != pytest.approx(total / labels, rel=1e-4)


def test_what_stands_in_for_a_missing_batch_weighs_nothing(tiny_opt, data_set):
    tokenizer, evaluation = data_set
    model = AutoModelForCausalLM.from_pretrained(tiny_opt, dtype=torch.float32)
    install_loss(model, fused=False)
    collate = partial(collate_padded, pad_token_id=tokenizer.pad_token_id)
    batches = list(eval_batches(evaluation, collate, BatchCut(8)))
    dummy = batches[0]._replace(counts=False)
    assert evaluate(model, [*batches, dummy], CPU) == evaluate(model, batches, CPU)
    # Two ranks, an odd number of samples: as many forwards on both, each sample on one of them.
    parts = [list(eval_batches(evaluation, collate, BatchCut(4, ranks=2, rank=rank))) for rank in range(2)]
    assert len(parts[0]) == len(parts[1])
    counted = sum(len(batch["input_ids"]) for part in parts for batch, counts, _ in part if counts)
    assert counted == len(evaluation)


def test_an_empty_evaluation_set_is_said(tiny_opt, run_inside, tmp_path):
    """Phase 1's share of four evaluation rows is none: no perplexity, but a trained and saved model."""
    rows = [{"prompt": f"q {i}", "chosen": f"a {i}"} for i in range(40)]
    data = write_json_data(tmp_path, rows, rows[:4])
    status, out, err = run_inside(
        [
            "--model_name_or_path", tiny_opt, "--data_path", data, "--data_split", "1,9,0", "--data_output_path",
            tmp_path / "cache", "--max_seq_len", "32", "--dtype", "fp32", "--output_dir", tmp_path / "out",
        ]
    )  # fmt: skip
    assert status == 0, out + err
    assert out.count("no evaluation data: no perplexity") == 2 and "nan" not in out.lower()
    assert "Data eval: 0 samples" in out and "verified" in out
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [record["perplexity"] for record in records if "perplexity" in record] == [None, None]


# ------------------------------------------------------------------------------------------- optimizer


def trainable() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))


@pytest.mark.parametrize("offload", [False, True])
def test_torch_adamw_where_the_kernel_cannot_be_built(offload, monkeypatch, capsys):
    from deepspeed.ops.op_builder.builder import OpBuilder

    def fails(*args, **kwargs):
        raise RuntimeError("no compiler on this machine")

    monkeypatch.setattr(OpBuilder, "load", fails)
    model = trainable()
    optimizer = create_optimizer(model, 1e-2, 0.1, 1e-3, offload)
    assert type(optimizer) is torch.optim.AdamW
    line = capsys.readouterr().out
    kernel = "DeepSpeedCPUAdam" if offload else "FusedAdam"
    assert line.startswith(f"Optimizer: torch AdamW, since {kernel} can't be built here (") and line.count("\n") == 1
    assert [(group["lr"], group["betas"]) for group in optimizer.param_groups] == [(1e-2, (0.9, 0.95))] * 2
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    # It is AdamW by its published steps: one on a matrix, from scratch.
    weight = model[0].weight
    before = weight.detach().clone()
    weight.grad = torch.full_like(weight, 0.5)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before * (1 - 1e-2 * 0.1) - 1e-2, rtol=1e-4, atol=1e-6)


def test_a_whole_run_with_the_fall_back(tiny_opt, run_inside, monkeypatch, tmp_path):
    from deepspeed.ops.op_builder.builder import OpBuilder

    monkeypatch.setattr(OpBuilder, "load", lambda *args, **kwargs: (_ for _ in ()).throw(ImportError("no nvcc")))
    data = make_json_data(tmp_path, 12, 3)
    status, out, err = run_inside(
        [
            "--model_name_or_path", tiny_opt, "--data_path", data, "--data_split", "10,0,0", "--data_output_path",
            tmp_path / "cache", "--max_seq_len", "48", "--dtype", "fp32", "--per_device_train_batch_size", "4",
            "--zero_stage", "2",
        ]
    )  # fmt: skip
    assert status == 0, out + err
    assert re.search(r"Optimizer: torch AdamW, since FusedAdam can't be built here \(no nvcc\)", out)
    losses = [float(loss) for loss in re.findall(r"^ppl: \S+, loss: (\S+)$", out, re.MULTILINE)]
    assert losses[1] < losses[0]


# -------------------------------------------------------------------------------------------- launchers


def test_torchrun(run_arguments, tmp_path):
    """Two ranks under torchrun: one voice, every rank its own samples, a folder that loads. And a quiet start."""
    run = launch(
        [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"],
        [*run_arguments, "--per_device_train_batch_size", "8", "--output_dir", tmp_path],
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 rank(s)" in run.stdout and run.stdout.count("***** Running training *****") == 1
    assert "steps of 8 x 1 accumulation x 2 rank(s)" in run.stdout
    for rank in range(2):
        assert run.stdout.count(f"Rank: {rank}, loss = ") == math.ceil(77 / 16)
    assert run.stdout.count("loss = ") == 2 * math.ceil(77 / 16)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = [line for line in (run.stdout + run.stderr).splitlines() if re.search("warn", line, re.IGNORECASE)]
    assert not [line for line in ours if "compression" in line or "from_tf" in line or str(ROOT / "utils") in line]


def test_a_start_without_what_was_abandoned():
    """`deepspeed.compression` warns when imported and `from_tf` is ignored in silence: neither is there."""
    code = "import sys, main, prompt_eval; print('LOADED', [m for m in sys.modules if 'deepspeed.compression.h' in m])"
    run = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:utils", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    assert "LOADED []" in run.stdout
    sources = [*ROOT.glob("*.py"), *(ROOT / "utils").rglob("*.py")]
    assert len(sources) > 20
    assert not [
        file for file in sources if re.search(r"from_tf\s*=|deepspeed\.compression", file.read_text(encoding="utf-8"))
    ]


# ------------------------------------------------------------------------------------------ small things


def test_step_losses_are_means_over_label_tokens():
    losses = StepLosses(CPU)
    losses.add(torch.tensor(6.0), True)
    losses.add(torch.tensor(4.0), True)
    losses.add(torch.tensor(99.0), False)  # a dummy batch
    losses.finish_step(5)
    losses.add(torch.tensor(3.0), True)
    losses.finish_step(2)
    assert [step["loss"] for step in losses.collect()] == [2.0, 1.5] and losses.collect() == []


def test_metrics_are_json_whatever_happens(tmp_path):
    metrics = MetricsFile(str(tmp_path), True)
    metrics.write(epoch=0, step=0, eval_loss=math.nan, perplexity=math.inf)
    metrics.write(epoch=1, step=1, loss=2.5, learning_rate=0.1)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert read_metrics(str(tmp_path))[0] == {"epoch": 0, "step": 0, "eval_loss": None, "perplexity": None}
    assert Path(draw_losses(str(tmp_path))).stat().st_size > 5000
    MetricsFile(str(tmp_path / "other"), False).write(step=1)
    MetricsFile(None, True).write(step=1)
    assert not (tmp_path / "other").exists()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_used_again():
    """256 MB are 65,536 pages, each with its fault where the C library gives back what was freed."""
    code = """
import resource, torch
from utils.machine.cpu_allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**22) for _ in range(16)]
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print(*[faults() for _ in range(10)])
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    found = list(map(int, ended.stdout.split()[-10:]))
    assert max(found[-5:]) < 6500 < found[0], found


@pytest.mark.skipif(not cpu_has_bf16(), reason="this processor has no bf16 instructions, and smaller kernels")
def test_kernels_of_past_shapes_are_dropped():
    """300 products, each of a shape of its own: about 0.6 MB a shape where all their kernels are kept."""
    code = """
import sys, torch
from utils.machine.cpu_allocator import limit_kernel_caches

def megabytes():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024

if sys.argv[1] == "limited":
    limit_kernel_caches()
weight, tokens = torch.ones(64, 64, dtype=torch.bfloat16), torch.ones(400, 64, dtype=torch.bfloat16)
torch.mm(tokens, weight)
before = megabytes()
for rows in range(50, 350):
    torch.mm(tokens[:rows], weight)
print(megabytes() - before)
"""
    grown = {}
    for caches in ("limited", "whole"):
        command = [sys.executable, "-c", code, caches]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr
        grown[caches] = float(ended.stdout.split()[-1])
    assert grown["limited"] < grown["whole"] / 3, grown


def test_helpers_by_the_users_names(capsys):
    print_rank_0("all")
    print_rank_0("zero", 0)
    print_rank_0("plain start", -1)
    assert capsys.readouterr().out.split("\n") == ["all", "zero", "plain start", ""]
    moved = to_device({"ids": torch.ones(2), "text": "kept"}, "meta")
    assert moved["ids"].device.type == "meta" and moved["text"] == "kept"
    draws = []
    for _ in range(2):
        set_random_seed(11)
        draws.append((torch.rand(2).tolist(), random.random(), np.random.rand()))
    assert draws[0] == draws[1]
    tensor = torch.tensor([1.0, 3.0])
    assert get_all_reduce_mean(tensor).tolist() == [1.0, 3.0]
