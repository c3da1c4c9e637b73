"""Measures peak memory."""

from __future__ import annotations

import re
from pathlib import Path

import torch

__all__ = ["peak", "reset_peak"]

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Reset the peak memory of this process (on Linux) and of its GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if _RESET.exists():
        _RESET.write_text("5")


def peak() -> int | None:
    """Return the peak memory since :func:`reset_peak`.

    :return: bytes of the GPU if there is one (CUDA), else of this process, including memory that
        it held before the reset; None on systems other than Linux
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text()) if _RESET.exists() else None
    return int(found.group(1)) * 1024 if found else None
