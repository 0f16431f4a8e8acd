"""Every message that docs/troubleshooting.md explains is one that the program prints."""

import json
import re
import shutil

import pytest
import torch
from conftest import ROOT, write_json_data
from safetensors.torch import load_file, save_file

from utils.distributed.failures import as_user_error

TEXT = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^### `(.+)`$", TEXT, re.MULTILINE)


def pattern_of(message: str) -> re.Pattern:
    """Return a pattern in which `…` matches what differs from case to case."""
    return re.compile(".+?".join(map(re.escape, message.split("…"))))


@pytest.fixture(scope="module")
def said(tiny_opt, json_data, tmp_path_factory) -> dict[str, list]:
    """Return the arguments that cause each message, by a word of it."""
    folder = tmp_path_factory.mktemp("troubles")
    (folder / "empty").mkdir()
    bare = folder / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(tiny_opt / name)
    pointer = folder / "pointer"
    pointer.mkdir()
    partial = folder / "partial"
    shutil.copytree(tiny_opt, partial)
    weights = load_file(partial / "model.safetensors")
    save_file(dict(list(weights.items())[1:]), partial / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(tiny_opt, pointer, dirs_exist_ok=True)
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    foreign = folder / "foreign"
    foreign.mkdir()
    (foreign / "README.md").write_text("mine")
    (folder / "ds.json").write_text('{"zero_optimisation": {"stage": 2}}')
    good = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(5)]
    dirty = write_json_data(folder, [*good, {"prompt": 7, "chosen": "yes", "rejected": "no"}], good)
    old = folder / "old" / "checkpoints" / "step-000004"
    old.mkdir(parents=True)
    state = {
        "step": 4, "epoch": 1, "units_done": 32, "scheduler_steps": 4, "evaluation_due": False, "best_loss": None,
        "best_step": 0, "evaluations_without_gain": 0, "metrics_bytes": 0,
    }  # fmt: skip
    marker = {"format": 1, "kind": "full", "state": state, "arguments": {"seed": 1}, "layout": {}, "files": {}}
    (old / "complete.json").write_text(json.dumps(marker))
    return {
        "positions": ["--max_seq_len", "9999"],
        "config.json": ["--model_name_or_path", folder / "empty"],
        "no tokenizer": ["--model_name_or_path", bare],
        "larger share": ["--data_split", "0,5,5"],
        "fp16": ["--dtype", "fp16"],
        "--lora_module_name": ["--lora_dim", "4", "--lora_module_name", "no_such_layer"],
        "record": ["--data_path", dirty],
        "earlier run": ["--output_dir", folder / "old"],
        "other arguments": ["--output_dir", folder / "old", "--resume_from_checkpoint"],
        "is damaged": ["--resume_from_checkpoint", folder / "empty"],
        "ranks": ["--sequence_parallel_size", "2"],
        "heads": ["--sequence_parallel_size", "8", "--dry_run", "8x80"],
        "tiled": ["--tiled_mlp"],
        "processes were started": None,
        "random weights": ["--model_name_or_path", partial],
        "git-lfs": ["--model_name_or_path", pointer],
        "base model": ["--output_dir", tiny_opt],
        "no run wrote": ["--output_dir", foreign],
        "deepspeed_config": ["--deepspeed_config", folder / "ds.json"],
    }


def test_every_message_has_its_advice():
    assert len(MESSAGES) >= 12 and len(set(MESSAGES)) == len(MESSAGES)
    parts = re.split(r"^### ", TEXT, flags=re.MULTILINE)[1:]
    assert all(len(part.split("\n\n", 1)[1].strip()) > 40 for part in parts)


IN_PROCESS = {
    "max_seq_len": "positions", "config.json": "config.json", "tokenizer in": "no tokenizer",
    "training rows": "larger share", "fp16 can't be trained": "fp16", "lora_module_name": "--lora_module_name",
    "record": "record",
    "earlier run": "earlier run", "other arguments": "other arguments", "no complete checkpoint": "is damaged",
    "random weights": "random weights", "git-lfs": "git-lfs", "folder of the base model": "base model",
    "no run of this program wrote": "no run wrote", "deepspeed_config": "deepspeed_config",
    "number of ranks": "ranks", "attention heads": "heads", "tiled_mlp": "tiled",
}  # fmt: skip


@pytest.mark.parametrize("message", MESSAGES)
def test_message(message, said, run_arguments, run_inside, monkeypatch):
    key = next((arguments for words, arguments in IN_PROCESS.items() if words in message), None)
    if key is not None:
        status, _, error = run_inside([*run_arguments, *said[key]])
        assert status == 2
    elif "ran out of memory" in message:
        error = str(as_user_error(torch.OutOfMemoryError("CUDA out of memory.")))
    elif "loss scale" in message:
        error = str(as_user_error(Exception("Current loss scale already at minimum - cannot decrease scale anymore.")))
    elif "not finite" in message:
        status, _, error = run_inside([*run_arguments, "--learning_rate", "1e30", "--max_bad_steps", "1"])
        assert status == 2
    else:
        assert "processes were started" in message, f"no case causes: {message}"
        monkeypatch.setenv("LOCAL_SIZE", "4096")
        status, _, error = run_inside(run_arguments)
        assert status == 2
    assert pattern_of(message).search(" ".join(error.split())), (message, error)
