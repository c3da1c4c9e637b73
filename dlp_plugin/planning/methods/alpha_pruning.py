"""AlphaPruning (arXiv 2410.10912)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import field_validator

from dlp_plugin.planning.methods.base import Method, Strength
from dlp_plugin.scoring.choices import Tail

if TYPE_CHECKING:
    from dlp_plugin.scoring.scores import Part

__all__ = ["AlphaPruning"]


class AlphaPruning(Method):
    """Blocks whose weight spectra have heavier tails are pruned less; needs no data.

    :param epsilon: half the range of the blocks' sparsities in proportion to their mean,
        from 0 to 1
    :param tail: where a spectrum's tail starts: at the best fit up to its ``peak`` (the
        released code's default) or at its ``median``
    """

    epsilon: Strength = 0.3
    tail: Tail = "peak"

    name: ClassVar[str] = "alpha_pruning"
    title: ClassVar[str] = "AlphaPruning"
    modifier: ClassVar[str] = "AlphaPruningModifier"
    strength_field: ClassVar[str] = "epsilon"
    sees_activations: ClassVar[bool] = False

    @field_validator("epsilon")
    @classmethod
    def _check_epsilon(cls, value: Strength) -> Strength:
        if not isinstance(value, str) and value > 1:
            raise ValueError(f"epsilon must be at most 1, got {value}; the paper's is 0.3")
        return value

    @property
    def score_name(self) -> str:
        """The power-law exponent."""
        return f"power-law exponent, tail from the {self.tail}"

    def score(self, depth: int, parts: Mapping[str, Part]) -> float:
        """Mean exponent of the block's Linears."""
        from dlp_plugin.scoring.spectra import block_exponent

        return block_exponent({name: weight for name, (weight, _) in parts.items()}, self.tail)

    def half_range(
        self, strength: float, scores: Sequence[float], weights: Sequence[int], sparsity: float
    ) -> float:
        """Half the range of the sparsities ``eta p_b`` (eq. 3).

        ``p_b`` lies between ``1 - epsilon`` and ``1 + epsilon`` in proportion to the exponents,
        and ``eta`` puts the total on target, so half the range is ``eta epsilon``.
        """
        lowest, highest = min(scores), max(scores)
        if lowest == highest:
            return 0.0
        spread = [2 * strength * (score - lowest) / (highest - lowest) for score in scores]
        total = math.fsum(w * (1 - strength + p) for w, p in zip(weights, spread, strict=True))
        return strength * sparsity * sum(weights) / total

    def strength_of(
        self, half_range: float, scores: Sequence[float], weights: Sequence[int], sparsity: float
    ) -> float:
        """The epsilon of a half range, at most 1; 0 where all exponents are equal.

        With ``D = sum w_b (1 - 2 r_b)`` and ``r_b`` the exponents' places in [0, 1], the total
        of the weighted ``p_b`` is ``sum w_b - epsilon D``.
        """
        lowest, highest = min(scores), max(scores)
        if lowest == highest:
            return 0.0
        places = [(score - lowest) / (highest - lowest) for score in scores]
        lean = math.fsum(w * (1 - 2 * r) for w, r in zip(weights, places, strict=True))
        wanted = half_range * sum(weights)
        total = sparsity * sum(weights) + half_range * lean
        return wanted / total if wanted < total else 1.0
