"""Peak memory."""

from __future__ import annotations

import re
from pathlib import Path

import torch

__all__ = ["peak", "reset_peak"]

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Reset the peaks of this process and of its GPU, where the system can (Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if _RESET.exists():
        _RESET.write_text("5")


def peak() -> int | None:
    """Peak memory in bytes since :func:`reset_peak`.

    :return: of the GPU where there is one (CUDA), else of this process, including what it held
        before; None where the system does not tell (Linux does)
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text()) if _RESET.exists() else None
    return int(found.group(1)) * 1024 if found else None
