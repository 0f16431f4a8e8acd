"""The processor's description is asked for once."""

import pytest

from utils.machine.cpu_info import cache_cpu_info


def test_a_second_answer_comes_from_memory(monkeypatch):
    cpuinfo = pytest.importorskip("cpuinfo")
    asked = []
    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: asked.append(1) or {"brand_raw": "a processor"})
    cache_cpu_info()
    cached = cpuinfo.get_cpu_info
    cache_cpu_info()
    assert cpuinfo.get_cpu_info is cached
    assert cpuinfo.get_cpu_info() == cpuinfo.get_cpu_info() == {"brand_raw": "a processor"}
    assert len(asked) == 1
