"""Loading a model for training: dtype, dropout, vocabulary, special ids, positions."""

import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SHARED, make_tiny_opt, needs_shared
from transformers import AutoModelForCausalLM

from tests.module.test_lora import CONFIGS
from utils.errors import UserError
from utils.model import model_utils
from utils.model.config_values import max_positions
from utils.model.model_utils import (
    check_activation_offloading,
    create_hf_model,
    enable_checkpointing,
    grow_embeddings,
)
from utils.model.tokenizer import load_hf_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_hf_tokenizer(str(ROOT / "demo" / "tiny_opt"))


def load(folder, tokenizer, **more):
    return create_hf_model(AutoModelForCausalLM, str(folder), tokenizer, **more)


def dropouts(model) -> set[float]:
    """Every probability in use: of dropout modules, and of what modules keep as a number."""
    kept = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    for module in model.modules():
        for name in ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout"):
            value = getattr(module, name, None)
            kept |= {float(value)} if isinstance(value, (int, float)) else set()
    return kept


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("probability", [0.0, 0.25])
def test_dropout_reaches_every_part(family, probability, tokenizer, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[family]).save_pretrained(tmp_path)
    how = {"disable_dropout": True} if probability == 0 else {"dropout": probability}
    model = load(tmp_path, tokenizer, **how).train()
    assert dropouts(model) == {probability}
    ids = torch.arange(4, 24)[None]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits) == (probability == 0)


def test_the_models_own_dropout_is_left_alone(tiny_opt, tokenizer):
    assert dropouts(load(tiny_opt, tokenizer)) == {0.1, 0.0}


def test_special_ids_come_from_the_tokenizer(tokenizer, tmp_path):
    model = load(make_tiny_opt(tmp_path, eos_token_id=7, pad_token_id=9), tokenizer)
    assert model.config.end_token_id == 2
    for settings in (model.config, model.generation_config):
        assert (settings.eos_token_id, settings.pad_token_id) == (2, 1)


def test_the_embedding_grows_only_if_it_must(tokenizer, tmp_path):
    """1809 entries: 1801 and 1809 rows become 1816, the first ones unchanged; 1816 and 2000 stay as they are."""
    for rows, after in ((1801, 1816), (1809, 1816), (1816, 1816), (2000, 2000)):
        folder = make_tiny_opt(tmp_path / str(rows), vocab_size=rows)
        before = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
        model = load(folder, tokenizer)
        weight = model.get_input_embeddings().weight
        assert weight.shape[0] == after == model.config.vocab_size
        assert torch.equal(weight[:rows], before)
        assert model.get_output_embeddings().weight is weight, "still tied"


def test_new_rows_do_not_depend_on_what_was_drawn_before(tokenizer, tmp_path):
    """So all ranks have the same; and growing leaves the stream of random numbers where it was."""
    folder = make_tiny_opt(tmp_path, vocab_size=1801)
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(load(folder, tokenizer))
    first, second = (model.get_input_embeddings().weight for model in models)
    assert torch.equal(first, second) and first[1801:].norm(dim=1).min() > 0
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert grow_embeddings(model, 1809) and torch.equal(torch.rand(3), expected)
    assert not grow_embeddings(model, 1816)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_any_checkpoint_is_loaded_in_float32(stored, tiny_opt, tokenizer, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_opt, dtype=stored).save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load(tmp_path, tokenizer).parameters()} == {torch.float32}


def test_architecture_alone(tiny_opt, tokenizer):
    """`rlhf_training` builds without reading weights."""
    torch.manual_seed(5)
    model, stored = load(tiny_opt, tokenizer, rlhf_training=True), load(tiny_opt, tokenizer)
    assert model.state_dict().keys() == stored.state_dict().keys()
    assert not torch.equal(model.get_input_embeddings().weight, stored.get_input_embeddings().weight)


def test_broken_folders_are_the_users_to_mend(tiny_opt, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        load(tmp_path, tokenizer)
    folder = shutil.copytree(tiny_opt, tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match="can't be loaded"):
        load(folder, tokenizer)
    (folder / "config.json").write_text(json.dumps({"model_type": "nobody_knows_this"}))
    with pytest.raises(UserError, match="nobody_knows_this"):
        load(folder, tokenizer)


def test_positions_of_every_family():
    positions = {family: max_positions(config) for family, config in CONFIGS.items()}
    assert positions["opt"] == positions["gpt2"] == positions["neox"] == 32
    assert positions["bloom"] is None, "its positions have no end"
    assert all(positions[family] > 1000 for family in ("llama", "qwen3", "gemma2"))


def test_checkpointing_by_the_name_of_an_older_transformers():
    calls = []
    older = SimpleNamespace(gradient_checkpointing_enable=lambda **options: calls.append(options))
    enable_checkpointing(older, offload=False)
    assert calls == [{"gradient_checkpointing_kwargs": {"use_reentrant": False}}]
    with pytest.raises(UserError, match="--activation_offloading needs transformers"):
        enable_checkpointing(older, offload=True)


@pytest.mark.parametrize(
    ("device", "has_it", "words"),
    [("cpu", True, "on a CPU"), ("cuda", False, "5.23 or newer"), ("cuda", True, None)],
)
def test_activation_offloading_is_refused_before_a_model_is_loaded(device, has_it, words, monkeypatch):
    accelerator = SimpleNamespace(device_name=lambda: device)
    monkeypatch.setattr(model_utils, "get_accelerator", lambda: accelerator)
    loader = SimpleNamespace(activation_checkpointing_enable=None) if has_it else SimpleNamespace()
    monkeypatch.setattr(model_utils, "transformers", SimpleNamespace(PreTrainedModel=loader, __version__="5.17.0"))
    with nullcontext() if words is None else pytest.raises(UserError, match=words):
        check_activation_offloading()


@needs_shared
def test_a_real_pretrained_model_keeps_what_it_knows():
    """Loss about 1.3 on English stories, as published; a wrong dtype, weight or vocabulary would show at once."""
    folder = SHARED / "stories260K"
    own = load_hf_tokenizer(str(folder))
    model = load(folder, own).eval()
    ids = own((SHARED / "large" / "tinystories_sample.txt").read_text(), return_tensors="pt")["input_ids"][:, :256]
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:]).item()
    assert 1.0 < loss < 1.6
    assert model.get_input_embeddings().weight.shape[0] == 512
