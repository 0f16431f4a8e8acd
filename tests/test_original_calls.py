"""The calls that DeepSpeed-Chat's own scripts make, as they make them: by position, with its arguments' fields."""

import json
import os
import time
from argparse import Namespace
from functools import partial

import pytest
import torch
from conftest import ROOT, make_json_data, make_tiny_opt, write_json_data
from fork_runs import finished_run
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, Subset
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, OPTConfig, default_data_collator

from tests.model.test_model_utils import dropouts
from utils.data.data_utils import (
    PromptDataset,
    create_prompt_dataset,
    get_raw_dataset,
    get_raw_dataset_split_index,
    get_shuffle_idx,
)
from utils.data.raw_datasets import LocalJsonFileDataset
from utils.distributed.meeting import PATIENCE, meet
from utils.ds_utils import GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE, get_eval_ds_config, get_train_ds_config
from utils.errors import UserError
from utils.model.model_utils import create_hf_model
from utils.module.lora import convert_linear_layer_to_lora, convert_lora_to_linear_layer
from utils.perf import print_throughput
from utils.utils import (
    load_hf_tokenizer,
    load_state_dict_into_model,
    moving_average,
    print_rank_0,
    save_hf_format,
    save_zero_three_model,
    set_random_seed,
)

TINY = ROOT / "demo" / "tiny_opt"


# ------------------------------------------------------------------------------------------------ saving


def trained_engine(base: str, stage: int, tokenizer):
    """An engine of the tiny OPT with LoRA after one step."""
    from utils.engine.engine import create_optimizer, initialize_engine

    config = get_train_ds_config(False, "fp32", stage)
    config["train_micro_batch_size_per_gpu"], config["train_batch_size"] = 1, 2
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # or weights this small stay whole
    model = create_hf_model(AutoModelForCausalLM, base, tokenizer, config)
    model = convert_linear_layer_to_lora(model, "decoder.layers.", 4)
    engine = initialize_engine(model, create_optimizer(model, 1e-2, 0.0, 1e-1), config)
    ids = torch.arange(4, 24)[None]
    for _ in range(2):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    return engine


