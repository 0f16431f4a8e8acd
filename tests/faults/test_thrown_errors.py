"""Any error at any stage of a run: one message that names the stage, a status, and nothing half-written."""

import errno
import os
import re
from pathlib import Path

import pytest

ERRORS = {
    "RuntimeError": (RuntimeError("something broke\nin two lines"), 1, "RuntimeError: something broke in two lines"),
    "OSError": (OSError(errno.EIO, "Input/output error", "/a/file"), (1, 2), "Input/output error"),
    "MemoryError": (MemoryError(), 2, "ran out of memory"),
    "KeyboardInterrupt": (KeyboardInterrupt(), 130, "stopped while"),
    "KeyError": (KeyError("name"), 1, "KeyError: 'name'"),
}
# Where the error is thrown: the function that fails, and the words of its stage.
STAGES = {
    "arguments": ("main.check_run", "checking the arguments"),
    "ranks": ("main.start_run", "joining the ranks"),
    "tokenizer": ("main.create_tokenizer", "loading the tokenizer"),
    "data": ("main.load_training_data", "preparing the data"),
    "model": ("main.create_model", "loading the model"),
    "engine": ("deepspeed.initialize", "preparing DeepSpeed"),
    "layout": ("main.choose_layout", "checking the layout of batches"),
    "evaluation": ("main.measure_perplexity", "evaluating"),
    "step": ("main.micro_step", "training"),
    "checkpoint": ("deepspeed.DeepSpeedEngine.save_checkpoint", "saving a checkpoint"),
    "saving": ("utils.checkpoint.final_model.save_verified_model", "writing the model"),
}
CASES = [(stage, error) for number, stage in enumerate(STAGES) for error in [list(ERRORS)[number % len(ERRORS)]]]
CASES += [("step", "OSError"), ("checkpoint", "KeyboardInterrupt"), ("saving", "MemoryError"), ("data", "RuntimeError")]


@pytest.mark.parametrize(("stage", "error"), CASES)
def test_one_message_and_nothing_half_written(stage, error, run_setting, run_inside, monkeypatch, tmp_path):
    place, words = STAGES[stage]
    thrown, status, message = ERRORS[error]

    def throw(*arguments, **named):
        raise thrown

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    output = tmp_path / "out"
    monkeypatch.setattr(place, throw)
    command = [*run_setting, "--max_steps", "2", "--save_steps", "1", "--output_dir", output]
    found, printed, complaint = run_inside(command)
    said = printed + complaint
    assert found in (status if isinstance(status, tuple) else (status,)), said
    assert len(re.findall(r"^(error:|stopped while)", said, re.MULTILINE)) == 1 and "Traceback" not in said, said
    assert message in said
    if not (stage == "checkpoint" and error == "OSError"):
        assert words in said, said
    left = [file.name for file in tmp_path.rglob("*") if ".incomplete" in file.name or file.suffix == ".tmp"]
    assert left == [] and not list(output.glob("*.safetensors")) and not (output / "config.json").exists()
    assert not output.exists() or any(output.iterdir())
    assert all((folder / "complete.json").exists() for folder in output.glob("checkpoints/step-*"))
    if (kept := re.search(r"\(traceback: (.*)\)", complaint)) is not None:
        text = Path(kept[1]).read_text(encoding="utf-8")
        assert "in throw" in text and type(thrown).__name__ in text
        assert (Path(kept[1]).parent == output) == os.path.exists(output)
    else:
        assert status in (2, 130, (1, 2))


@pytest.mark.parametrize("error", ["RuntimeError", "KeyboardInterrupt"])
def test_an_error_of_the_verification_leaves_a_whole_model(error, run_setting, run_inside, monkeypatch, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    thrown, status, message = ERRORS[error]

    def throw(*arguments, **named):
        raise thrown

    monkeypatch.setattr("utils.export.verify.verify_saved_model", throw)
    found, printed, complaint = run_inside([*run_setting, "--max_steps", "1", "--output_dir", tmp_path / "out"])
    said = printed + complaint
    assert found == status and message in said and "while verifying the saved model" in said, said
    assert "Traceback" not in said and len(re.findall(r"^(error:|stopped while)", said, re.MULTILINE)) == 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    AutoTokenizer.from_pretrained(tmp_path / "out")
    assert not [file for file in tmp_path.rglob("*") if ".incomplete" in file.name]
