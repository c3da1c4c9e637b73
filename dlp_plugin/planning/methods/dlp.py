"""Dynamic Layerwise Pruning (arXiv 2505.23807)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from dlp_plugin.planning.methods.base import Method, Strength
from dlp_plugin.scoring.choices import Statistic

if TYPE_CHECKING:
    from dlp_plugin.scoring.scores import Part

__all__ = ["DLP"]


class DLP(Method):
    """Blocks whose weights matter less on the calibration data are pruned more.

    :param alpha: half the range of the blocks' sparsities, at least 0 (uniform)
    :param statistic: of a block's weight scores, as its unimportance: ``median`` (the paper) or
        ``mean`` (the authors' released code)
    """

    alpha: Strength = 0.15
    statistic: Statistic = "median"

    name: ClassVar[str] = "dlp"
    title: ClassVar[str] = "DLP"
    modifier: ClassVar[str] = "DLPModifier"
    strength_field: ClassVar[str] = "alpha"

    @property
    def score_name(self) -> str:
        """The statistic of ``|W| * norm``."""
        return self.statistic

    def score(self, depth: int, parts: Mapping[str, Part]) -> float:
        """Unimportance ``U_b`` of a block."""
        from dlp_plugin.scoring.scores import block_score

        return block_score(parts, self.statistic)
