"""The options of scoring; importing this module does not import torch."""

from __future__ import annotations

from typing import Literal

__all__ = ["Statistic", "Tail"]

Statistic = Literal["median", "mean"]
"""How a block's score is computed from its weights' scores: as in the paper, or released code."""

Tail = Literal["peak", "median"]
"""Where a spectrum's tail starts: at the best fit near its peak, or at its median."""
