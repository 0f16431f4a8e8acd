"""What saving does after the last step is tried before the first: mended with a line, or refused."""

import json
import shutil

import pytest
import torch
from conftest import make_json_data, make_tiny_opt
from fork_runs import finished_run
from transformers import AutoModelForCausalLM, GenerationConfig

from utils.checkpoint.rehearsal import mend_generation


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A base model whose generation settings transformers loads and does not save, and the arguments of two steps."""
    folder = tmp_path_factory.mktemp("setting")
    base = make_tiny_opt(folder / "base")
    settings = json.loads((base / "generation_config.json").read_text())
    settings |= {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "max_length": 77}
    (base / "generation_config.json").write_text(json.dumps(settings))
    return [
        "--model_name_or_path", base, "--data_path", make_json_data(folder, 12, 5), "--data_split", "10,0,0",
        "--data_output_path", folder / "cache", "--max_seq_len", "64", "--dtype", "fp32",
        "--per_device_train_batch_size", "6", "--save_strategy", "epoch",
    ]  # fmt: skip


def test_settings_that_transformers_does_not_save_are_mended(setting, tmp_path):
    printed = finished_run([*setting, "--output_dir", tmp_path / "out"])
    assert "which transformers refuses to save, are left out: temperature 0.6, top_p 0.9 (do_sample is False" in printed
    assert printed.index("are left out") < printed.index("Running training")
    saved = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (saved.do_sample, saved.max_length, saved.eos_token_id) == (False, 77, 2)
    assert not [file for file in (tmp_path / "out").iterdir() if file.name.startswith(".incomplete")]


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 5, "typical_p": 0.3, "min_p": 0.1}, {"early_stopping": True, "length_penalty": 2.0},
        {"num_beams": 1, "num_return_sequences": 3}, {"do_sample": False, "temperature": 0.0, "epsilon_cutoff": 0.1},
    ],
)  # fmt: skip
def test_every_kind_of_setting_without_effect(settings, setting, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(setting[1])
    model.generation_config = GenerationConfig(max_new_tokens=5, eos_token_id=[2, 5])
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    ids = torch.arange(5, 20)[None]
    before = None
    if "num_return_sequences" not in settings:  # transformers can't generate with these
        before = model.generate(ids, pad_token_id=1)
    mend_generation(model)
    printed = capsys.readouterr().out
    assert "are left out" in printed and all(
        f"{name} " in printed for name in settings if name not in ("num_beams", "do_sample")
    )
    model.generation_config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [2, 5]
    if before is not None:
        assert torch.equal(model.generate(ids, pad_token_id=1), before)


def test_settings_of_generation_in_the_models_configuration_move(setting, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(setting[1])
    model.generation_config = GenerationConfig(eos_token_id=2)
    model.config.repetition_penalty = 1.3
    with pytest.raises(ValueError, match="generation parameters"):
        model.config.save_pretrained(tmp_path)
    mend_generation(model)
    assert "are saved in generation_config.json: {'repetition_penalty': 1.3}" in capsys.readouterr().out
    model.config.save_pretrained(tmp_path)
    assert model.generation_config.repetition_penalty == 1.3
    sane = model.generation_config.to_dict()
    mend_generation(model)
    assert model.generation_config.to_dict() == sane and not capsys.readouterr().out
    model.generation_config.cache_implementation = "none such"
    model.generation_config.watermarking_config = None
    mend_generation(model)
    assert model.generation_config.cache_implementation is None


def small_disk(argv: list[str]) -> None:
    import main

    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: usage(path)._replace(free=int(argv[-1]))
    main.run(argv[:-1])


def unsavable_configuration(argv: list[str]) -> None:
    import main

    make = main.create_model

    def create(*given):
        model = make(*given)
        model.config.odd = {1, 2}  # JSON has no sets
        return model

    main.create_model = create
    main.run(argv)


def unreadable_tokenizer(argv: list[str]) -> None:
    import main

    make = main.create_tokenizer

    def create(*given):
        tokenizer = make(*given)
        tokenizer.save_pretrained = lambda folder: type(tokenizer).save_pretrained(make(*given), folder)
        tokenizer.add_tokens(["<never saved>"])
        return tokenizer

    main.create_tokenizer = create
    main.run(argv)


def test_a_disk_without_room_is_refused_before_training(setting, tmp_path):
    words = [*setting, "--output_dir", tmp_path, "--load_best_model_at_end"]
    printed = finished_run([*words, "3000000"], status=2, program=small_disk)
    assert "the disk has 0.003 GB free, and the run needs about 0.00" in printed
    assert "the saved model" in printed and "a checkpoint" in printed and "the best model" in printed
    assert "Running training" not in printed
    printed = finished_run(
        [*setting, "--output_dir", tmp_path, "--save_total_limit", "9", "20000000"], program=small_disk
    )
    assert "checkpoint(s) of" in printed and "--save_total_limit 9 keeps 9" in printed


@pytest.mark.parametrize(
    ("program", "words"), [(unsavable_configuration, "TypeError"), (unreadable_tokenizer, "the tokenizer saved in")]
)
def test_what_can_not_be_saved_is_refused_before_training(program, words, setting, tmp_path):
    printed = finished_run([*setting, "--output_dir", tmp_path], status=2, program=program)
    assert f"error: the model could not be saved after training: {words}" in printed
    assert "Running training" not in printed and "Traceback" not in printed
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".incomplete")]