def whole(module: nn.Module) -> dict[str, torch.Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def save_as_the_original(argv: list[str]) -> None:
    """What the end of DeepSpeed-Chat's main.py does, at one ZeRO stage on each rank of two."""
    import torch.distributed as dist

    import utils.export.hf_model as hf_model
    from utils.distributed.process_group import start_process_group

    base, out, stage = argv[0], argv[1], int(argv[2])
    start_process_group(int(os.environ["LOCAL_RANK"]), 300)
    rank = dist.get_rank()
    tokenizer = load_hf_tokenizer(base)
    engine = trained_engine(base, stage, tokenizer)
    args = Namespace(output_dir=out, global_rank=rank, zero_stage=stage)

    model = convert_lora_to_linear_layer(engine)
    if args.global_rank == 0:
        save_hf_format(model, tokenizer, args)
    if args.zero_stage == 3:
        save_zero_three_model(model, args.global_rank, args.output_dir, zero_stage=args.zero_stage)
    live = whole(engine.module)
    dist.barrier()
    if rank == 0:
        saved = load_file(out + "/model.safetensors")
        print("EQUAL", all(saved[name].equal(live[name]) for name in saved), len(saved), flush=True)
    if stage < 3:
        return

    if rank == 0:  # alone, and nothing follows
        published, hf_model.meet = hf_model.meet, partial(meet, patience=2)
        start = time.monotonic()
        try:
            save_hf_format(model, tokenizer, args, "alone")
        except UserError as err:
            print(f"REFUSED after {time.monotonic() - start:.0f} s: {err}", flush=True)
        hf_model.meet = published
    dist.barrier()
    if rank == 1:
        time.sleep(3)  # busy with something else
    save_hf_format(model, tokenizer, args, "late")

    # Helpers of the later steps on partitioned weights.
    average = trained_engine(base, 3, tokenizer).module
    before, weights = whole(average), whole(engine.module)
    average = convert_lora_to_linear_layer(average)
    average_before = whole(average)
    moving_average(engine, average, beta=0.75, zero_stage=3)
    after = whole(average)
    wanted = {name: 0.25 * weights[name] + 0.75 * average_before[name] for name in weights}
    close = all(torch.allclose(after[name], wanted[name], atol=1e-6) for name in wanted)
    stored = {"x." + name: tensor for name, tensor in load_file(base + "/model.safetensors").items()}
    stored["x.model.decoder.final_layer_norm.bias"] = torch.zeros(3)
    errors = load_state_dict_into_model(average, stored, "x.", zero_stage=3)
    loaded = whole(average)
    same = all(loaded[name[2:]].equal(stored[name]) for name in stored if "final_layer_norm.bias" not in name)
    print("HELPERS", rank, len(before) > len(after), close, same, errors, flush=True)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_save_hf_format_on_rank_0_alone(stage, tmp_path):
    """A folder that loads, at any stage. At ZeRO 3 the weights come from the call that every rank makes after it."""
    base, out = make_tiny_opt(tmp_path / "base"), tmp_path / "out"
    printed = finished_run([base, out, stage], ranks=2, program=save_as_the_original)
    weights = load_file(base / "model.safetensors")
    assert f"EQUAL True {len(weights)}" in printed
    model = AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out)("Human: hi")["input_ids"][0] == 2
    moved = model.state_dict()["model.decoder.layers.0.fc1.weight"] - weights["model.decoder.layers.0.fc1.weight"]
    assert moved.abs().max() > 1e-3, "LoRA is in it"
    if stage < 3:
        return
    assert "REFUSED after 2 s: save_hf_format was called on rank 0, and in 2 s on no other of the 2 ranks" in printed
    assert PATIENCE < 60 and not (out / "alone" / "config.json").exists()
    assert load_file(out / "late" / "model.safetensors").keys() == weights.keys()
    mismatch = "['size mismatch for x.model.decoder.final_layer_norm.bias: (3,) in the state dict, (64,) in the model']"
    for rank in range(2):
        assert f"HELPERS {rank} True True True {mismatch}" in printed


# ----------------------------------------------------------------------------------------------- figures


def test_print_throughput(capsys):
    """OPT-1.3B, the figures by hand: 24 B s l h^2 (1 + s/6h + V/16lh) for each of 3 passes, 4 with checkpointing."""
    with torch.device("meta"):
        sizes = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "ffn_dim": 8192}
        model = AutoModelForCausalLM.from_config(OPTConfig(**sizes, word_embed_proj_dim=2048))
    args = Namespace(max_seq_len=512, per_device_train_batch_size=8, gradient_checkpointing=False, lora_dim=0)
    print_throughput(model, args, 0.75, 0)
    assert capsys.readouterr().out == (
        "Model Parameters: 1.316 B, Latency: 0.75s, TFLOPs: 43.76, Samples/sec: 10.67, Time/seq 0.09s, "
        "Batch Size: 8, Sequence Length: 512\n"
    )
    one_pass = 24 * 8 * 512 * 24 * 2048**2 * (1 + 512 / (6 * 2048) + 50272 / (16 * 24 * 2048)) / 0.75 / 1e12
    assert f"{3 * one_pass:.2f}" == "43.76"
    args.gradient_checkpointing, args.lora_dim = True, 128
    assert f"TFLOPs: {(4 - (1 - 256 / 2048)) * one_pass:.2f}," in print_throughput(model, args, 0.75)
    capsys.readouterr()
    print_throughput(model, args, 0.75, 3)
    assert capsys.readouterr().out == ""


# ----------------------------------------------------------------------------------------- configuration


