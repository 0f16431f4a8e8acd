"""Models larger than memory: shards of bounded size, ZeRO 3 in mid-flight, swap files, ZeRO++, and their refusals."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_json_data, make_tiny_opt, tiny_setting
from filelock import FileLock
from fork_runs import finished_run, losses
from transformers import AutoModelForCausalLM

from utils.arguments.parser import parse_args
from utils.arguments.preflight import check_scale
from utils.arguments.values import check_values
from utils.dry_run.zero_memory import Setting, Sizes, estimate, setting_from_config
from utils.ds_file.read import merged_zero
from utils.ds_utils import scale_settings
from utils.engine.nvme_swap import check_swap_folder, open_swap_folder, remove_swap_folders
from utils.errors import UserError
from utils.machine.compile_locks import extension_folder
from utils.model.model_utils import size_swap_buffers
from utils.notation import parse_size
from utils.run_config import RunConfig

needs_async_io = pytest.mark.skipif(
    not (extension_folder() / "async_io" / "async_io.so").exists(),
    reason="DeepSpeed's async_io is not compiled yet (minutes): a run with --offload nvme does it, given libaio-dev",
)
NVME = ["--offload", "nvme", "--nvme_path", "/tmp", "--zero_stage", "3"]
LORA = ["--lora_dim", "4"]


def config_of(*more: str) -> RunConfig:
    return RunConfig.resolve(arguments(*more), torch.device("cpu"))


def arguments(*more: str):
    return parse_args(["--model_name_or_path", "somewhere", *more])


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("200MB", 2 * 10**8), ("1.5 kb", 1500), ("1TB", 10**12)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "-1GB", "0MB", "5GiB", "1e3MB", "0.0001KB"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match="as in 5GB or 200MB"):
        parse_size(text)
    assert any("--max_shard_size" in problem for problem in check_values(arguments(f"--max_shard_size={text}")))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--offload", "nvme", "--zero_stage", "3"], "--offload nvme needs --nvme_path"),
        (["--offload", "nvme", "--nvme_path", "/tmp", "--zero_stage", "2"], "needs --zero_stage 3, not 2"),
        (["--nvme_path", "/tmp"], "--nvme_path is for --offload nvme"),
        (["--nvme_path", "/tmp", "--offload"], "--nvme_path is for --offload nvme"),
        ([*NVME, "--save_steps", "5", "--output_dir", "o"], "Give --save_only_model"),
        ([*NVME, "--resume_from_checkpoint", "c"], "can't be used with --offload nvme"),
        ([*NVME, "--zero_hpz_partition_size", "2"], "give one of them"),
        (["--zero_hpz_partition_size", "2"], "--zero_hpz_partition_size needs --zero_stage 3"),
        (["--zero_hpz_partition_size", "0"], "--zero_hpz_partition_size must be at least 1"),
        (["--enable_mixed_precision_lora", "--zero_stage", "3"], "--lora_dim above 0"),
        (["--enable_mixed_precision_lora", *LORA], "needs --zero_stage 3"),
    ],
)  # fmt: skip
def test_values_that_contradict_each_other(given, words):
    problems = check_values(arguments(*given))
    assert len(problems) == 1 and words in problems[0]


def test_good_values():
    assert check_values(arguments(*NVME)) == []
    assert check_values(arguments(*NVME, "--save_steps", "5", "--save_only_model", "--output_dir", "o")) == []
    assert arguments("--offload").offload == "cpu" and arguments().offload is None


def test_what_this_machine_cannot_do(monkeypatch, tmp_path):
    eight_bits = ["--enable_mixed_precision_lora", "--zero_stage", "3", *LORA]

    def problems_of(*given, ranks=1, is_plan=False, dtype="bf16"):
        args = arguments(*given)
        return check_scale(args, ranks, is_plan, merged_zero(args, {}), dtype)

    problems = problems_of(*eight_bits)
    assert len(problems) == 2 and "needs --dtype fp16, not bf16" in problems[0] and "CUDA" in problems[1]
    assert problems_of(*eight_bits, ranks=8, is_plan=True, dtype="fp16") == []
    wrong = ("--zero_stage", "3", "--zero_hpz_partition_size", "2")
    assert "does not divide 3 rank(s)" in problems_of(*wrong, ranks=3)[0] and problems_of(*wrong, ranks=4) == []
    monkeypatch.setattr("deepspeed.ops.op_builder.cpu.async_io.AsyncIOBuilder.is_compatible", lambda *_, **__: False)
    assert "libaio-dev (apt)" in problems_of(*NVME)[0]
    with pytest.raises(UserError, match="can't hold swap files"):
        check_swap_folder("/proc/swap")


def test_settings_of_the_configuration(tmp_path):
    settings = scale_settings(config_of("--offload", "nvme", "--nvme_path", str(tmp_path), "--dry_run", "8x80"))
    assert settings["offload_param"]["device"] == settings["offload_optimizer"]["device"] == "nvme"
    assert not list(tmp_path.iterdir())  # a plan writes nothing
    config = {"zero_optimization": {"stage": 3, **settings}}
    size_swap_buffers(config, 1_000_001, 4)
    assert 250_001 <= config["zero_optimization"]["offload_param"]["buffer_size"] < 251_000
    plan = {"zero_hpz_partition_size": 8, "zero_quantized_nontrainable_weights": True}
    assert scale_settings(config_of("--zero_hpz_partition_size", "8", "--enable_mixed_precision_lora")) == plan
    # What the estimate reads of it: files in place of memory.
    sizes = Sizes(13_000_000_000, 13_000_000_000, 250_000_000, 0, 0, 0, 0)
    swapped = setting_from_config(config, 8, 2, on_cpu=False)
    in_memory = estimate(sizes, Setting(3, 8, True, 2))
    assert swapped.nvme and estimate(sizes, swapped).host < in_memory.host / 2
    assert estimate(sizes, swapped).peak == in_memory.peak  # the GPU holds what it did


def test_swap_folders_of_killed_runs_are_removed(tmp_path):
    """Made by a process that is killed; another's, whose lock is held, stays."""
    alive = FileLock(tmp_path / "swap-other-1.lock")
    with alive:
        (tmp_path / "swap-other-1").mkdir()
        code = f"from utils.engine.nvme_swap import open_swap_folder; open_swap_folder({str(tmp_path)!r}); import os; "
        code += "os.kill(os.getpid(), 9)"
        killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
        assert killed.returncode == -signal.SIGKILL and len(list(tmp_path.glob("swap-*"))) == 4
        own = open_swap_folder(str(tmp_path))
        assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"swap-other-1", os.path.basename(own)}
        remove_swap_folders()
        assert {path.name for path in tmp_path.iterdir()} == {"swap-other-1", "swap-other-1.lock"}


