"""The attention heads of a model's layers, and the kernel of each kind of them."""

from types import SimpleNamespace

import torch
from transformers import LlamaConfig

from tools.tiny_families import tiny_config
from utils.module import row_kernels
from utils.module.head_sizes import Heads, has_windows, heads_of

LLAMA = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=32)


def test_the_heads_of_every_kind_of_layer():
    """Gemma 4 has two kinds of layers, and refuses to be asked for one head size; DeepSeek's values are narrower."""
    gemma = tiny_config("gemma4_text")
    sizes = {layer.head_dim for layer in gemma.per_layer_config}
    assert {heads.size for heads in heads_of(gemma)} == sizes and len(sizes) == 2 and has_windows(gemma)
    latent = tiny_config("deepseek_v3")
    assert heads_of(latent) == [(1, latent.qk_nope_head_dim + latent.qk_rope_head_dim, latent.v_head_dim)]
    assert heads_of(LLAMA) == [(2, 8, 8)] and not has_windows(LLAMA)


def test_each_kind_of_heads_has_its_kernel_and_its_line(monkeypatch, capsys):
    monkeypatch.setattr(row_kernels, "heads_of", lambda config: [Heads(2, 48, 32), Heads(1, 512, 512)])
    monkeypatch.setattr(row_kernels, "_candidates", lambda heads, *_: [row_kernels._plain] if heads.size < 300 else [])
    checked, find_fault = [], row_kernels.find_fault

    def noted(*args):
        checked.append(args[5])
        return find_fault(*args[:3], torch.device("cpu"), *args[4:])

    monkeypatch.setattr(row_kernels, "find_fault", noted)
    row_kernels.check_kernels(LLAMA, torch.float32, SimpleNamespace(type="cuda"))
    assert capsys.readouterr().out.splitlines() == [
        "Attention, heads of 48: torch's _plain kernel (forward and gradients checked on this GPU)",
        "Attention, heads of 512: document by document, as no kernel of this GPU computes a row of them",
    ]
    assert checked == [(2, 48, 32)]