def test_get_train_ds_config_in_every_order():
    of_2024 = get_train_ds_config(True, "bf16", 3, True, 2, True, False, 4, 256, True, False, "/logs", "step1")
    of_2023 = get_train_ds_config(True, 3, True, 2, True, False, 4, 256)
    hybrid = {
        "enabled": True, "max_out_tokens": 256, "inference_tp_size": 2, "release_inference_cache": True,
        "pin_parameters": False, "tp_gather_partition_size": 4,
    }  # fmt: skip
    for config in (of_2024, of_2023):
        zero = config["zero_optimization"]
        assert zero["stage"] == 3 and config["hybrid_engine"] == hybrid
        assert zero["offload_param"] == zero["offload_optimizer"] == {"device": "cpu"}
        thresholds = ("param_persistence_threshold", "max_live_parameters", "prefetch_bucket_size")
        assert [zero[f"stage3_{name}"] for name in thresholds] == [1e4, 3e7, 3e7]
        assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (32, 4)
        assert (config["steps_per_print"], config["gradient_clipping"]) == (10, 1.0)
    assert of_2024["bf16"] == {"enabled": True} and "fp16" not in of_2024
    assert of_2023["fp16"] == {"enabled": True, "loss_scale_window": 100} and "bf16" not in of_2023
    tensorboard = {"enabled": True, "output_path": "/logs/ds_tensorboard_logs/", "job_name": "step1_tensorboard"}
    assert of_2024["tensorboard"] == tensorboard
    assert (GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE) == (32, 4)
    # By keyword, as main.py of either year calls it.
    named = get_train_ds_config(offload=False, dtype="bf16", stage=1, enable_tensorboard=True, tb_path="", tb_name="x")
    assert named["bf16"] and named["zero_optimization"]["stage"] == 1
    assert get_train_ds_config(offload=False, stage=1)["fp16"]["enabled"]
    assert get_train_ds_config(False) == get_train_ds_config(False, "fp16", 2) == get_train_ds_config(False, 2, "fp16")
    assert get_train_ds_config(False, 0, dtype="bf16") == get_train_ds_config(False, "bf16", 0)
    with pytest.raises(TypeError):
        get_train_ds_config(False, 2, "fp16", dtype="bf16")
    with pytest.raises(ValueError, match="fp64"):
        get_train_ds_config(False, "fp64", 0)


def test_mixed_precision_lora():
    zero = get_train_ds_config(False, "bf16", 3, enable_mixed_precision_lora=True)["zero_optimization"]
    assert zero["zero_quantized_nontrainable_weights"] is True
    assert "zero_hpz_partition_size" not in zero, "one node needs no copies of its own"


def test_get_eval_ds_config():
    config = get_eval_ds_config(True, "bf16", 3)
    assert config["bf16"] == {"enabled": True} and "hybrid_engine" not in config
    assert config["zero_optimization"] == {
        "stage": 3, "stage3_param_persistence_threshold": 1e4, "offload_param": {"device": "cpu"},
        "memory_efficient_linear": False,
    }  # fmt: skip
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (32, 4)
    assert get_eval_ds_config(False, "bf16")["zero_optimization"]["stage"] == 0
    assert get_eval_ds_config(False, dtype="fp16")["fp16"] == {"enabled": True}
    of_2023 = [get_eval_ds_config(False, 3), get_eval_ds_config(offload=False, stage=3)]
    assert of_2023 == [get_eval_ds_config(False, "fp16", 3)] * 2
    assert get_eval_ds_config(False)["zero_optimization"]["stage"] == 0


