"""What a step measures beside its loss: token accuracy, and the load balancing of mixtures of experts."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny_opt
from fork_runs import finished_run
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from tools.tiny_families import tiny_config
from utils.data.batching.collate import IGNORE_INDEX
from utils.module.fused_loss import BatchFigures, install_loss, last_figures, summed_loss
from utils.module.router_loss import describe_routers, router_of
from utils.train.step_losses import StepLosses

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "eos_token_id": 2, "bos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
ROUTED = {**SIZES, "output_router_logits": True, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
EXPERTS = {
    "qwen3_moe": Qwen3MoeConfig(**ROUTED, moe_intermediate_size=16, num_experts=4, head_dim=8),
    "qwen2_moe": Qwen2MoeConfig(**ROUTED, moe_intermediate_size=16, num_experts=4),
    "mixtral": MixtralConfig(**ROUTED, num_local_experts=4),
    "olmoe": OlmoeConfig(**ROUTED, num_experts=4),
    "gpt_oss": GptOssConfig(**ROUTED, num_local_experts=4, head_dim=8),
}


def padded_batch(seed: int = 0) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Two rows, one of them padded: the batch of `summed_loss`, and the labels and mask of transformers' models."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    labelled = labels[:, 1:] != IGNORE_INDEX
    positions = torch.arange(24).view(2, 12)[:, :-1][labelled]
    batch = {"input_ids": ids, "attention_mask": mask, "positions": positions, "targets": labels[:, 1:][labelled]}
    return batch, labels, mask


def tiny(config) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).train()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("name", EXPERTS)
def test_the_router_loss_is_that_of_transformers(name, fused):
    """Loss, auxiliary loss and the routers' gradients; padding does not count."""
    model = tiny(EXPERTS[name])
    batch, labels, mask = padded_batch()
    expected = model(input_ids=batch["input_ids"], attention_mask=mask, labels=labels)
    expected.loss.backward()
    routers = {
        name: weight.grad.clone() for name, weight in model.named_parameters() if "gate" in name or "router" in name
    }
    model.zero_grad()
    install_loss(model, fused)
    loss = summed_loss(model, batch) / len(batch["targets"])
    loss.backward()
    figures = last_figures(model)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert figures.router_loss.item() == pytest.approx(expected.aux_loss.item(), rel=1e-5)
    assert figures.expert_tokens.shape == (3, 4) and figures.expert_tokens.sum(1).tolist() == [2.0 * mask.sum()] * 3
    for name, weight in model.named_parameters():
        if name in routers:
            torch.testing.assert_close(weight.grad, routers[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["ernie4_5_moe", "flex_olmo", "granitemoe", "jetmoe", "phimoe"])
def test_families_that_name_their_experts_otherwise(family):
    config = tiny_config(family)
    config.output_router_logits = True
    model = tiny(config)
    for name in ("router_aux_loss_coef", "aux_loss_coef"):
        if hasattr(model, name):
            setattr(model, name, 0.5)
    model.eval()  # no dropout, no noise
    batch, labels, mask = padded_batch()
    expected = model(input_ids=batch["input_ids"], attention_mask=mask, labels=labels)
    install_loss(model, True)
    model.training = True
    loss = summed_loss(model, batch) / len(batch["targets"])
    assert last_figures(model).router_loss.item() == pytest.approx(expected.aux_loss.item(), rel=1e-5)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)


def test_numbers_are_those_that_the_model_computes_with():
    """As DBRX's, whose configuration has them in a part of it."""
    model = tiny(EXPERTS["mixtral"])
    model.router_aux_loss_coef = 0.25
    bare = SimpleNamespace(output_router_logits=True)
    model.config = SimpleNamespace(get_text_config=lambda: bare)
    assert router_of(model) == (4, 2, 0.25)


def test_an_auxiliary_loss_of_another_kind_is_named(capsys):
    config = tiny_config("doge")
    config.is_moe, config.output_router_logits = True, True
    model = tiny(config)
    assert router_of(model) is None
    describe_routers(model)
    assert "does NOT count here: that of doge" in capsys.readouterr().out


