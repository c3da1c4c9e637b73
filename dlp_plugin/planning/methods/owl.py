"""Outlier Weighed Layerwise sparsity (arXiv 2310.05175)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from dlp_plugin.planning.methods.base import Method, Strength

if TYPE_CHECKING:
    from dlp_plugin.scoring.scores import Part

__all__ = ["OWL"]


class OWL(Method):
    """Blocks with more outliers among their weight scores are pruned less.

    :param owl_m: a score is an outlier above so many times the block's mean; more than 0
    :param owl_lmbda: half the range of the blocks' sparsities, at least 0
    """

    owl_m: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    owl_lmbda: Strength = 0.08

    name: ClassVar[str] = "owl"
    title: ClassVar[str] = "OWL"
    modifier: ClassVar[str] = "OWLModifier"
    strength_field: ClassVar[str] = "owl_lmbda"

    @property
    def score_name(self) -> str:
        """The outlier ratio."""
        return f"% of scores above {self.owl_m:g} x mean"

    def score(self, depth: int, parts: Mapping[str, Part]) -> float:
        """Share of outliers, in percent."""
        from dlp_plugin.scoring.outliers import outlier_ratio

        return outlier_ratio(parts, self.owl_m)

    def unimportances(self, scores: Sequence[float]) -> list[float]:
        """How far the ratio lies below the largest, which is kept most (section 3.2)."""
        return [max(scores) - score for score in scores]
