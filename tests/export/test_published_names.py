"""A saved model has the names and values of `model.save_pretrained`: loaders other than transformers 5 read it."""

import json

import pytest
import torch
import transformers
from fork_runs import finished_run, run_main
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import ROOT, make_json_data
from utils.export.hf_model import save_model_folder
from utils.export.published import published_groups
from utils.export.verify import check_names, compare_tensors, compare_tokenizers
from utils.export.weights import write_weights

SMALL = {
    "vocab_size": 1816, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
MOE = dict(
    SMALL, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
    decoder_sparse_step=1, head_dim=8,
)  # fmt: skip
DEEPSEEK = dict(
    SMALL, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
    first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    n_group=1, topk_group=1, num_key_value_heads=4,
)  # fmt: skip
FAMILIES = {
    "llama": ("LlamaConfig", SMALL),
    "llama tied": ("LlamaConfig", dict(SMALL, tie_word_embeddings=True)),
    "opt": ("OPTConfig", dict(SMALL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64)),
    "gpt2": ("GPT2Config", {"vocab_size": 1816, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt_neo": ("GPTNeoConfig", {
        "vocab_size": 1816, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]]}),
    "gpt_neox": ("GPTNeoXConfig", SMALL),
    "gptj": ("GPTJConfig", {"vocab_size": 1816, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "bloom": ("BloomConfig", {"vocab_size": 1816, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconConfig", SMALL),
    "phi": ("PhiConfig", SMALL),
    "phi3": ("Phi3Config", SMALL),
    "mpt": ("MptConfig", {"vocab_size": 1816, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "gemma2": ("Gemma2Config", dict(SMALL, head_dim=8)),
    "gemma3": ("Gemma3Config", {
        "text_config": dict(SMALL, head_dim=8),
        "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                           "image_size": 32, "patch_size": 8},
        "mm_tokens_per_image": 4, "image_token_index": 1810, "boi_token_index": 1811, "eoi_token_index": 1812}),
    "mixtral": ("MixtralConfig", dict(SMALL, num_local_experts=4)),
    "qwen2_moe": ("Qwen2MoeConfig", MOE),
    "qwen3_moe": ("Qwen3MoeConfig", MOE),
    "olmoe": ("OlmoeConfig", dict(SMALL, num_experts=4, num_experts_per_tok=2)),
    "granitemoe": ("GraniteMoeConfig", dict(SMALL, num_local_experts=4, num_experts_per_tok=2)),
    "phimoe": ("PhimoeConfig", dict(SMALL, num_local_experts=4)),
    "deepseek_v2": ("DeepseekV2Config", DEEPSEEK),
    "deepseek_v3": ("DeepseekV3Config", DEEPSEEK),
    "glm4_moe": ("Glm4MoeConfig", dict(DEEPSEEK, head_dim=8)),
    "mamba": ("MambaConfig", {"vocab_size": 1816, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
}  # fmt: skip
FAMILIES = {name: (getattr(transformers, kind), settings) for name, (kind, settings) in FAMILIES.items()}


def make(family: str) -> nn.Module:
    torch.manual_seed(0)
    kind, settings = FAMILIES[family]
    return AutoModelForCausalLM.from_config(kind(**settings), dtype=torch.float32)


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_as_save_pretrained_writes_it(family, tmp_path):
    """Made anew and loaded, in one file and in shards; what was written is what plain transformers asks for."""
    made = make(family)
    made.save_pretrained(tmp_path / "published")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "published")
    loaded.save_pretrained(tmp_path / "again")
    for folder, model, size in (("made", made, "1GB"), ("loaded", loaded, "1GB"), ("shards", loaded, "20KB")):
        (tmp_path / folder).mkdir()
        written = write_weights(model, tmp_path / folder, True, size)
        assert_equal(weights(tmp_path / folder), weights(tmp_path / ("published" if folder == "made" else "again")))
        compare_tensors(str(tmp_path / folder), written)
        made.config.save_pretrained(tmp_path / folder)
        check_names(str(tmp_path / folder))
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert {name: entry.file for name, entry in written.items()} == index["weight_map"]
    # Nothing larger than a layer is held together.
    sizes = [sum(entry.size for entry in group.sources) for group in published_groups(loaded)]
    layers = sum(parameter.nbytes for parameter in loaded.parameters()) - 2 * 1816 * 32 * 4
    assert max(sizes) <= max(1816 * 32 * 4, layers / 2)


# As the models of these names on the hub have them, written by hand.
HAND_WRITTEN = {
    "gpt_neox": [
        "embed_out.weight", "gpt_neox.embed_in.weight", "gpt_neox.final_layer_norm.bias",
        "gpt_neox.final_layer_norm.weight",
        *(f"gpt_neox.layers.{layer}.{part}" for layer in (0, 1) for part in (
            "attention.dense.bias", "attention.dense.weight", "attention.query_key_value.bias",
            "attention.query_key_value.weight", "input_layernorm.bias", "input_layernorm.weight",
            "mlp.dense_4h_to_h.bias", "mlp.dense_4h_to_h.weight", "mlp.dense_h_to_4h.bias",
            "mlp.dense_h_to_4h.weight", "post_attention_layernorm.bias", "post_attention_layernorm.weight")),
    ],
    "mixtral": [
        "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight",
        *(f"model.layers.{layer}.{part}.weight" for layer in (0, 1) for part in (
            "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj",
            "self_attn.v_proj", "self_attn.o_proj", "block_sparse_moe.gate",
            *(f"block_sparse_moe.experts.{expert}.w{number}" for expert in range(4) for number in (1, 2, 3)))),
    ],
    "qwen3_moe": [
        "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight",
        *(f"model.layers.{layer}.{part}.weight" for layer in (0, 1) for part in (
            "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj",
            "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm", "mlp.gate",
            *(f"mlp.experts.{expert}.{name}_proj" for expert in range(4) for name in ("gate", "up", "down")))),
    ],
    "deepseek_v3": [
        "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight",
        *(f"model.layers.{layer}.{part}.weight" for layer in (0, 1) for part in (
            "input_layernorm", "post_attention_layernorm", "self_attn.q_a_proj", "self_attn.q_a_layernorm",
            "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_a_layernorm", "self_attn.kv_b_proj",
            "self_attn.o_proj")),
        *(f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.e_score_correction_bias",
        *(f"model.layers.1.mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")),
        *(f"model.layers.1.mlp.experts.{expert}.{name}_proj.weight"
          for expert in range(4) for name in ("gate", "up", "down")),
    ],
}  # fmt: skip


@pytest.mark.parametrize("family", HAND_WRITTEN)
def test_as_the_hub_has_it(family, tmp_path):
    write_weights(make(family), tmp_path, True)
    assert sorted(weights(tmp_path)) == sorted(HAND_WRITTEN[family])


def test_verification_finds_what_is_not_the_written(tmp_path):
    from safetensors.torch import save_file

    from utils.errors import UserError

    model, tokenizer = make("mixtral"), AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt")
    written = save_model_folder(model, tokenizer, str(tmp_path))
    compare_tensors(str(tmp_path), written)
    good, name = load_file(tmp_path / "model.safetensors"), "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    flipped = good[name].clone()
    flipped.view(torch.uint8)[7, 9] ^= 1  # one bit
    for bad in ({**good, name: flipped}, {**good, "more": flipped}, {n: t for n, t in good.items() if n != name}):
        save_file(bad, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=rf"1 of {len(good)} tensors differ when read back \((more|{name})\)"):
            compare_tensors(str(tmp_path), written)
    with pytest.raises(UserError, match=f"1 missing keys|1 of .*{name}|does not load"):
        check_names(str(tmp_path))
    sample = torch.arange(5, 40)
    compare_tokenizers(str(tmp_path), tokenizer, sample)
    (tmp_path / "added_tokens.json").write_text('{"<left>": 1809}')  # as another tokenizer's save left it
    tokenizer.add_tokens(["spider"])
    with pytest.raises(UserError, match=r"tokenizer saved in .* is not the one trained with"):
        compare_tokenizers(str(tmp_path), tokenizer, sample)


def above_the_limit(argv: list[str]) -> None:
    """main.py where every model is above the size up to which it is run again."""
    import main
    from utils.export import verify

    verify.FORWARD_LIMIT = 0
    main.run(argv)


@pytest.mark.parametrize(
    ("family", "stage", "extra"),
    [
        ("mixtral", 3, ["--load_best_model_at_end"]),
        (
            "gpt_neox",
            3,
            ["--save_only_model", "--save_strategy", "epoch", "--lora_dim", "2", "--lora_module_name", "auto"],
        ),
    ],
)
def test_whole_runs(family, stage, extra, tmp_path):
    """Two ranks: the final model, the best model, LoRA merged, `--save_only_model`, in shards."""
    base, out = tmp_path / "base", tmp_path / "out"
    make(family).save_pretrained(base)
    AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt").save_pretrained(base)
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    printed = finished_run(
        [
            "--model_name_or_path", base, "--data_path", make_json_data(tmp_path, 12, 5), "--data_split", "10,0,0",
            "--data_output_path", tmp_path / "cache", "--max_seq_len", "64", "--dtype", "fp32", "--zero_stage", stage,
            "--per_device_train_batch_size", "3", "--output_dir", out, "--deepspeed_config", config,
            "--max_shard_size", "100KB", *extra,
        ],
        ranks=2,
        program=run_main if family == "mixtral" else above_the_limit,
    )  # fmt: skip
    expected = weights(base)
    folders = [out, *(out / "checkpoints").glob("*")]
    assert len(folders) == 2
    for folder in folders:
        saved = weights(folder)
        assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in expected.items()}
        assert any(not torch.equal(saved[name], expected[name]) for name in expected)
        check_names(str(folder))
    if family == "mixtral":
        assert "verified when it was kept" in printed
    else:
        assert "plain transformers finds each weight by name" in printed and "reloaded logits" not in printed
        assert "Merged: the weights of 8 LoRA layers are, to rounding, what the layers compute" in printed
        assert f"Saved to {out} and verified by checksums: above 0 GB of weights no second model is run" in printed
