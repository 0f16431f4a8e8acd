"""Sequence parallelism, tiled MLPs and offloaded activations: the same figures as without them, or a refusal."""

import json
import os
import re
from argparse import Namespace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from fork_runs import _context, copy_at_step, finished_run, free_port, losses
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.module.test_padding_free import CPU, FAMILIES, LENGTHS, LLAMA, VOCABULARY, documents, make, one_by_one
from tests.train.test_training import assert_like_reference
from utils.data.batching.collate import collate_free, collate_slice
from utils.dry_run.activation_memory import Layout, count, simulated_model
from utils.model.build import ModelForm
from utils.model.layout_check import choose_layout
from utils.module.fused_loss import summed_loss
from utils.module.tiled_mlp import tile_mlps

SHARED = {name: {} for name in FAMILIES if name != "bloom"} | {"multi-query llama": {"num_key_value_heads": 1}}

# Not in transformers 5.17, with which --activation_offloading is refused (tests/model/test_model_utils.py).
MOVES_ACTIVATIONS = hasattr(PreTrainedModel, "activation_checkpointing_enable")
ENGINES = [(0, "fp32"), (0, "bf16"), (1, "fp32"), (3, "fp32")]
LABELS = sum(LENGTHS) - len(LENGTHS)


def make_tiny_llama(folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt")
    sizes = {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 256}
    config = AutoConfig.for_model(
        "llama", **{**sizes, "vocab_size": 8 * -(-len(tokenizer) // 8)}, pad_token_id=1, initializer_range=0.05
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny_llama")


@pytest.fixture(scope="session")
def llama_setting(tiny_llama, run_arguments) -> list[str]:
    """Packed rows, one epoch, eight rows a step."""
    changed = [str(tiny_llama) if "tiny_opt" in argument else argument for argument in run_arguments]
    return [*changed, "--packing"]


@pytest.fixture(scope="session")
def plain_llama(llama_setting, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain_llama")
    finished_run([*llama_setting, "--per_device_train_batch_size", "8", "--output_dir", folder])
    return folder


def assert_same_run(folder: Path, plain: Path) -> None:
    """Losses of steps and evaluations, gradient norms, and the saved weights."""
    figures = []
    for run in (folder, plain):
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        names = ("loss", "grad_norm", "eval_loss")
        figures.append([[record[name] for record in records if name in record] for name in names])
    for got, wanted, tolerance in zip(*figures, (1e-5, 1e-3, 1e-5), strict=True):
        assert len(got) == len(wanted) > 1
        assert got == pytest.approx(wanted, rel=tolerance)
    weights, expected = load_file(folder / "model.safetensors"), load_file(plain / "model.safetensors")
    for name, tensor in expected.items():
        # Adam divides by the gradient's own size: where that is next to nothing, rounding shows.
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=5e-5, msg=name)


# ------------------------------------------------------------------------------------ rows shared by ranks


def without_exchange(module, query, key, value, *args, **kwargs):
    """Attend to this rank's part alone, repeated to fill the row: what a broken exchange would give."""
    from utils.module.attention import document_attention

    both = [torch.cat([tensor, tensor], dim=2) for tensor in (query, key, value)]
    output, weights = document_attention(module, *both, *args, **kwargs)
    return output[:, : query.shape[2]], weights


def engine_norm(rank: int, stage: int, dtype: str, groups: Namespace) -> float:
    """The gradient norm DeepSpeed clips by, of the mean loss of the four documents."""
    from utils.ds_utils import get_train_ds_config
    from utils.engine.engine import create_optimizer, initialize_engine
    from utils.run_config import averaged_over

    config = {**get_train_ds_config(False, stage, dtype), "train_micro_batch_size_per_gpu": 1}
    del config["train_batch_size"]  # from the micro batch
    model = make("llama").to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    optimizer = create_optimizer(model, 1e-3, weight_decay=0.0, lora_learning_rate=1e-3, offload=False)
    engine = initialize_engine(model, optimizer, config, groups)
    choose_layout(engine.module, "free", VOCABULARY, CPU, (rank, 2))
    weight = averaged_over(groups=1, group_size=2, zero_stage=stage) / LABELS
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(summed_loss(engine, collate_slice(documents(), (rank, 2))) * weight)
    engine.step()
    return float(engine.get_global_grad_norm())


def on_rank(rank: int, port: int, log: str) -> None:
    """One of two ranks: every family's logits by the check of the program, its gradients here; DeepSpeed's norms."""
    import torch.distributed as dist

    from utils.errors import UserError
    from utils.module.attention import set_exchange
    from utils.module.sequence_parallel import start_sequence_parallel

    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    import deepspeed

    os.environ["MASTER_PORT"] = str(port)
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=60), verbose=False)
    groups = start_sequence_parallel(2)
    done = []
    for name, changes in SHARED.items():
        family = name.split()[-1]
        _, gradients = one_by_one(family, **changes)
        model = make(family, **changes)
        assert choose_layout(model, "free", VOCABULARY, CPU, (rank, 2)) == "free"
        summed_loss(model, collate_slice(documents(), (rank, 2))).backward()
        for key, parameter in model.named_parameters():
            total = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(total)
            torch.testing.assert_close(
                total, gradients[key], rtol=1e-3, atol=1e-4 * gradients[key].abs().max().item() + 1e-7, msg=key
            )
        done.append(name)
    done.append([engine_norm(rank, stage, dtype, groups) for stage, dtype in ENGINES])
    set_exchange(without_exchange)
    try:
        choose_layout(make("llama"), "free", VOCABULARY, CPU, (rank, 2))
    except UserError as err:
        done.append(str(err))
    Path(log).write_text(json.dumps(done))
    os._exit(0)  # threads of the process group must not keep the test waiting


def test_two_ranks_give_every_familys_gradients(tmp_path):
    port = free_port()
    logs = [tmp_path / f"rank_{rank}.json" for rank in range(2)]
    processes = [
        _context().Process(target=on_rank, args=(rank, port, str(log)), daemon=True) for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0, 0]
    _, gradients = one_by_one("llama")
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item() / LABELS
    for log in logs:
        *families, norms, refusal = json.loads(log.read_text())
        assert families == list(SHARED)
        # ZeRO 3 averages over all ranks, the others over groups; ranks of a group are no model parallel ones.
        for got, (_, dtype) in zip(norms, ENGINES, strict=True):
            assert got == pytest.approx(norm, rel=1e-4 if dtype == "fp32" else 3e-2)
        assert "the parts of a row don't give what the whole row gives" in refusal


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_parts_of_a_row_hold_every_token_and_label_once(parts):
    whole = collate_free(documents())
    slices = [collate_slice(documents(), (index, parts)) for index in range(parts)]
    tokens = whole["input_ids"].shape[1]
    widths = {part["input_ids"].shape[1] for part in slices}
    assert widths == {-(-tokens // parts)}
    (width,) = widths
    for name in ("input_ids", "position_ids", "labels"):
        assert torch.equal(torch.cat([part[name] for part in slices], 1)[:, :tokens], whole[name])
    positions = torch.cat([part["positions"] + index * width for index, part in enumerate(slices)])
    assert torch.equal(positions, whole["positions"])
    assert torch.equal(torch.cat([part["targets"] for part in slices]), whole["targets"])
    for part in slices:
        assert sum(part["document_lengths"]) == part["cu_seqlens"][-1] == width * parts


def test_opt_on_two_ranks_and_going_on_alone(run_arguments, tmp_path):
    """Against the reference; the checkpoint of two ranks is gone on from by one."""
    wanted = json.loads((ROOT / "tests" / "references" / "tiny_opt.json").read_text(encoding="utf-8"))
    common = [*run_arguments, "--num_train_epochs", "2", "--learning_rate", "1e-3"]
    shared = [
        *common, "--sequence_parallel_size", "2", "--per_device_train_batch_size", "4", "--zero_stage", "2",
        "--gradient_accumulation_steps", "2", "--gradient_checkpointing", "--save_steps", "12",
    ]  # fmt: skip
    output = finished_run([*shared, "--output_dir", tmp_path / "two"], ranks=2)
    assert_like_reference(tmp_path / "two", output, wanted)
    assert "Sequence parallelism: 2 ranks share a row" in output and "1 group(s) of 2 ranks" in output
    alone = copy_at_step(tmp_path / "two", tmp_path / "one", 12)
    more = ["--per_device_train_batch_size", "8", "--zero_stage", "2", "--resume_from_checkpoint"]
    output = finished_run([*common, *more, "--output_dir", alone])
    assert "Resuming in another layout" in output
    assert [losses(alone)[step] for step in range(1, 21)] == pytest.approx(wanted["losses"], abs=1e-4)


def test_llama_packed_tiled_zero3_on_two_ranks(llama_setting, plain_llama, tmp_path):
    """ZeRO 3 averages the gradients of all ranks, the other stages those of groups."""
    more = ["--sequence_parallel_size", "2", "--per_device_train_batch_size", "8", "--zero_stage", "3", "--tiled_mlp"]
    output = finished_run([*llama_setting, *more, "--gradient_checkpointing", "--output_dir", tmp_path], ranks=2)
    assert_same_run(tmp_path, plain_llama)
    assert "Tiled MLP: 2 LlamaMLP in pieces of 64 tokens" in output


# ---------------------------------------------------------------------------------------------- tiled MLPs


def test_tiled_mlp_zero3_on_ranks_with_rows_of_their_own(llama_setting, plain_llama, tmp_path):
    """Two rows on each rank: different lengths, so different numbers of pieces."""
    more = ["--per_device_train_batch_size", "4", "--zero_stage", "3", "--tiled_mlp", "--output_dir", tmp_path]
    finished_run([*llama_setting, *more], ranks=2)
    assert_same_run(tmp_path, plain_llama)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
def test_tiled_mlp_gives_the_same_gradients(family, lora):
    from utils.module.lora import convert_linear_layer_to_lora, only_optimize_lora_parameters

    samples = documents()  # 41 tokens in a model 32 wide: two pieces, and an uneven one
    results = []
    for tiled in (False, True):
        model = make(family, resid_pdrop=0.0) if family == "gpt2" else make(family)
        if tiled:
            tile_mlps(model)
        if lora:  # only in the MLPs: nothing before the first one trains
            torch.manual_seed(5)
            model = only_optimize_lora_parameters(convert_linear_layer_to_lora(model, "mlp", 4, 8.0))
            for name, parameter in model.named_parameters():
                if "lora_left" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        choose_layout(model, "free", VOCABULARY, CPU)
        loss = summed_loss(model, collate_free(samples))
        loss.backward()
        results.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (plain_loss, plain), (tiled_loss, pieces) = results
    assert tiled_loss == pytest.approx(plain_loss, rel=1e-6)
    assert plain.keys() == pieces.keys()
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(pieces[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=name)


@pytest.mark.parametrize("tokens", [1, 32, 33, 40, 65, 97, 200])
def test_the_last_piece_is_known_as_the_last(tokens):
    """DeepSpeed holds gradients back until the piece of that number: one too many, and they never arrive."""
    model = make("llama")
    tile_mlps(model)
    mlp = model.model.layers[0].mlp
    hidden = torch.randn(1, tokens, 32, requires_grad=True)
    mlp(hidden).sum().backward()
    assert all(getattr(weight, "ds_grad_is_ready", True) for weight in mlp.parameters())
    assert hidden.grad.abs().min() > 0


# ----------------------------------------------------------------------------- offloaded activations, memory


@pytest.mark.skipif(not MOVES_ACTIVATIONS, reason="this transformers can't move activations")
def test_offloaded_activations_come_back(monkeypatch):
    """transformers' own offloading, with copies in place of pinned memory, which a CPU doesn't have."""
    import transformers.modeling_utils

    from utils.model.model_utils import enable_checkpointing

    kept = []

    def put_away(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor.clone()

    monkeypatch.setattr(
        transformers.modeling_utils, "save_on_cpu",
        lambda **_: torch.autograd.graph.saved_tensors_hooks(put_away, lambda tensor: tensor),
    )  # fmt: skip
    _, gradients = one_by_one("llama")
    model = make("llama")
    enable_checkpointing(model, offload=True)
    choose_layout(model, "free", VOCABULARY, CPU)
    model.train()
    summed_loss(model, collate_free(documents())).backward()
    assert kept.count((1, 41, 32)) == 2  # the input of each block, and nothing else of its size
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-3, atol=1e-4 * gradients[name].abs().max().item() + 1e-7, msg=name
        )


def test_memory_of_a_long_row():
    """The flags' savings on the meta device, and a loss that never holds the logits of 16k tokens."""
    tokens, width, wide, layers, vocabulary = 16384, 1024, 4096, 2, 32000

    def counts(parts: int = 1, **flags: bool):
        config = AutoConfig.for_model(
            "llama", vocab_size=vocabulary, hidden_size=width, intermediate_size=wide, num_hidden_layers=layers,
            num_attention_heads=8, num_key_value_heads=2,
        )  # fmt: skip
        model = simulated_model(config, ModelForm(dropout=0.0, **flags), "bf16")
        return count(model, Layout(1, tokens // parts, tokens // parts - 1, parts=parts))

    plain, tiled, shared = counts(), counts(tiled_mlp=True), counts(parts=4)
    assert plain.forward - plain.activations < 4 * tokens * vocabulary / 2
    # Of the MLP the gate, what it becomes, the other half and their product are as wide as the MLP.
    assert plain.activations - tiled.activations >= 4 * 2 * tokens * wide * layers
    assert shared.activations == pytest.approx(plain.activations / 4, rel=0.15)
    kept = counts(gradient_checkpointing=True)
    if not MOVES_ACTIVATIONS:
        return
    offloaded = counts(gradient_checkpointing=True, activation_offloading=True)
    assert offloaded.offloaded == 2 * tokens * width * layers and kept.offloaded == 0
    assert kept.activations - offloaded.activations == offloaded.offloaded


def test_a_plan_counts_the_ranks_that_share_a_row(run_inside, llama_setting):
    plan = [*llama_setting, "--dry_run", "8x80", "--per_device_train_batch_size", "4"]
    flags = ["--gradient_checkpointing", "--sequence_parallel_size", "2", "--tiled_mlp"]
    flags += ["--activation_offloading"] * MOVES_ACTIVATIONS
    status, out, err = run_inside([*plan, *flags])
    assert status == 0, err
    assert "in steps of 4 x 1 accumulation x 4 group(s) of 2 ranks" in out
    length = int(re.search(r"the largest micro batch is 1 x (\d+) tokens", out)[1])
    assert 100 < length <= 4 * 64 / 2
    assert ("MB of CPU memory per rank" in out) is MOVES_ACTIVATIONS


# ------------------------------------------------------------------------------------------------ refusals


def test_what_can_not_be_is_refused_before_loading(run_inside, run_arguments, tmp_path):
    config = tmp_path / "ds.json"
    config.write_text('{"sequence_parallel_size": 2}')
    flags = ["--sequence_parallel_size", "2", "--tiled_mlp", "--activation_offloading", "--padding", "longest"]
    flags += ["--lora_dim", "4", "--lora_dropout", "0.1"]
    status, _, err = run_inside([*run_arguments, *flags, "--deepspeed_config", config])
    assert status == 2
    for words in (
        "needs --padding free, not longest",
        "--activation_offloading moves what --gradient_checkpointing keeps",
        "--activation_offloading: this run is on a CPU",
        "must divide the number of ranks, which is 1",
        "where --lora_dropout would draw anew",
        "--tiled_mlp can't be used with model type 'opt': its blocks have no MLP as a module of their own",
        "sequence_parallel_size (use --sequence_parallel_size)",
    ):
        assert words in err, words


def test_gradients_scaled_unequally_are_refused(run_inside, run_arguments, tmp_path):
    config = tmp_path / "ds.json"
    config.write_text('{"zero_optimization": {"reduce_scatter": false}}')
    flags = ["--sequence_parallel_size", "2", "--zero_stage", "3", "--dry_run", "2x80", "--deepspeed_config", config]
    status, _, err = run_inside([*run_arguments, *flags])
    assert status == 2 and "reduce_scatter false at ZeRO 3 scales some gradients" in err


def test_experts_can_be_shared_by_ranks():
    """They take tokens one by one: only attention mixes them."""
    from utils.module.sequence_parallel import check_sequence_parallel

    check_sequence_parallel(AutoConfig.for_model("mixtral", **LLAMA, num_local_experts=4), 2)


@pytest.mark.parametrize(
    ("family", "changes", "flags", "words"),
    [
        ("llama", LLAMA, ["--sequence_parallel_size", "8"], "must divide the model's 4 attention heads"),
        ("bloom", FAMILIES["bloom"], ["--sequence_parallel_size", "2"], "attention of model type 'bloom' can't be"),
        ("mamba", {"vocab_size": 64, "hidden_size": 32}, ["--sequence_parallel_size", "2"], "'mamba' can't be shared"),
        ("jamba", {**LLAMA, "num_experts": 2}, ["--sequence_parallel_size", "2"], "0 of its 2 layers take"),
        ("gpt2", FAMILIES["gpt2"], ["--tiled_mlp"], "there is dropout within its MLPs"),
        ("bloom", FAMILIES["bloom"], ["--tiled_mlp"], "take hidden_states, residual, not the hidden states alone"),
        ("mixtral", {**LLAMA, "num_local_experts": 4}, ["--tiled_mlp"], "mixtures of experts"),
    ],
    ids=["heads", "bloom", "mamba", "hybrid", "dropout", "residual", "experts"],
)
def test_models_that_are_refused(family, changes, flags, words):
    from utils.errors import UserError
    from utils.module.sequence_parallel import check_sequence_parallel
    from utils.module.tiled_mlp import check_tiled_mlp

    config = AutoConfig.for_model(family, **changes)
    with pytest.raises(UserError, match=re.escape(words)):
        if flags[0] == "--tiled_mlp":
            check_tiled_mlp(config)
        else:
            check_sequence_parallel(config, int(flags[1]))
