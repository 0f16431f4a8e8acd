"""Attention kernels of a GPU for a row of documents; which of them this GPU and this torch have right.

Flash attention (Dao 2023, https://arxiv.org/abs/2307.08691) and memory-efficient attention (Rabe & Staats 2021,
https://arxiv.org/abs/2112.05682) are called by the operators that torch's own attention uses: their backward is
torch's, they take dropout, and they cost the host less than the public `varlen_attn`, which is the fall-back. As those
operators are not public, `check_kernels` compares each with plain attention before training.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers

from utils.distributed.ranks import print_rank_0
from utils.module.head_sizes import Heads, attention_dropout, has_windows, heads_of

FLASH_CAPABILITY = (8, 0)  # Ampere: flash kernels raise an error on older GPUs
FLASH_3_CAPABILITY = (9, 0)  # Hopper alone
CAUSAL = 1  # of memory-efficient attention's mask types
LENGTHS = (37, 5, 22)  # of the documents that kernels are checked with: no multiple of a kernel's block
LIMITS = {
    torch.float32: 1e-3,
    torch.float16: 1e-2,
    torch.bfloat16: 4e-2,
}  # largest error, relative to the largest value


class Row(NamedTuple):
    """The documents of a row, and what is asked of their attention."""

    cu_seqlens: torch.Tensor  # [documents + 1] int32 on the device: 0 and the running sums of the lengths
    longest: int  # document, in tokens
    scaling: float  # factor on the scores
    window: int | None = None  # tokens a query sees, itself included
    dropout: float = 0.0


# (query [tokens, heads, size], key and value [tokens, key heads, size], row) -> [tokens, heads, size]
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Row], torch.Tensor]


def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: Row) -> torch.Tensor:
    """Compute flash attention by torch's operator: dropout, windows and grouped queries included."""
    left = -1 if row.window is None else row.window - 1
    return torch.ops.aten._flash_attention_forward(
        query, key, value, row.cu_seqlens, row.cu_seqlens, row.longest, row.longest, row.dropout, left < 0, False,
        scale=row.scaling, window_size_left=left, window_size_right=0,
    )[0]  # fmt: skip


def efficient(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: Row) -> torch.Tensor:
    """Compute memory-efficient attention by torch's operator: in float32 and on GPUs before Ampere; no windows."""
    key, value = _repeated(key, value, query.shape[1])
    return torch.ops.aten._efficient_attention_forward(
        query[None], key[None], value[None], None, row.cu_seqlens, row.cu_seqlens, row.longest, row.longest,
        row.dropout, CAUSAL, True, scale=row.scaling,
    )[0][0]  # fmt: skip


def varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: Row) -> torch.Tensor:
    """Compute flash attention by torch's public function, without dropout."""
    takes = _varlen_arguments()
    options: dict = {"window_size": ((row.window or 0) - 1, 0)} if "window_size" in takes else {"is_causal": True}
    if row.window is not None and "window_size" not in takes and row.longest > row.window:
        raise NotImplementedError("this torch's varlen attention has no sliding window")
    # Older kernels take no scale and no grouped queries: scaling the query costs a rounding, repeating keys memory.
    if "scale" in takes:
        options["scale"] = row.scaling
    else:
        query = query * (row.scaling * query.shape[-1] ** 0.5)
    if key.shape[1] != query.shape[1] and "enable_gqa" in takes:
        options["enable_gqa"] = True
    else:
        key, value = _repeated(key, value, query.shape[1])
    query, key, value = (tensor.contiguous() for tensor in (query, key, value))
    return varlen_kernel()(query, key, value, row.cu_seqlens, row.cu_seqlens, row.longest, row.longest, **options)


