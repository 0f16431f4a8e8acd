"""Calls of a GPU's attention kernels, tested with fakes of their signatures in torch 2.10 to 2.13, which run on a CPU.

Each fake computes its answer independently of the code under test and refuses what the real kernel refuses.
"""

from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, OPTConfig, OPTForCausalLM

from utils.model.layout_check import choose_layout
from utils.module import row_kernels
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


def aten_flash(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale,
    window_size_left, window_size_right,
):  # fmt: skip
    assert dropout_p == 0 and not return_debug_mask and window_size_right == 0
    assert is_causal == (window_size_left == -1)
    answer = kernel(
        *(tensor.contiguous() for tensor in (query, key, value)), cum_seq_q, cum_seq_k, max_q, max_k,
        window_size_left, scale,
    )  # fmt: skip
    return answer, None, None, None, None


def aten_efficient(
    query, key, value, bias, cu_q, cu_k, max_q, max_k, dropout_p, custom_mask_type, compute_log_sumexp, *, scale
):
    """Of xFormers' mask types 1 is causal from the first token of each document; no grouped queries."""
    assert bias is None and dropout_p == 0 and custom_mask_type == 1 and compute_log_sumexp
    assert query.dim() == 4 and query.shape == key.shape == value.shape
    pieces = (tensor[0].contiguous() for tensor in (query, key, value))
    return kernel(*pieces, cu_q, cu_k, max_q, max_k, -1, scale)[None], None, None, None, None, None


@pytest.fixture
def operators(monkeypatch):
    """The operators of a GPU, computed on the CPU."""
    aten = SimpleNamespace(_flash_attention_forward=aten_flash, _efficient_attention_forward=aten_efficient)
    monkeypatch.setattr(row_kernels, "torch", SimpleNamespace(**{**vars(torch), "ops": SimpleNamespace(aten=aten)}))
    return aten


@pytest.mark.parametrize("options", [{}, {"scaling": 1.0}, {"sliding_window": 5}], ids=str)
@pytest.mark.parametrize("name", ["flash", "efficient"])
def test_the_operators_give_what_document_by_document_gives(name, options, tensors, operators, monkeypatch):
    if name == "efficient" and "sliding_window" in options:
        pytest.skip("has no windows: see test_which_kernels_a_gpu_has")
    expected = answer(tensors, **options)
    monkeypatch.setattr("utils.module.attention.kernels_for", lambda *_: [getattr(row_kernels, name)])
    torch.testing.assert_close(answer(tensors, **options), expected)


@pytest.mark.parametrize("name", ["flash", "efficient"])
def test_values_narrower_than_queries_go_through_a_kernel(name, tensors, operators, monkeypatch):
    """As in latent attention: kernels take one size. Output and gradients are those of document by document."""
    narrow = [*tensors[:2], tensors[2][..., :6]]
    outcomes = []
    for kernels in ([], [getattr(row_kernels, name)]):
        monkeypatch.setattr("utils.module.attention.kernels_for", lambda *_, kernels=kernels: kernels)
        inputs = [tensor.detach().requires_grad_() for tensor in narrow]
        output = answer(inputs)
        outcomes.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    torch.testing.assert_close(outcomes[1], outcomes[0])
    assert outcomes[1][0].shape[-1] == 6


@pytest.mark.parametrize("options", [{}, {"scaling": 1.0}, {"sliding_window": 5}], ids=str)
@pytest.mark.parametrize("signature", [torch_2_10, torch_2_11, torch_2_13])
def test_every_signature_gives_what_document_by_document_gives(signature, options, tensors, monkeypatch):
    expected = answer(tensors, **options)
    monkeypatch.setattr(row_kernels, "varlen_kernel", lambda: signature)
    monkeypatch.setattr("utils.module.attention.kernels_for", lambda *_: [row_kernels.varlen])
    row_kernels._varlen_arguments.cache_clear()
    try:
        if signature is torch_2_10 and "sliding_window" in options:
            with pytest.raises(NotImplementedError, match="no sliding window"):
                answer(tensors, **options)
            return
        torch.testing.assert_close(answer(tensors, **options), expected)
    finally:
        row_kernels._varlen_arguments.cache_clear()


