"""What there is to choose from in scoring, known without torch."""

from __future__ import annotations

from typing import Literal

__all__ = ["Statistic", "Tail"]

Statistic = Literal["median", "mean"]
"""What of a block's weight scores is its unimportance: paper, or released code."""

Tail = Literal["peak", "median"]
"""Where a spectrum's tail starts: at the best fit up to its peak, or at its median."""