def test_the_router_loss_counts_only_where_it_is_asked_for_and_in_training():
    config = Qwen3MoeConfig(
        **{**ROUTED, "output_router_logits": False}, moe_intermediate_size=16, num_experts=4, head_dim=8
    )
    model = tiny(config)
    batch, labels, mask = padded_batch()
    plain = model(input_ids=batch["input_ids"], attention_mask=mask, labels=labels).loss.item()
    install_loss(model, True)
    assert summed_loss(model, batch).item() / len(batch["targets"]) == pytest.approx(plain, rel=1e-5)
    assert last_figures(model).router_loss.item() > 0  # measured all the same
    model.config.output_router_logits = True
    install_loss(model, True)
    model.eval()
    assert summed_loss(model, batch).item() / len(batch["targets"]) == pytest.approx(plain, rel=1e-5)
    assert last_figures(model).router_loss is None


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_hits_are_the_labels_that_argmax_names(fused):
    """A head whose logits favour a known token: hits are counted against the independent argmax."""
    model = tiny(
        OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, dropout=0)
    )
    batch, _, mask = padded_batch()
    logits = model(input_ids=batch["input_ids"], attention_mask=mask).logits.flatten(0, 1)[batch["positions"]]
    batch["targets"] = torch.where(torch.arange(len(logits)) % 3 == 0, logits.argmax(-1), batch["targets"])
    expected = (logits.argmax(-1) == batch["targets"]).sum().item()
    install_loss(model, fused)
    summed_loss(model, batch)
    assert 0 < expected < len(logits) and last_figures(model).hits.item() == expected


def test_a_run_of_experts_records_accuracy_router_loss_and_load(tmp_path, tiny_opt, json_data, cache_folder):
    """On two ranks under ZeRO 3: what ranks measured is summed, and the loss holds the auxiliary part."""
    make_tiny_opt(tmp_path / "model")  # the tokenizer
    vocabulary = json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"]
    config = Qwen3MoeConfig(
        **{**ROUTED, "vocab_size": vocabulary}, moe_intermediate_size=16, num_experts=4, head_dim=8,
        max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    printed = finished_run(
        [
            "--model_name_or_path", tmp_path / "model", "--data_path", json_data, "--data_split", "10,0,0",
            "--data_output_path", cache_folder, "--max_seq_len", "64", "--dtype", "fp32", "--max_steps", "4",
            "--per_device_train_batch_size", "8", "--zero_stage", "3", "--learning_rate", "1e-4",
            "--logging_steps", "2",
            "--output_dir", tmp_path / "out",
        ],
        ranks=2,
    )  # fmt: skip
    assert "Experts: 2 of 4 for each token; the routers' auxiliary loss counts 0.5 times" in printed
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert len(steps) == 4
    for record in steps:
        assert 2.0 <= record["router_loss"] < 3 and 0 <= record["token_accuracy"] < 1
        # Random weights know nothing: a loss of about log(vocabulary), and half of the auxiliary loss.
        assert record["loss"] == pytest.approx(math.log(vocabulary) + 0.5 * record["router_loss"], rel=0.02)
    loads = [record["expert_load"] for record in records if "expert_load" in record]
    assert len(loads) == 2 and all(len(load) == 3 and all(1 <= value <= 4 for value in load) for load in loads)
    evaluations = [record for record in records if "eval_loss" in record]
    assert all(
        record["eval_loss"] < math.log(vocabulary) * 1.02 for record in evaluations
    )  # without the auxiliary part
    assert f"token accuracy: {evaluations[-1]['eval_accuracy']:.2%}" in printed


def test_the_load_is_the_busiest_expert_over_the_mean():
    losses = StepLosses(torch.device("cpu"))
    assert losses.collect_load() is None
    figures = (torch.tensor(3), torch.tensor(2.5), torch.tensor([[6.0, 2.0], [4.0, 4.0]]))
    losses.add(torch.tensor(8.0), True, BatchFigures(*figures), labels=4)
    losses.finish_step(4)
    assert losses.collect() == [{"loss": 2.0, "token_accuracy": 0.75, "router_loss": 2.5}]
    assert losses.collect_load() == [1.5, 1.0]
