"""What the tests say of the processor, and the imitation of one that has AVX2 only."""

from pathlib import Path

import processor
import pytest
import torch
from helpers import ROOT

NEWER = ["avx512_f", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16", "avx10_1"]


@pytest.fixture
def unheld(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*processor.HOLDING, "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)


def test_every_run_says_what_it_is_on(request: pytest.FixtureRequest, unheld: None) -> None:
    hook = request.config.pluginmanager.hook.pytest_report_header
    told = hook(config=request.config, start_path=ROOT)
    assert processor.head() in told
    kind, computes, host = processor.head()
    assert kind.endswith("), as it is")
    assert computes.endswith(("compute in bfloat16", "compute in float32"))
    assert host.startswith("host: llmcompressor 0.")


def test_and_what_holds_it_to_less(monkeypatch: pytest.MonkeyPatch, unheld: None) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("PYTHONPATH", "tests/engines/avx2")
    by = "ATEN_CPU_CAPABILITY=avx2, ONEDNN_MAX_CPU_ISA=AVX2, vLLM's plugin for AVX2"
    assert processor.head()[0].endswith(f"imitating another by {by}")


def test_the_instructions_are_named_as_a_buyer_knows_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "cpuinfo"
    flags = "fma avx2 avx512f amx_bf16 avx512_bf16 amx_tile"
    file.write_text(f"model name\t: Xeon\nflags\t\t: {flags}\n")
    monkeypatch.setattr("record.Path", lambda _: file)
    assert processor.processor() == "Xeon"
    assert processor.instruction_sets() == ["AVX2", "AVX-512", "bf16", "AMX"]
    file.unlink()  # not on Linux
    assert processor.processor()
    assert processor.instruction_sets() == []


def test_whoever_asks_torch_finds_avx2_and_nothing_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM chooses its library and its kernels by, on a processor that has everything."""
    has = dict.fromkeys(["avx2", "fma3", "f16c", *NEWER], True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {**has, "architecture": "x86_64"})
    assert torch.cpu._is_amx_tile_supported()
    monkeypatch.syspath_prepend(ROOT / "tests" / "engines" / "avx2")
    from vllm_avx2 import platform

    platform()
    left = {"avx2": True, "fma3": True, "f16c": True, "architecture": "x86_64"}
    assert torch.cpu.get_capabilities() == left
    assert torch.cpu._is_avx2_supported()
    for ask in ("avx512", "avx512_bf16", "amx_tile", "amx_fp16", "vnni"):
        assert not getattr(torch.cpu, f"_is_{ask}_supported")(), ask