# ------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize(
    ("positional", "named", "wanted"),
    [
        ((None, False, 0.3), {}, 0.3), ((None, False, None), {}, 0.1), ((None, False, True), {}, 0.0),
        ((None, False, False), {}, 0.1), ((None, False, False, 0.3), {}, 0.3), ((None, False), {"dropout": 0.3}, 0.3),
        ((), {"disable_dropout": True}, 0.0), ((), {"dropout": 0.3, "disable_dropout": False}, 0.3),
    ],
)  # fmt: skip
def test_create_hf_model_by_position(positional, named, wanted, tiny_opt):
    """The sixth is `disable_dropout` in 2023, a bool, and `dropout` since 2024, a number or None."""
    tokenizer = load_hf_tokenizer(str(TINY))
    model = create_hf_model(AutoModelForCausalLM, str(tiny_opt), tokenizer, *positional, **named)
    assert model.config.dropout == wanted and wanted in dropouts(model)


def test_gpt2_has_a_vocabulary_that_divides_by_8(tmp_path):
    AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=1809)).save_pretrained(
        tmp_path
    )
    model = create_hf_model(AutoModelForCausalLM, str(tmp_path), load_hf_tokenizer(str(TINY)))
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == 1816


# -------------------------------------------------------------------------------------------------- data


def prepare(data, cache, **changes):
    """As main.py of the original calls it."""
    tokenizer = changes.pop("tokenizer", None) or load_hf_tokenizer(str(TINY))
    settings = {"data_split": "10,0,0", "phase": 1, "max_seq_len": 64, "end": {}}
    settings |= changes
    return create_prompt_dataset(
        -1, [str(data)], settings["data_split"], str(cache), settings["phase"], 1234, tokenizer,
        settings["max_seq_len"], **settings["end"],
    )  # fmt: skip


def test_split_indexes_are_lists(tmp_path):
    arguments = (-1, str(tmp_path), "Some_set", 1234, "train", "2,4,4")
    parts = [get_raw_dataset_split_index(*arguments, part, 10) for part in range(3)]
    assert all(type(part) is list and {type(row) for row in part} == {int} for part in parts)
    assert parts[0] + parts[1] + parts[2] == get_shuffle_idx(1234, 10).tolist()
    assert [len(part) for part in parts] == [2, 4, 4]


@pytest.mark.parametrize(("data_split", "samples"), [("1", 20), ("6,2,1,1", 12), ("1,1", 10)])
def test_any_number_of_shares(data_split, samples, tmp_path):
    train, evaluation = prepare(make_json_data(tmp_path, 20, 20), tmp_path / "cache", data_split=data_split)
    assert len(train) == len(evaluation) == samples


def test_local_json_file_data_set(tmp_path):
    (tmp_path / "chat" / "data").mkdir(parents=True)
    for name in ("train", "eval"):
        record = {"prompt": f"a {name}", "chosen": "good", "rejected": "bad"}
        (tmp_path / "chat" / "data" / f"{name}.json").write_text(json.dumps([record]))
    raw = LocalJsonFileDataset(str(tmp_path / "cache"), 1234, -1, "local/jsonfile", str(tmp_path / "chat"))
    assert raw.get_prompt_and_chosen(raw.get_train_data()[0]) == " a train good"
    assert raw.get_prompt_and_rejected(raw.get_eval_data()[0]) == " a eval bad"


def test_an_unknown_data_set(tmp_path):
    with pytest.raises(RuntimeError, match="no known data set name") as raised:
        get_raw_dataset("somebody/something", str(tmp_path), 1234, -1)
    assert isinstance(raised.value, UserError)
    with pytest.raises(RuntimeError, match=r"eval\.json"):
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "train.json").write_text('[{"prompt": "a", "chosen": "b"}]')
        LocalJsonFileDataset(str(tmp_path / "cache"), 1234, -1, "local/jsonfile", str(tmp_path))


