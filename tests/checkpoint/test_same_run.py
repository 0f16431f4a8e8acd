"""A run goes on only with the data and the base model it was trained on, whatever their names and sizes."""

import json
import shutil

import pytest
import torch
from conftest import make_json_data, make_tiny_opt
from fork_runs import copy_at_step
from safetensors.torch import load_file, save_file

from utils.model.fingerprint import base_fingerprint, files_fingerprint


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """(arguments, folder of the run, folder of the data, base model) of a LoRA run with a checkpoint at step 2."""
    from fork_runs import finished_run

    folder = tmp_path_factory.mktemp("same")
    data, base = make_json_data(folder, 20, 5), make_tiny_opt(folder / "base")
    arguments = [
        "--model_name_or_path", base, "--data_path", data, "--data_split", "10,0,0", "--data_output_path",
        folder / "cache", "--max_seq_len", "64", "--dtype", "fp32", "--lora_dim", "2", "--only_optimize_lora",
        "--per_device_train_batch_size", "4", "--max_steps", "4", "--save_steps", "2", "--save_total_limit", "0",
    ]  # fmt: skip
    finished_run([*arguments, "--output_dir", folder / "run"])
    return arguments, folder / "run", data, base


@pytest.fixture
def resume(stopped, run_inside, tmp_path):
    """Go on from a copy of the checkpoint: (status, stdout, stderr)."""
    arguments, run, *_ = stopped
    folder = copy_at_step(run, tmp_path / "run", 2)

    def start(*more):
        return run_inside([*arguments, "--output_dir", folder, "--resume_from_checkpoint", *more])

    start.marker = folder / "checkpoints" / "step-000002" / "complete.json"
    return start


def test_the_same_run_goes_on(resume):
    status, printed, error = resume()
    assert status == 0 and "step 2 of 4 is done" in printed and "anyway" not in printed, error


def test_answers_of_the_same_lengths(stopped, resume):
    """Other words of as many tokens: another run, though no size has changed."""
    file = stopped[2] / "train.json"
    before = file.read_text(encoding="utf-8")
    try:
        records = json.loads(before)
        for record in records:
            *words, first, second, last = record["chosen"].split()
            record["chosen"] = " ".join([*words, second, first, last])
        file.write_text(json.dumps(records), encoding="utf-8")
        status, printed, error = resume()
        assert status == 2 and "(other tokens in samples of the same number and lengths)" in error, error
        assert "--resume_anyway" in error
        status, printed, error = resume("--resume_anyway")
        assert status == 0 and "Resuming anyway: the training data is not that of" in printed, error
    finally:
        file.write_text(before, encoding="utf-8")


def test_another_base_model_under_the_same_path(stopped, resume):
    """Refused before anything is loaded; a model of the same sizes in other files is the same."""
    file = stopped[3] / "model.safetensors"
    before = load_file(file)
    try:
        changed = {name: tensor.clone() for name, tensor in before.items()}
        changed["model.decoder.layers.1.fc1.weight"][0, 0] += 1
        save_file(changed, file, metadata={"format": "pt"})
        status, printed, error = resume()
        assert status == 2 and f"the weights of {stopped[3]} are not those that" in error and "Data" not in printed
        status, printed, error = resume("--resume_anyway")
        assert status == 0 and f"Resuming anyway: the weights of {stopped[3]} are not those" in printed, error
    finally:
        save_file(before, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"activation_function": "gelu"}, "activation_function: relu then, gelu now"),
        ({"layer_norm_elementwise_affine": True, "dropout": 0.3}, "dropout: 0.1 then, 0.3 now"),
        ({"transformers_version": "4.0", "use_cache": False, "eos_token_id": 3}, None),
    ],
)
def test_another_configuration_under_the_same_path(entries, words, stopped, resume):
    """Weights of the same shapes that compute something else; who wrote the file, or when, is no difference."""
    file = stopped[3] / "config.json"
    before = file.read_text(encoding="utf-8")
    try:
        file.write_text(json.dumps({**json.loads(before), **entries}), encoding="utf-8")
        status, printed, error = resume()
        assert status == (0 if words is None else 2), error
        if words is not None:
            assert f"config.json of {stopped[3]} is not that of the run" in error and words in error
            assert "Data" not in printed, "before anything is prepared"
            assert resume("--resume_anyway")[0] == 0
    finally:
        file.write_text(before, encoding="utf-8")


def test_another_tokenizer_under_the_same_path(stopped, resume):
    """Two tokens that no sample has change places: the same ids in the data, and another model in the end."""
    file = stopped[3] / "tokenizer.json"
    before = file.read_text(encoding="utf-8")
    content = json.loads(before)
    vocabulary = content["model"]["vocab"]
    first, second = [token for token in vocabulary if len(token) == 1 and not token.isascii()][-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    try:
        file.write_text(json.dumps(content), encoding="utf-8")
        status, _, error = resume()
        assert status == 2 and "another tokenizer, whose tokens have other ids" in error, error
    finally:
        file.write_text(before, encoding="utf-8")


def test_other_evaluation_data_are_said(stopped, resume):
    """They change no weight; where they choose the best model or the end of the run, they are refused."""
    file = stopped[2] / "eval.json"
    before = file.read_text(encoding="utf-8")
    try:
        file.write_text(json.dumps(json.loads(before)[1:]), encoding="utf-8")
        status, printed, error = resume("--early_stopping_patience", "2")
        assert status == 2 and "since they choose the best model and the end" in error, error
        status, printed, error = resume()
        assert status == 0 and "The evaluation data is not that of" in printed, error
    finally:
        file.write_text(before, encoding="utf-8")


def test_another_clipping_in_the_file_of_deepspeed(resume, tmp_path):
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 0.1}')
    status, _, error = resume("--deepspeed_config", tmp_path / "ds.json")
    assert status == 2 and "gradient_clipping: 1.0 then, 0.1 now" in error, error


def test_a_checkpoint_without_fingerprints_goes_on(resume):
    marker = json.loads(resume.marker.read_text(encoding="utf-8"))
    del marker["base"], marker["data"]["content"], marker["configuration"], marker["data"]["vocabulary"]
    resume.marker.write_text(json.dumps(marker), encoding="utf-8")
    status, printed, error = resume()
    assert status == 0, error
    assert "has no fingerprint of its base model" in printed and "has no checksum of its data" in printed


def test_fingerprints(tmp_path):
    """They see a change anywhere in a small tensor, the end of a large one, and not how tensors lie in files."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": torch.randn(10 ** (i + 1), generator=generator) for i in range(5)}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    save_file(tensors, whole / "model.safetensors")
    for number, name in enumerate(tensors):
        save_file({name: tensors[name]}, parts / f"model-{number}.safetensors")
    first = base_fingerprint(str(whole))
    assert first == base_fingerprint(str(parts)) and base_fingerprint(str(tmp_path)) is None
    for name in tensors:
        changed = {**tensors, name: torch.cat([tensors[name][:-1], torch.zeros(1)])}
        save_file(changed, whole / "model.safetensors")
        assert base_fingerprint(str(whole)) != first
    shutil.rmtree(whole)
    whole.mkdir()
    (whole / "pytorch_model.bin").write_bytes(bytes(10**6))
    before = base_fingerprint(str(whole)), files_fingerprint([str(whole)])
    (whole / "pytorch_model.bin").write_bytes(bytes(10**6 - 1) + b"1")
    assert before[0] != base_fingerprint(str(whole)) and before[1] != files_fingerprint([str(whole)])