# ------------------------------------------------------------------------------------------- real runs


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> tuple[list[str], Path]:
    """(arguments of a run of four steps at ZeRO 3, its model): matrices of a megabyte, which are worth a swap file."""
    folder = tmp_path_factory.mktemp("wide")
    model = make_tiny_opt(
        folder / "model", hidden_size=512, word_embed_proj_dim=512, ffn_dim=1024, tie_word_embeddings=False
    )
    data = make_json_data(folder / "data", train=8, evaluation=2)
    setting = tiny_setting(model, data, folder / "cache")
    more = ["--zero_stage", "3", "--disable_dropout", "--max_steps", "4", "--per_device_train_batch_size", "2"]
    return [*setting, *more], model


@pytest.fixture(scope="module")
def undisturbed(wide, tmp_path_factory) -> dict[int, float]:
    """Losses of that run with nothing offloaded, on one rank."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finished_run([*wide[0], "--output_dir", folder])
    return losses(folder)


def test_saving_while_weights_are_being_fetched(wide, undisturbed, tmp_path):
    """After an evaluation ZeRO 3 fetches ahead for a backward that never comes: a large model could not be saved."""
    eager = {
        "stage": 3,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 1e6,
    }
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": eager}))
    more = ["--deepspeed_config", tmp_path / "ds.json", "--eval_steps", "2", "--save_steps", "2", "--save_only_model"]
    out = tmp_path / "out"
    printed = finished_run(
        [*wide[0], *more, "--load_best_model_at_end", "--output_dir", out, "--max_shard_size", "2MB"]
    )
    assert losses(out) == pytest.approx(undisturbed, rel=1e-6)
    assert "Saved to" in printed or "Best model" in printed
    index = json.loads((out / "model.safetensors.index.json").read_text())
    sizes = {file.name: file.stat().st_size for file in out.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == set(sizes) and len(sizes) > 5
    largest = max(p.nbytes for p in AutoModelForCausalLM.from_pretrained(out).parameters())
    assert max(sizes.values()) < max(2 * 10**6, largest) + 10_000


def count_views(argv: list[str]) -> None:
    """main.py that counts the views of weights which the layers keep from the forward to the backward."""
    import main
    from utils.train import step

    forward = step.summed_loss
    kept = []

    def watched(engine, tensors):
        weights = list(engine.module.parameters())

        def pack(tensor):
            is_weight = any(tensor is weight for weight in weights)
            places = {weight.untyped_storage().data_ptr() for weight in weights if weight.numel()}
            kept.append(not is_weight and tensor.dim() == 2 and tensor.untyped_storage().data_ptr() in places)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return forward(engine, tensors)

    step.summed_loss = watched
    main.run(argv)
    print("VIEWS", sum(kept), "of", len(kept))


def test_no_gathered_weight_is_kept_for_the_backward(wide, tmp_path):
    """torch's own linear keeps `weight.t()`, and with it the whole model at ZeRO 3; what counts sees that, too."""
    command = [*wide[0], "--max_steps", "1"]
    views = re.search(r"VIEWS (\d+) of (\d+)", finished_run(command, program=count_views)).groups()
    assert views[0] == "0" and int(views[1]) > 20
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"memory_efficient_linear": false}}')
    printed = finished_run([*command, "--deepspeed_config", tmp_path / "ds.json"], program=count_views)
    assert int(re.search(r"VIEWS (\d+)", printed)[1]) >= 2 * 6, "six linear layers in each of two layers"


def test_second_copy_of_the_weights_changes_nothing(wide, tmp_path):
    """ZeRO++'s hpZ on two ranks, beside the same run without it."""
    plain, copied = tmp_path / "plain", tmp_path / "copied"
    finished_run([*wide[0], "--output_dir", plain], ranks=2)
    finished_run([*wide[0], "--output_dir", copied, "--zero_hpz_partition_size", "2"], ranks=2)
    assert losses(copied) == losses(plain)
    assert (copied / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


@needs_async_io
@pytest.mark.parametrize("lora", [[], [*LORA, "--only_optimize_lora"]], ids=["all", "lora"])
def test_swap_files_change_nothing(wide, undisturbed, tmp_path, lora):
    swap, out = tmp_path / "swap", tmp_path / "out"
    if lora:
        finished_run([*wide[0], *lora, "--output_dir", tmp_path / "plain"])
        undisturbed = losses(tmp_path / "plain")
    printed = finished_run([*wide[0], *lora, "--output_dir", out, "--offload", "nvme", "--nvme_path", swap])
    assert losses(out) == pytest.approx(undisturbed, rel=1e-6)  # with torch's own linear 2% off
    assert "Saved to" in printed and "offload nvme" in printed and "Swap files" in printed
    assert list(swap.iterdir()) == []