def _repeated(key: torch.Tensor, value: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return key and value with as many heads as the query."""
    groups = heads // key.shape[1]
    return (key, value) if groups == 1 else (key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))


@functools.cache
def varlen_kernel() -> Callable[..., torch.Tensor] | None:
    """Return torch's varlen attention; None from a torch built without it.

    It is imported when it is wanted: it brings torch's compiler, a second that runs on a CPU do without.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@functools.cache
def _varlen_arguments() -> frozenset[str]:
    """Return the argument names of this torch's varlen_attn: 2.11 added scale and window_size, 2.12 enable_gqa."""
    return frozenset(inspect.signature(varlen_kernel()).parameters)


_wrong: set[Kernel] = set()  # kernels that `check_kernels` found wrong or missing in this process


def kernels_for(query: torch.Tensor, value: torch.Tensor, row: Row) -> list[Kernel]:
    """Return the kernels that can compute this on its device, the best first, without those found wrong.

    query, value: [batch, heads, tokens, head size]
    """
    size = query.shape[-1]
    if query.device.type != "cuda" or query.shape[0] != 1 or size < value.shape[-1]:
        return []
    found: list[Kernel] = []
    has_flash = torch.cuda.get_device_capability(query.device) >= FLASH_CAPABILITY
    if has_flash and query.dtype in (torch.float16, torch.bfloat16) and size <= 256 and size % 8 == 0:
        found.append(flash)
        if row.dropout == 0 and varlen_kernel() is not None:
            found.append(varlen)
    aligned = size % (4 if query.dtype == torch.float32 else 8) == 0
    if aligned and (has_flash or query.dtype != torch.bfloat16) and (row.window is None or row.longest <= row.window):
        found.append(efficient)
    return [kernel for kernel in found if kernel not in _wrong]


def compute(kernel: Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: Row) -> torch.Tensor:
    """Compute attention by a kernel, which takes values of the queries' size: narrower ones get zeros behind them."""
    size, missing = value.shape[-1], query.shape[-1] - value.shape[-1]
    return kernel(query, key, F.pad(value, (0, missing)) if missing else value, row)[..., :size]


def check_kernels(config: transformers.PretrainedConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Compare every kernel that attention of this kind could use with plain attention; print what will be used.

    A kernel that is missing or wrong, in its forward, its gradients or its dropout, is not used in this process.
    """
    if device.type != "cuda":
        return
    _wrong.clear()
    _restore_flash_2()
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        print_rank_0("Attention: document by document, as no kernel soft-caps scores")
        return
    dropout, kinds = attention_dropout(config), heads_of(config)
    has_flash = all(flash in _candidates(heads, dtype, device, dropout) for heads in kinds)
    if dropout == 0 and has_flash and _activate_flash_3(device):
        faults = [find_fault(flash, config, dtype, device, dropout, heads) for heads in kinds]
        if (fault := next(filter(None, faults), None)) is None:
            print_rank_0("Attention: FlashAttention-3 (forward and gradients checked on this GPU)")
            return
        _restore_flash_2()
        print_rank_0(f"Attention: FlashAttention-3 is installed but not used: {fault}")
    for heads in kinds:
        what = "Attention" if len(kinds) == 1 else f"Attention, heads of {heads.size}"
        for kernel in _candidates(heads, dtype, device, dropout):
            fault = find_fault(kernel, config, dtype, device, dropout, heads)
            if fault is None:
                print_rank_0(f"{what}: torch's {kernel.__name__} kernel (forward and gradients checked on this GPU)")
                break
            _wrong.add(kernel)
            print_rank_0(f"{what}: torch's {kernel.__name__} kernel is not used: {fault}")
        else:
            print_rank_0(f"{what}: document by document, as no kernel of this GPU computes a row of them")


def _candidates(heads: Heads, dtype: torch.dtype, device: torch.device, dropout: float) -> list[Kernel]:
    query, value = (torch.empty((1, 1, 1, size), dtype=dtype, device=device) for size in heads[1:])
    return kernels_for(query, value, Row(query, 1, 1.0, None, dropout))


def find_fault(
    kernel: Kernel, config: transformers.PretrainedConfig, dtype: torch.dtype, device: torch.device, dropout: float,
    heads: Heads,
) -> str | None:  # fmt: skip
    """Return what is wrong with a kernel on this device, with these heads of the model; None for nothing."""
    groups, size, value_size = heads
    # Slices of one projection, as some families' queries, keys and values are: in steps larger than their size.
    shape = (sum(LENGTHS), 2 * groups + 4, size)
    fused = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).to(device, torch.int32)
    row = Row(offsets, max(LENGTHS), 0.7 * size**-0.5)
    rows = [row]
    if kernel is not efficient and has_windows(config):
        rows.append(row._replace(window=8))
    try:
        with torch.enable_grad():
            faults = [_fault_of_values(kernel, fused, device, one, value_size) for one in rows]
            faults.append(_fault_of_dropout(kernel, fused.to(device), row, value_size) if dropout > 0 else None)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError, NotImplementedError, ValueError) as err:
        return " ".join(str(err).split())[:200]
    return next((fault for fault in faults if fault), None)


def _fault_of_values(
    kernel: Kernel, fused: torch.Tensor, device: torch.device, row: Row, value_size: int
) -> str | None:
    """Compare output and gradient with those of plain attention in float32, document by document."""
    actual = _outcome(kernel, fused.to(device), row, value_size)
    expected = _outcome(_plain, fused.float(), row, value_size)
    for name, one, right in zip(("output", "gradient"), actual, expected, strict=True):
        error = ((one.float().cpu() - right).abs().max() / right.abs().max()).item()
        if not error < LIMITS[fused.dtype]:
            return f"its {name} differs by {error:.1e} of the largest value"
    return None


def _fault_of_dropout(kernel: Kernel, fused: torch.Tensor, row: Row, value_size: int) -> str | None:
    """Check that the backward drops the weights that the forward dropped.

    The output is linear in the values, so its product with itself is that of the values with their gradient in the
    direction of the output. With other weights dropped the two differ by half.
    """
    output, gradient = _outcome(kernel, fused, row._replace(dropout=0.5), value_size)
    own, other = output.float().square().sum(), (gradient[:, -2:].float() * fused[:, -2:].float()).sum()
    return None if ((own - other).abs() < 0.1 * own).item() else "its backward drops other weights than its forward"


def _outcome(kernel: Kernel, fused: torch.Tensor, row: Row, value_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output, and the gradient in the output's direction, of [tokens, heads + 2 * key heads, size]."""
    fused = fused.detach().requires_grad_()
    query, key, value = fused.split([fused.shape[1] - 4, 2, 2], dim=1)
    value = value[..., :value_size]
    output = kernel(query, key, value, row) if kernel is _plain else compute(kernel, query, key, value, row)
    (gradient,) = torch.autograd.grad(output, fused, output.detach())
    return output.detach(), gradient


def _plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: Row) -> torch.Tensor:
    """Compute what the kernels do, document by document from whole matrices of scores."""
    key, value = _repeated(key, value, query.shape[1])
    parts = []
    for q, k, v in zip(*(tensor.split(LENGTHS) for tensor in (query, key, value)), strict=True):
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))[None, :]
        seen = (distance >= 0) & (distance < (row.window or len(q)))
        scores = torch.einsum("qhd,khd->hqk", q, k) * row.scaling
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v))
    return torch.cat(parts)


def _activate_flash_3(device: torch.device) -> bool:
    """Make torch's flash operators call FlashAttention-3, where this is Hopper and its package is installed."""
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if activate is None or torch.cuda.get_device_capability(device) != FLASH_3_CAPABILITY:
        return False
    if importlib.util.find_spec("flash_attn_interface") is None:
        return False
    try:
        activate("FA3")
    except (ImportError, RuntimeError, ValueError, OSError, AttributeError) as err:
        print_rank_0(f"Attention: FlashAttention-3 can't be activated ({' '.join(str(err).split())[:200]})")
        return False
    return True


def _restore_flash_2() -> None:
    """Undo `_activate_flash_3`."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)
    if current() is not None:
        with suppress(RuntimeError):
            torch.nn.attention.restore_flash_attention_impl()
