"""The memory estimate: against what DeepSpeed's engine really holds, and against sums done by hand."""

import re

import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer, LlamaConfig

from tests.module.test_lora import CONFIGS
from tools.memory_table import build_parser, check, opt_config, table
from utils.distributed.zero3 import whole_numel
from utils.dry_run.activation_memory import Layout, count, simulated_model
from utils.dry_run.memory import estimate_memory
from utils.dry_run.zero_memory import Setting, Sizes, estimate, setting_from_config
from utils.ds_utils import get_train_ds_config
from utils.model.build import ModelForm
from utils.model.model_utils import create_hf_model

LORA = {"lora_dim": 4, "only_optimize_lora": True}
NO_DROPOUT = ModelForm(dropout=0.0)


def storages(tensors) -> int:
    """Bytes of the different storages behind these tensors."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def engine_after_backward(folder, stage: int, lora: bool):
    """(engine, batch loss) of the real engine with one backward done."""
    from transformers import AutoModelForCausalLM

    from utils.distributed.process_group import start_process_group
    from utils.engine.engine import create_optimizer, initialize_engine
    from utils.model.tokenizer import load_hf_tokenizer
    from utils.module.fused_loss import install_loss
    from utils.module.lora import (
        convert_linear_layer_to_lora,
        make_model_gradient_checkpointing_compatible,
        only_optimize_lora_parameters,
    )

    start_process_group(0, 60)
    config = get_train_ds_config(False, stage, "fp32")
    config["train_micro_batch_size_per_gpu"] = config["train_batch_size"] = 1
    model = create_hf_model(AutoModelForCausalLM, str(folder), load_hf_tokenizer(str(folder)))
    if lora:
        model = convert_linear_layer_to_lora(model, "auto", 4, 1.0)
        model = make_model_gradient_checkpointing_compatible(only_optimize_lora_parameters(model))
    engine = initialize_engine(model, create_optimizer(model, 1e-4, 0.0, 1e-4), config)
    install_loss(engine.module, fused=True)
    for _ in range(2):
        backward(engine, is_last=True)
        engine.step()
    backward(engine, is_last=True)
    return engine


def backward(engine, is_last: bool) -> None:
    """One micro batch; `is_last` of its step."""
    from utils.module.fused_loss import summed_loss

    ids = torch.arange(4, 24)[None]
    batch = {"input_ids": ids, "positions": torch.arange(19), "targets": ids[0, 1:]}
    engine.set_gradient_accumulation_boundary(is_last)
    engine.backward(summed_loss(engine, batch) / 19)


def optimizer_tensors(engine) -> list[torch.Tensor]:
    """Master weights that are not the model's own, and all moments."""
    optimizer = engine.optimizer if hasattr(engine.optimizer, "param_groups") else engine.basic_optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    masters = [p for group in inner.param_groups for p in group["params"]]
    masters += list(getattr(optimizer, "fp32_partitioned_groups_flat", []))
    moments = [t for state in inner.state.values() for t in state.values() if torch.is_tensor(t) and t.numel() > 1]
    own = {t.untyped_storage()._cdata for t in weight_tensors(engine)}
    return [t for t in (*masters, *moments) if t.untyped_storage()._cdata not in own]


def weight_tensors(engine) -> list[torch.Tensor]:
    return [getattr(parameter, "ds_tensor", parameter.data) for parameter in engine.module.parameters()]