@pytest.mark.parametrize(
    ("capability", "dtype", "options", "names"),
    [
        ((7, 0), torch.float16, {}, ["efficient"]),
        ((7, 5), torch.float16, {"dropout": 0.1}, ["efficient"]),
        ((7, 5), torch.bfloat16, {}, []),
        ((7, 5), torch.float16, {"window": 30}, []),
        ((8, 0), torch.float16, {}, ["flash", "varlen", "efficient"]),
        ((9, 0), torch.bfloat16, {"dropout": 0.1}, ["flash", "efficient"]),
        ((9, 0), torch.bfloat16, {"window": 30}, ["flash", "varlen"]),
        ((9, 0), torch.bfloat16, {"window": 50}, ["flash", "varlen", "efficient"]),
        ((9, 0), torch.float32, {}, ["efficient"]),
    ],
)
def test_which_kernels_a_gpu_has(capability, dtype, options, names, monkeypatch):
    """On a T4 or V100 flash kernels raise an error, so they must not be called."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(row_kernels, "varlen_kernel", lambda: torch_2_13)
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0), shape=(1, 4, 90, 64), dtype=dtype)
    row = row_kernels.Row(None, 50, 1.0, **options)
    assert [found.__name__ for found in row_kernels.kernels_for(on_gpu, on_gpu, row)] == names
    odd = SimpleNamespace(device=torch.device("cuda", 0), shape=(1, 4, 90, 50), dtype=dtype)
    assert row_kernels.kernels_for(odd, odd, row) == [], "no kernel has heads of 50"


LLAMA = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=32)


def on_gpu(monkeypatch, kernels):
    """Make the CPU a GPU that has these kernels, so that they are checked."""

    def found(query, value, row):
        return [one for one in kernels if one not in row_kernels._wrong]

    monkeypatch.setattr(row_kernels, "kernels_for", found)
    return SimpleNamespace(type="cuda")


def scaled_backward(function, query, key, value, row):
    """The right output, with gradients that are too large by a quarter."""
    answer = function(query, key, value, row)
    return answer.detach() + 1.25 * (answer - answer.detach())


def forgets_its_mask(query, key, value, row):
    """Attention that draws the dropout of its backward anew."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            ctx.save_for_backward(value)
            return drop(value)

        @staticmethod
        def backward(ctx, gradient):
            (value,) = ctx.saved_tensors
            with torch.enable_grad():
                value = value.detach().requires_grad_()
                return torch.autograd.grad(drop(value), value, gradient)[0]

    def drop(value):
        value = torch.nn.functional.dropout(value, row.dropout)
        return row_kernels._plain(query, key, value, row._replace(dropout=0.0))

    return Attention.apply(value) if row.dropout else row_kernels._plain(query, key, value, row)


def keeps_its_mask(query, key, value, row):
    return row_kernels._plain(query, key, torch.nn.functional.dropout(value, row.dropout), row)


@pytest.mark.parametrize(
    ("fault", "config", "words"),
    [
        (lambda *one: scaled_backward(row_kernels._plain, *one), LLAMA, "its gradient differs by"),
        (lambda *one: row_kernels._plain(*one) * 1.5, LLAMA, "its output differs by"),
        (lambda query, key, value, row: row_kernels._plain(query, key, value, row._replace(window=None)),
         LlamaConfig(**{**LLAMA.to_dict(), "sliding_window": 4}), "its output differs by"),
        (forgets_its_mask, GPT2Config(n_embd=32, n_head=4), "drops other weights"),
    ],
    ids=["gradient", "output", "window", "dropout"],
)  # fmt: skip
def test_a_kernel_that_is_wrong_is_found_before_training(fault, config, words, monkeypatch, capsys):
    def broken(*args):
        return fault(*args)

    device = on_gpu(monkeypatch, [broken, keeps_its_mask])
    monkeypatch.setattr(row_kernels, "find_fault", lambda *args, real=row_kernels.find_fault: real(
        *args[:3], torch.device("cpu"), *args[4:]))  # fmt: skip
    monkeypatch.setattr(row_kernels, "_candidates", lambda *args: row_kernels.kernels_for(None, None, None))
    row_kernels.check_kernels(config, torch.float32, device)
    printed = capsys.readouterr().out.splitlines()
    assert "torch's broken kernel is not used" in printed[0] and words in printed[0], printed
    assert "torch's keeps_its_mask kernel (forward and gradients checked" in printed[1]
    assert row_kernels.kernels_for(None, None, None) == [keeps_its_mask]
    row_kernels._wrong.clear()


def test_flash_attention_3_is_used_where_it_is_right(monkeypatch, capsys):
    activated = []

    def check(config=LLAMA):
        row_kernels.check_kernels(config, torch.bfloat16, SimpleNamespace(type="cuda"))
        return capsys.readouterr().out.strip()

    active = SimpleNamespace(
        activate_flash_attention_impl=activated.append, current_flash_attention_impl=lambda: activated or None,
        restore_flash_attention_impl=activated.clear,
    )  # fmt: skip
    monkeypatch.setattr(
        row_kernels, "torch", SimpleNamespace(**{**vars(torch), "nn": SimpleNamespace(attention=active)})
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(row_kernels.importlib.util, "find_spec", lambda name: name == "flash_attn_interface")
    monkeypatch.setattr(row_kernels, "_candidates", lambda *args: [row_kernels.flash])
    monkeypatch.setattr(row_kernels, "find_fault", lambda *args: None)
    assert "FlashAttention-3" in check() and activated == ["FA3"]
    # It has no dropout, and one that is wrong is taken back.
    assert "torch's flash kernel" in check(GPT2Config(n_embd=32, n_head=4)) and not activated
    monkeypatch.setattr(row_kernels, "find_fault", lambda *args: "it is wrong" if activated else None)
    assert "not used: it is wrong" in (printed := check()) and "torch's flash kernel" in printed and not activated


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
    monkeypatch.setattr("utils.module.attention.kernels_for", lambda *_: [fails])
    if falls_back:
        assert choose_layout(model, "free", 64, torch.device("cpu")) == "longest"
        assert "Padding: longest" in (printed := capsys.readouterr().out) and str(error) in printed
        assert model.config._attn_implementation == "sdpa"
    else:
        with pytest.raises(torch.OutOfMemoryError):
            choose_layout(model, "free", 64, torch.device("cpu"))
        clear_documents()
