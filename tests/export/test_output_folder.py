"""`--output_dir`: what no run wrote is never lost, the base model stays, and one run at a time has the folder."""

import json
import os
import shutil
import signal

import pytest
from conftest import make_json_data, make_tiny_opt
from fork_runs import finished_run, start_run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.export.test_saving import contents
from utils.arguments.output_folder import check_output_folder
from utils.arguments.parser import parse_args
from utils.checkpoint.write_checkpoint import drop_old
from utils.errors import UserError
from utils.train.state import RunState

ADAPTER = ("--only_optimize_lora", "--save_lora_adapter")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_opt(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def setting(base, tmp_path_factory):
    """Two steps on a tiny model, without an output folder."""
    folder = tmp_path_factory.mktemp("setting")
    return [
        "--model_name_or_path", base, "--data_path", make_json_data(folder, 12, 5), "--data_split", "10,0,0",
        "--data_output_path", folder / "cache", "--max_seq_len", "64", "--dtype", "fp32",
        "--per_device_train_batch_size", "6",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(setting, tmp_path_factory):
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("finished") / "out"
    finished_run([*setting, "--output_dir", out])
    return out


# --------------------------------------------------------------------------------- what somebody else put there


def test_foreign_files_that_are_not_in_the_way_stay(setting, tmp_path):
    """Beside a saved model, over a second run, with other shards and an adapter in between."""
    out = tmp_path / "out"
    mine = {
        "experiment_7.safetensors": b"mine", "optimizer.pt": b"mine", "notes/README.md": b"mine",
        "pytorch_lora/adapter_model.safetensors": b"mine", "model-best.safetensors": b"mine", "model.txt": b"mine",
    }  # fmt: skip
    for name, text in mine.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(text)
    printed = finished_run(
        [
            *setting,
            "--output_dir",
            out,
            "--max_shard_size",
            "100KB",
            "--lora_dim",
            "2",
            "--lora_module_name",
            "fc",
            *ADAPTER,
        ]
    )
    assert f"In {out} no run wrote: experiment_7.safetensors, model-best.safetensors, model.txt, notes" in printed
    assert (out / "adapter" / "adapter_config.json").exists() and len(list(out.glob("model-0*.safetensors"))) > 2
    finished_run([*setting, "--output_dir", out])
    for name, text in mine.items():
        assert (out / name).read_bytes() == text
    # The earlier run's own shards and adapter are gone.
    assert not (out / "adapter").exists() and not list(out.glob("model-0*")) and not list(out.glob("*.index.json"))
    AutoModelForCausalLM.from_pretrained(out)


REFUSED = {
    "card": {"README.md": "# My work"},
    "another model": {"config.json": "{}", "pytorch_model.bin": "weights"},
    "adapter": {"adapter_config.json": "{}", "adapter_model.safetensors": "weights"},
    "tokenizer": {"vocab.json": "{}", "special_tokens_map.json": "{}"},
    "weights": {"model.safetensors": "weights"},
    "shards": {"model-00001-of-00002.safetensors": "weights"},
    "metrics": {"metrics.jsonl": "{}\n"},
    "record": {"run.json": '{"mine": 1}'},
    "picture": {"loss.png": "picture"},
    "checkpoint": {"checkpoints/step-000001/model.pt": "weights"},
    "best model": {"checkpoints/best_model/model.pt": "weights"},
    "file": {"checkpoints": "mine"},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_foreign_files_in_the_way_are_refused(kind, setting, tmp_path):
    for name, text in REFUSED[kind].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "training.log").write_text("what `tee` has made")
    with pytest.raises(UserError, match="Move it away, or give another") as refused:
        check_output_folder(parse_args([str(word) for word in (*setting, "--output_dir", tmp_path)]))
    assert next(iter(REFUSED[kind])).split("/model.pt")[0] in str(refused.value)


def test_refused_before_training_with_nothing_touched(setting, tmp_path):
    (tmp_path / "README.md").write_text("# My work")
    (tmp_path / "config.json").write_text("{}")
    before = contents(tmp_path)
    printed = finished_run([*setting, "--output_dir", tmp_path], status=2)
    assert "error: --output_dir" in printed and "README.md, config.json. Move it away" in printed.replace(
        "config.json, README.md", "README.md, config.json"
    )
    assert "Traceback" not in printed and "Running training" not in printed
    assert contents(tmp_path) == before


def test_a_card_that_was_edited_is_no_longer_the_runs(finished, setting, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    finished_run([*setting, "--output_dir", out])  # over an earlier run's model: goes
    with open(out / "README.md", "a") as card:
        card.write("License: mine")
    printed = finished_run([*setting, "--output_dir", out], status=2)
    assert "README.md (README.md was changed after it was saved)" in printed


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_config.json"])
def test_a_saved_file_that_somebody_replaced_is_no_longer_the_runs(name, finished, setting, tmp_path):
    """A later step that saved into the same folder, say, or a setting changed by hand."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    content = bytearray((out / name).read_bytes())
    content[-3] ^= 1
    (out / name).write_bytes(content)
    with pytest.raises(UserError, match=f": {name} \\({name} was changed after it was saved\\). Move it away"):
        check_output_folder(parse_args([str(word) for word in (*setting, "--output_dir", out)]))
    assert (out / name).read_bytes() == bytes(content)
    listed = json.loads((out / ".saved_files.json").read_text())
    del listed["marks"]  # of a version before: only the card's changes are known
    (out / ".saved_files.json").write_text(json.dumps(listed))
    check_output_folder(parse_args([str(word) for word in (*setting, "--output_dir", out)]))


def test_a_folder_of_an_earlier_version_without_a_list(finished, setting, tmp_path):
    """Its run.json says that the names of the saved format are a run's, its card too; others are not."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / ".saved_files.json").unlink()
    (out / "added_tokens.json").write_text('{"left": 1}')
    (out / "experiment_7.safetensors").write_text("mine")
    finished_run([*setting, "--output_dir", out])
    assert not (out / "added_tokens.json").exists() and (out / "experiment_7.safetensors").read_text() == "mine"
    (out / ".saved_files.json").unlink()
    (out / "README.md").write_text("# My words")
    assert "README.md" in finished_run([*setting, "--output_dir", out], status=2)


def test_left_overs_of_another_tokenizer_do_not_survive(finished, setting, tmp_path):
    """What an earlier save listed and the new one does not write is removed, whatever its name."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    listed = json.loads((out / ".saved_files.json").read_text())
    stale = [
        "special_tokens_map.json",
        "vocab.txt",
        "chat_template.json",
        "modeling_own.py",
        "adapter/adapter_config.json",
    ]
    for name in stale:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text('{"eos_token": "the"}')
    (tmp_path / "outside.txt").write_text("mine")
    outside = ["../outside.txt", str(tmp_path / "outside.txt")]
    (out / ".saved_files.json").write_text(json.dumps({**listed, "files": [*listed["files"], *stale, *outside]}))
    finished_run([*setting, "--output_dir", out])
    assert not [name for name in stale if (out / name).exists()] and not (out / "adapter").exists()
    assert AutoTokenizer.from_pretrained(out).eos_token == "</s>"
    assert (tmp_path / "outside.txt").read_text() == "mine"


# ------------------------------------------------------------------------------------------------ the base model


def test_the_base_models_own_folder_is_refused(base, setting, tmp_path):
    (tmp_path / "link").symlink_to(base)
    before = contents(base)
    given = [base, f"{base}/", tmp_path / "link", f"{base.parent}/./{base.name}/../{base.name}"]
    for folder in given[:1]:
        printed = finished_run([*setting, "--output_dir", folder], status=2)
        assert "is the folder of the base model" in printed

    def check(*words):
        check_output_folder(parse_args([str(word) for word in words]))

    for folder in given:
        with pytest.raises(UserError, match="folder of the base model"):
            check(*setting, "--output_dir", folder)
        with pytest.raises(UserError, match="folder of the base model"):
            check(*setting, "--output_dir", base, "--model_name_or_path", folder)
    check(*setting, "--output_dir", base / "tuned")
    assert contents(base) == before


def test_a_base_inside_what_the_run_empties_is_refused(base, setting, tmp_path):
    for place in ("checkpoints/best_model", "checkpoints/step-000005", "adapter"):
        shutil.copytree(base, tmp_path / place)
        words = [*setting, "--model_name_or_path", tmp_path / place, "--output_dir", tmp_path]
        with pytest.raises(UserError, match="fills and empties itself"):
            check_output_folder(parse_args([str(word) for word in words]))
    (tmp_path / "checkpoints" / "step-000005" / "complete.json").write_text("{}")
    words = [*setting, "--output_dir", tmp_path / "checkpoints" / "step-000005"]
    with pytest.raises(UserError, match="is a checkpoint or best model"):
        check_output_folder(parse_args([str(word) for word in words]))


# ------------------------------------------------------------------------------------------------------ the lock


def test_a_second_run_on_the_folder_ends_and_a_killed_one_frees_it(setting, tmp_path):
    """The second run names the first, on any number of ranks; after a kill -9 the folder is free at once."""
    out = tmp_path / "out"
    words = [*setting, "--output_dir", out]
    first = start_run([*words, "--num_train_epochs", "2000", "--num_warmup_steps", "1"])
    first.wait_for("Running training")
    pid = first.processes[0].pid
    printed = finished_run(words, status=2)
    assert f"in use by another run (process {pid} on {os.uname().nodename}, started 20" in printed
    assert "Running training" not in printed
    plan = finished_run([*words, "--dry_run"])
    assert "error" not in plan.lower(), "a plan only reads"
    first.kill(signal.SIGKILL)
    first.wait()
    assert (out / ".running").exists()
    finished_run(words)
    assert not (out / ".running").exists()
    assert load_file(out / "model.safetensors")


def fails_after_the_claim(argv: list[str]) -> None:
    import main

    def fail(*_):
        raise UserError("thrown after the folder was taken")

    main.load_training_data = fail
    main.run(argv)


def test_a_run_that_wrote_nothing_leaves_nothing(setting, tmp_path):
    for folder in (tmp_path / "new", tmp_path / "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        printed = finished_run([*setting, "--output_dir", folder], status=2, program=fails_after_the_claim)
        assert "thrown after" in printed
    assert contents(tmp_path) == {} and not (tmp_path / "new").exists() and (tmp_path / "there").exists()


# ------------------------------------------------------------------------------- checkpoints and the best model


def test_foreign_files_in_a_checkpoint_that_goes_are_kept(tmp_path, capsys):
    for step in (1, 2):
        folder = tmp_path / f"step-{step:06d}"
        (folder / "notes").mkdir(parents=True)
        (folder / "state.pt").write_text("ours")
        (folder / "notes" / "mine.txt").write_text(f"mine {step}")
        marker = {"format": 1, "files": {"state.pt": 4}, "state": RunState().to_dict(), "kind": "full"}
        (folder / "complete.json").write_text(json.dumps(marker))
    drop_old(str(tmp_path), 1)
    assert contents(tmp_path / "step-000001.kept") == {"notes/mine.txt": b"mine 1"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step-000001.kept", "step-000002"]
    assert "are kept in step-000001.kept: notes/mine.txt" in capsys.readouterr().out


def test_foreign_files_beside_the_best_model_are_kept(setting, tmp_path):
    out = tmp_path / "out"
    words = [*setting, "--output_dir", out, "--load_best_model_at_end"]
    finished_run(words)
    best = out / "checkpoints" / "best_model"
    (best / "mine.txt").write_text("mine")
    printed = finished_run(words)
    assert f"The best model of an earlier run, in {best}, is removed" in printed
    assert contents(best.parent / "best_model.kept") == {"mine.txt": b"mine"} and not (best / "mine.txt").exists()