def test_the_end_is_appended_as_text(tmp_path):
    """The default on a tokenizer whose eos is another, a text of several tokens, and a special token."""
    rows = [{"prompt": f"question {i}?", "chosen": "an answer", "rejected": "no"} for i in range(4)]
    data = write_json_data(tmp_path, rows, rows)
    plain = AutoTokenizer.from_pretrained(TINY)
    assert "<|endoftext|>" not in plain.get_vocab()
    order = get_shuffle_idx(1234, 4)
    for end in ({}, {"end_of_conversation_token": "\n\nthe end"}, {"end_of_conversation_token": "</s>"}):
        train, _ = prepare(data, tmp_path / "cache", end=end)
        text = end.get("end_of_conversation_token", "<|endoftext|>")
        wanted = [plain(f" question {i}? an answer{text}")["input_ids"] for i in order]
        assert [train[i]["input_ids"].tolist() for i in range(4)] == wanted
    pairs, _ = prepare(data, tmp_path / "cache", phase=2, data_split="0,1,0")
    ids, mask = pairs[0][2:]
    assert ids[mask.bool()].tolist() == plain(f" question {order[0]}? no<|endoftext|>")["input_ids"]
    prompts, _ = prepare(data, tmp_path / "cache", phase=3, data_split="0,0,1")
    assert prompts[0][0].flip(0).tolist() == plain(f" question {order[0]}?")["input_ids"]


def test_default_data_collator(tmp_path):
    """Batches of samples of any lengths, padded to the longest: masked, and without a label."""
    train, evaluation = prepare(make_json_data(tmp_path, 12, 5), tmp_path / "cache")
    assert isinstance(train, PromptDataset)
    sizes = set()
    for data in (train, Subset(train, [3, 0, 1])):
        loader = DataLoader(data, collate_fn=default_data_collator, sampler=RandomSampler(data), batch_size=2)
        for batch in loader:
            assert {tuple(tensor.shape) for tensor in batch.values()} == {tuple(batch["input_ids"].shape)}
            lengths = batch["attention_mask"].sum(dim=1)
            assert lengths.max() == batch["input_ids"].shape[1]
            sizes.add(tuple(lengths.tolist()))
            real = batch["attention_mask"].bool()
            assert batch["labels"][real].equal(batch["input_ids"][real])
            assert (batch["labels"][~real] == -100).all() and (batch["input_ids"][~real] == 1).all()
    assert any(len(set(lengths)) > 1 for lengths in sizes), "of unequal lengths"
    model = AutoModelForCausalLM.from_pretrained(make_tiny_opt(tmp_path / "model")).eval()
    batch = next(iter(DataLoader(evaluation, collate_fn=default_data_collator, batch_size=5)))
    singly = [model(input_ids=item["input_ids"][None], labels=item["labels"][None]).loss for item in evaluation]
    labels = [len(item["labels"]) - 1 for item in evaluation]
    mean = sum(loss * count for loss, count in zip(singly, labels, strict=True)) / sum(labels)
    torch.testing.assert_close(model(**batch).loss, mean, rtol=1e-4, atol=1e-4)


def test_prompt_dataset_of_lists():
    tokens = [{"input_ids": torch.tensor([number]), "attention_mask": torch.tensor([1])} for number in range(6)]
    chosen, rejected, prompts = tokens[:3], tokens[3:], tokens[4:]
    sft = PromptDataset([], chosen, [], 9, 1)
    assert len(sft) == 3 and sft[1] == {**chosen[1], "labels": chosen[1]["input_ids"]}
    assert PromptDataset([], chosen, rejected, 9, 2)[2] == (*chosen[2].values(), *rejected[2].values())
    rlhf = PromptDataset(prompts, [], [], 9, 3)
    assert len(rlhf) == 2 and rlhf[0] == (*prompts[0].values(), 9)


# ---------------------------------------------------------------------------------------------- the rest


def test_no_seed_leaves_random_numbers_alone():
    set_random_seed(7)
    expected = torch.rand(3)
    set_random_seed(7)
    set_random_seed(None)
    assert torch.rand(3).equal(expected)


def test_print_rank_0(capsys):
    for rank in (None, 0, -1, 1):  # this process is rank 0, whatever it says
        print_rank_0(f"rank {rank}", rank)
    assert capsys.readouterr().out.splitlines() == ["rank None", "rank 0", "rank -1", "rank 1"]