@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_weights_and_optimizer_are_what_the_engine_holds(tiny_opt, monkeypatch, stage, lora):
    monkeypatch.setenv("RANK", "0")  # undone with everything the process group sets
    monkeypatch.delenv("RANK")
    engine = engine_after_backward(tiny_opt, stage, lora)
    form = NO_DROPOUT._replace(**(LORA if lora else {}))
    memory = estimate_memory(str(tiny_opt), form, engine.config, Layout(1, 20, 19, on_cpu=True), 1)
    guess = memory.total
    assert memory.counts.trainable == sum(whole_numel(p) for p in engine.module.parameters() if p.requires_grad)
    assert storages(weight_tensors(engine)) == pytest.approx(guess.weights, rel=0.01)
    assert storages(optimizer_tensors(engine)) == pytest.approx(guess.optimizer, rel=0.01)
    if stage == 0:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        assert storages(gradients) == guess.gradients
    if stage == 3:
        assert engine.optimizer.grad_partitions_flat_buffer.nbytes == pytest.approx(guess.gradients, rel=0.01)


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_that_wait_for_the_last_micro_batch(tiny_opt, monkeypatch, stage):
    """With one micro batch a step neither stage keeps them whole, which is why both have the same peak."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("RANK")
    engine = engine_after_backward(tiny_opt, stage, lora=False)

    def kept() -> int:
        return storages([p.grad for p in engine.module.parameters() if p.grad is not None])

    assert kept() == 0
    engine.step()
    backward(engine, is_last=False)
    assert kept() == (4 * sum(p.numel() for p in engine.module.parameters()) if stage == 1 else 0)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_simulated(family):
    import copy

    plain = count(simulated_model(copy.deepcopy(CONFIGS[family]), NO_DROPOUT, "fp32"), Layout(1, 48, 45))
    saving = NO_DROPOUT._replace(gradient_checkpointing=True)
    checkpointed = count(simulated_model(copy.deepcopy(CONFIGS[family]), saving, "fp32"), Layout(1, 48, 45))
    assert checkpointed.activations < plain.activations
    gradients = 4 * plain.trainable
    assert plain.with_gradients >= gradients
    assert plain.forward >= plain.activations > 48 * 4  # more than a float per token


def test_blocks_beyond_the_simulated_ones_are_extrapolated():
    few, many = opt_config("125m"), opt_config("125m")
    few.num_hidden_layers, many.num_hidden_layers = 6, 12
    layout = Layout(1, 64, 60)
    small, large = (count(simulated_model(config, NO_DROPOUT, "bf16"), layout) for config in (few, many))
    from utils.dry_run import activation_memory as simulate

    simulate_all, simulate.MANY = simulate.MANY, 99
    try:
        whole = count(simulated_model(many, NO_DROPOUT, "bf16"), layout)
    finally:
        simulate.MANY = simulate_all
    assert large.parameters == whole.parameters > small.parameters
    assert large.activations == whole.activations
    assert large.with_gradients == pytest.approx(whole.with_gradients, rel=0.02)


def test_activations_of_a_block_by_the_published_formula():
    """Korthikanti et al. 2022, equation 1, is 34 s b h bytes a block in 16 bits without the s^2 of attention."""
    layers, width, tokens = 4, 256, 64
    config = opt_config("125m")
    config.num_hidden_layers, config.hidden_size, config.word_embed_proj_dim, config.ffn_dim = layers, 256, 256, 1024
    config.num_attention_heads = 4
    got = count(simulated_model(config, ModelForm(), "bf16"), Layout(1, tokens, 60)).activations
    # ReLU keeps its result, which the next layer keeps too, where the paper's GeLU keeps 8 s b h more.
    assert 26 * tokens * width * layers <= got <= 36 * tokens * width * layers


def test_sums_of_66b_on_64_gpus_by_hand():
    sizes = Sizes(66_000_000_000, 1_400_000_000, 463_000_000, 2_000, 3_000, 4_000, 5_000)
    config = get_train_ds_config(False, 3, "bf16")
    guess = estimate(sizes, setting_from_config(config, 64, 2, on_cpu=False))
    assert guess.weights == 2 * 66_000_000_000 // 64
    assert guess.optimizer == 12 * 1_400_000_000 // 64
    assert guess.gradients == 2 * 1_400_000_000 // 64
    bucket, live = 2 * 500_000_000, 2 * (463_000_000 + 60_000_000)
    held = guess.weights + guess.optimizer + guess.gradients
    assert guess.moments["backward"] == held + bucket + bucket + live  # one bucket, and its copy while it is reduced
    assert guess.peak == guess.moments["backward"]


@pytest.mark.parametrize(
    ("stage", "dtype_bytes", "per_weight"),
    [
        (0, 4, 12),
        (0, 2, 14),
        (1, 2, 2 + 12 / 8),
        (2, 2, 2 + 12 / 8),
        (3, 2, 14 / 8),
        (3, 4, 16 / 8),
        (2, 4, 4 + 12 / 8),
    ],
)
def test_bytes_a_weight_without_batch(stage, dtype_bytes, per_weight):
    sizes = Sizes(1_000_000, 1_000_000, 1000, 0, 0, 0, 0)
    guess = estimate(sizes, Setting(stage, 8, False, dtype_bytes))
    assert guess.weights + guess.optimizer == pytest.approx(per_weight * 1_000_000)


def test_accumulation_keeps_gradients_waiting():
    sizes = Sizes(1000, 1000, 10, 100, 200, 8000, 9000)
    once, several = (estimate(sizes, Setting(0, 1, False, 4, True, accumulates=wait)) for wait in (False, True))
    assert several.peak - once.peak == 4000 + 8000 - 9000


def test_table(tmp_path, monkeypatch):
    config = opt_config("125m")
    config.num_hidden_layers = 2
    config.save_pretrained(tmp_path)
    monkeypatch.setattr("tools.memory_table.OPT", {"125m": (2, 768, 12)})
    args = build_parser().parse_args(["--model_name_or_path", str(tmp_path), "--gpus", "8", "--gpu_memory", "16"])
    check(args)
    text = table(args)
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")][2:]
    assert [row[0].strip() for row in rows] == ["0", "1", "1 + offload", "2", "2 + offload", "3", "3 + offload"]
    assert rows[0][2].strip() == "yes" and rows[0][4].strip() == "125m"
    assert "8 x 16 GB / 3 = up to 43B parameters" in text


def test_table_of_a_base_in_4_bits(tmp_path, monkeypatch, run_inside, json_data, cache_folder):
    """It is what --dry_run says of the same micro batch, without ZeRO 3."""
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=1816,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt").save_pretrained(tmp_path / "model")
    monkeypatch.setattr("tools.memory_table.OPT", {"125m": (2, 768, 12)})
    monkeypatch.setattr("utils.dry_run.dry_run.largest_micro_batch", lambda *_: Layout(1, 4 * 64, 4 * 63))
    lora = ["--lora_dim", "4", "--only_optimize_lora", "--quantize_base", "nf4", "--max_seq_len", "64"]
    model = ["--model_name_or_path", str(tmp_path / "model")]
    args = build_parser().parse_args([*model, *lora, "--gpus", "8", "--gpu_memory", "16"])
    check(args)
    text = table(args)
    in_gigabytes = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")][2:]
    assert [row[0].strip() for row in in_gigabytes] == ["0", "1", "1 + offload", "2", "2 + offload"]
    assert "0.000328B parameters in 4 bits, which ZeRO 3 can't hold" in text  # 2 x (4 x 128 x 128 + 3 x 128 x 256)
    data = ["--data_path", json_data, "--data_split", "10,0,0", "--data_output_path", cache_folder]
    options = ["--lora_module_name", "auto", "--disable_dropout", "--dry_run", "8x16"]
    status, out, err = run_inside([*model, *lora, *data, *options])
    assert status == 0, err
    stages = re.search(r"by ZeRO stage (.*)", out)[1]
    peaks = {name: float(size) * {"GB": 1e9, "MB": 1e6}[unit]
             for name, size, unit in re.findall(r"(\d(?: \+ offload)?): ([\d.]+) ([GM]B)", stages)}  # fmt: skip
    for name, gigabytes, *_ in in_gigabytes:
        assert float(gigabytes) == pytest.approx(peaks[name.strip()] / 1e9, abs=0.06)


def test_table_refuses_nonsense(tmp_path):
    from utils.errors import UserError

    arguments = ["--model_name_or_path", str(ROOT), "--gpus", "0", "--gpu_memory", "-1", "--only_optimize_lora"]
    with pytest.raises(UserError) as caught:
        check(build_parser().parse_args(arguments))
    for words in ("--gpus must be above 0", "--gpu_memory must be above 0", "--only_optimize_lora needs"):
        assert words in str(caught.value)
    with pytest.raises(UserError, match="--quantize_base needs --lora_dim above 0 and --only_optimize_lora"):
        check(build_parser().parse_args(["--model_name_or_path", str(ROOT), "--quantize_base", "nf4"]))
