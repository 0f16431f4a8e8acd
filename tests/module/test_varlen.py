"""Calls of torch's varlen kernel, which only a GPU has: tested with fakes of the signatures of torch 2.10 to 2.13.

Each fake computes its answer independently of the code under test and refuses what the real kernel refuses.
"""

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

import utils.module.attention
from utils.model.layout_check import choose_layout
from utils.module.attention import clear_documents, document_attention, set_documents

LENGTHS = [13, 5, 21, 2]
HEADS, KEY_HEADS, SIZE = 4, 2, 8


def kernel(query, key, value, cu_q, cu_k, max_q, max_k, left, scale):
    """Attend by a full matrix of scores: a query sees keys of its document, itself and `left` before it (-1: all)."""
    assert cu_q is cu_k and cu_q.dtype == torch.int32 and max_q == max_k == max(LENGTHS)
    assert all(tensor.dim() == 3 and tensor.is_contiguous() for tensor in (query, key, value))
    place = torch.arange(len(query))
    document = torch.bucketize(place, cu_q[1:], right=True)
    distance = place[:, None] - place[None, :]
    seen = (document[:, None] == document[None, :]) & (distance >= 0) & ((distance <= left) | (left < 0))
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal and query.shape == key.shape == value.shape
    return kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, -1, SIZE**-0.5)


def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert window_size[1] == 0 and query.shape == key.shape == value.shape
    scale = SIZE**-0.5 if scale is None else scale
    return kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size[0], scale)


def torch_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert window_size[1] == 0 and (enable_gqa or key.shape == query.shape)
    scale = SIZE**-0.5 if scale is None else scale
    return kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size[0], scale)


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(3)
    total = sum(LENGTHS)
    shapes = [(1, HEADS, total, SIZE), (1, KEY_HEADS, total, SIZE), (1, KEY_HEADS, total, SIZE)]
    set_documents(LENGTHS, torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32))
    yield [torch.randn(shape, generator=generator) for shape in shapes]
    clear_documents()


def answer(tensors, **options):
    return document_attention(torch.nn.Module(), *tensors, None, **options)[0]


@pytest.mark.parametrize("options", [{}, {"scaling": 1.0}, {"sliding_window": 5}], ids=str)
@pytest.mark.parametrize("signature", [torch_2_10, torch_2_11, torch_2_13])
def test_every_signature_gives_what_document_by_document_gives(signature, options, tensors, monkeypatch):
    expected = answer(tensors, **options)
    monkeypatch.setattr(utils.module.attention, "varlen_kernel", lambda: signature)
    monkeypatch.setattr(utils.module.attention, "_can_use_varlen", lambda *_: True)
    utils.module.attention._varlen_arguments.cache_clear()
    try:
        if signature is torch_2_10 and "sliding_window" in options:
            with pytest.raises(NotImplementedError, match="no sliding window"):
                answer(tensors, **options)
            return
        torch.testing.assert_close(answer(tensors, **options), expected)
    finally:
        utils.module.attention._varlen_arguments.cache_clear()


@pytest.mark.parametrize(
    ("capability", "dtype", "used"),
    [
        ((7, 5), torch.float16, False),
        ((8, 0), torch.float16, True),
        ((9, 0), torch.bfloat16, True),
        ((9, 0), torch.float32, False),
    ],
)
def test_gpus_without_flash_kernels_go_document_by_document(capability, dtype, used, monkeypatch):
    """On a T4 or V100 the kernel raises an error, so it must not be called."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    class OnGpu:
        device, shape = torch.device("cuda", 0), (1, 4, 10, 64)

    OnGpu.dtype = dtype
    assert utils.module.attention._can_use_varlen(OnGpu, OnGpu, 0.0, None) is used


@pytest.mark.parametrize(
    ("error", "falls_back"),
    [
        (RuntimeError("FlashAttention is not in this build"), True),
        (torch.OutOfMemoryError("out of memory"), False),
    ],
)
def test_a_kernel_that_is_not_there_means_padding_and_a_full_gpu_does_not(error, falls_back, monkeypatch, capsys):
    def fails(*args):
        raise error

    config = OPTConfig(
        hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = OPTForCausalLM(config)
    monkeypatch.setattr(utils.module.attention, "_can_use_varlen", lambda *_: True)
    monkeypatch.setattr(utils.module.attention, "_varlen", fails)
    if falls_back:
        assert choose_layout(model, "free", 64, torch.device("cpu")) == "longest"
        assert "Padding: longest" in (printed := capsys.readouterr().out) and str(error) in printed
        assert model.config._attn_implementation == "sdpa"
    else:
        with pytest.raises(torch.OutOfMemoryError):
            choose_layout(model, "free", 64, torch.device("cpu"))
        clear_documents()
