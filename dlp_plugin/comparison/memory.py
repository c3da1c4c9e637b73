"""How much memory something took, at its highest."""

from __future__ import annotations

import re
from pathlib import Path

import torch

__all__ = ["peak", "reset_peak"]

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Make the peaks of this process and of its GPU start anew, where that can be (Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if _RESET.exists():
        _RESET.write_text("5")


def peak() -> int | None:
    """Bytes that were held at once since :func:`reset_peak`.

    :return: of the GPU where there is one (CUDA), else of this process, with all that it had
        before; None where the system does not tell (it does on Linux)
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text()) if _RESET.exists() else None
    return int(found.group(1)) * 1024 if found else None
