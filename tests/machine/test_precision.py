"""Which processors multiply bf16 by instructions of their own, and what `--dtype auto` and attention make of it."""

import pytest
import torch

from utils.machine.precision import cpu_has_bf16, resolve_dtype
from utils.module.cpu_attention import FASTER_IN_FLOAT32, cpu_attention

PROCESSORS = {  # what torch says: oneDNN takes bf16, AVX-512, its bf16 instructions, AMX
    "AVX2": (False, False, False, False),
    "AVX-512 without bf16": (True, True, False, False),  # Skylake to Ice Lake, and virtual machines that hide the rest
    "AVX-512 with bf16": (True, True, True, False),
    "AMX": (True, True, False, True),
    "ARM with bf16": (True, False, False, False),
}
SLOW = ("AVX2", "AVX-512 without bf16")


@pytest.fixture
def processor(monkeypatch):
    """Return a function that makes torch describe the processor of this name."""

    def describe(name: str) -> None:
        onednn, *rest = PROCESSORS[name]
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
        for probe, value in zip(("avx512", "avx512_bf16", "amx_tile"), rest, strict=True):
            monkeypatch.setattr(torch.cpu, f"_is_{probe}_supported", lambda value=value: value)

    return describe


@pytest.mark.parametrize("name", PROCESSORS)
def test_auto_takes_bf16_only_where_it_is_fast(processor, name):
    processor(name)
    assert cpu_has_bf16() == (name not in SLOW)
    assert resolve_dtype("auto")[0] == ("fp32" if name in SLOW else "bf16")
    dtype, reason = resolve_dtype("bf16")
    assert dtype == "bf16" and ("no bf16 instructions" in reason) == (name in SLOW)


def test_long_documents_are_computed_in_float32_where_bf16_is_slow(processor):
    generator = torch.Generator().manual_seed(0)
    length = FASTER_IN_FLOAT32 + 20
    query, key, value = (torch.randn(1, 2, length, 16, generator=generator).bfloat16() for _ in range(3))
    in_float32 = cpu_attention(query.float(), key.float(), value.float(), [length], 0.25).bfloat16()
    processor("AVX-512 without bf16")
    assert torch.equal(cpu_attention(query, key, value, [length], 0.25), in_float32)
    processor("AVX-512 with bf16")
    assert not torch.equal(cpu_attention(query, key, value, [length], 0.25), in_float32)
