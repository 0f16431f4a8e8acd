"""Compiled blocks train what plain ones do, over rows of one size."""

import re

import pytest
import torch
from fork_runs import finished_run, losses

from utils.data.batching.collate import IGNORE_INDEX, collate_filled, collate_free

COMMON = [
    "--torch_compile", "--max_steps", "4", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2",
    "--learning_rate", "1e-3", "--eval_steps", "2",
]  # fmt: skip


def count_graphs(argv: list[str]) -> None:
    """main.py that prints how many graphs were compiled."""
    from torch._dynamo.utils import counters

    import main

    main.run(argv)
    print("GRAPHS", counters["stats"]["unique_graphs"], "BREAKS", sum(counters["graph_break"].values()), flush=True)


@pytest.mark.parametrize(
    "layout", [["--packing"], ["--padding", "max_length", "--gradient_checkpointing", "--lora_dim", "2"]]
)
def test_the_same_losses(layout, run_arguments, tmp_path):
    """Evaluation and the rows that are not full go through the plain blocks, and compile nothing."""
    command = [*run_arguments, *COMMON, *layout]
    printed = finished_run([*command, "--output_dir", tmp_path / "compiled"], program=count_graphs)
    finished_run([*[word for word in command if word != "--torch_compile"], "--output_dir", tmp_path / "plain"])
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    tokens = "1 x 128" if "--packing" in layout else "2 x 64"
    assert f"Compiled: 2 blocks (OPTDecoderLayer), for training batches of {tokens} tokens" in printed
    graphs = int(re.search(r"GRAPHS (\d+)", printed)[1])
    assert 1 <= graphs <= 6, "one block's parts, forward alone: the second block and later rows use them again"


def test_rows_are_filled_up():
    samples = [{"input_ids": torch.arange(1, size), "labels": torch.arange(1, size)} for size in (4, 6)]
    free, filled = collate_free(samples), collate_filled(samples, 12)
    assert filled["input_ids"].shape == filled["position_ids"].shape == (1, 12)
    assert filled["document_lengths"] == [3, 5, 4] and filled["cu_seqlens"].tolist() == [0, 3, 8, 12]
    assert (filled["labels"][0, 8:] == IGNORE_INDEX).all()
    assert all(torch.equal(free[name], filled[name]) for name in ("positions", "targets"))
    assert collate_filled(samples, 8)["document_lengths"] == [3, 5], "a full row stays as it is"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--padding", "longest"], "--torch_compile needs training batches of one size"),
        (["--packing", "--zero_stage", "3"], "--torch_compile"),
        (["--packing", "--tiled_mlp"], "leave out --tiled_mlp"),
    ],
)
def test_what_can_not_be_compiled_is_refused(more, words, run_inside, run_arguments):
    status, _, error = run_inside([*run_arguments, "--torch_compile", *more])
    assert status == 2 and words in error
