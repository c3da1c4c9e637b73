"""Sparsities in arithmetic progression over depth (arXiv 2502.14770)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from dlp_plugin.planning.methods.base import Method, Strength

if TYPE_CHECKING:
    from dlp_plugin.scoring.scores import Part

__all__ = ["LinearSparsity"]


class LinearSparsity(Method):
    """Sparsities that rise linearly with depth; needs no data, unless the slope is selected.

    The paper states no slope for all models. It searches for one, as ``auto`` does.

    :param beta: step from each block to the next, at least 0
    """

    beta: Strength = "auto"

    name: ClassVar[str] = "linear"
    title: ClassVar[str] = "Linear"
    modifier: ClassVar[str] = "LinearSparsityModifier"
    strength_field: ClassVar[str] = "beta"
    sees_activations: ClassVar[bool] = False

    @property
    def score_name(self) -> str:
        """The depth."""
        return "depth"

    def score(self, depth: int, parts: Mapping[str, Part]) -> float:
        """The block's place."""
        return float(depth)

    def half_range(
        self, strength: float, scores: Sequence[float], weights: Sequence[int], sparsity: float
    ) -> float:
        """Half of all steps: ``beta (L - 1) / 2`` over ``L`` blocks."""
        return strength * (len(scores) - 1) / 2

    def strength_of(
        self, half_range: float, scores: Sequence[float], weights: Sequence[int], sparsity: float
    ) -> float:
        """The step; of one block, any."""
        return half_range * (2 / (len(scores) - 1) if len(scores) > 1 else 1.0)
