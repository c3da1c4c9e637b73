"""The peak of memory that a comparison tells."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dlp_plugin.comparison.memory import peak, reset_peak

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="told by Linux")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the peak is the GPU's")


@on_linux
@without_gpu
def test_what_was_held_at_once_counts_until_it_is_reset() -> None:
    reset_peak()
    before = peak()
    held = torch.ones(1 << 26)  # of 256 MB
    del held
    after = peak()
    assert after - before > 200 << 20
    reset_peak()
    assert peak() < after - (200 << 20)


@without_gpu
def test_none_where_the_system_does_not_tell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("dlp_plugin.comparison.memory._RESET", tmp_path / "clear_refs")
    reset_peak()
    assert peak() is None
    assert not any(tmp_path.iterdir())
