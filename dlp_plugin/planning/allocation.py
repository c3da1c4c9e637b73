"""The allocation: from one unimportance per block to one sparsity per block.

Pure arithmetic in float64 on the standard library; section 3.3 of the DLP paper
(arXiv 2505.23807), with two repairs to its released code: blocks are weighted by their size, and
sparsities that are clipped at 0 or 1 are compensated in the other blocks. So the global sparsity
is always the target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["allocate", "check_sparsity", "check_strength", "importances"]

# Larger strengths change no sparsity any more, and sums with them lose precision.
_STRONGEST = 1e6


def check_sparsity(value: float, field: str = "sparsity") -> float:
    """Return ``value`` if it is a valid target sparsity.

    :param value: to check
    :param field: its name, for the error
    :raises ValueError: if it is not strictly between 0 and 1
    """
    if isinstance(value, bool) or not 0 < value < 1:
        raise ValueError(
            f"{field} must be strictly between 0 and 1, got {value}; it is the "
            "fraction of weights to set to zero, e.g. 0.7"
        )
    return value


def check_strength(value: float, field: str) -> float:
    """Return ``value`` if it is a usable strength.

    :param value: to check
    :param field: its name, for the error
    :raises ValueError: if it is negative or not finite
    """
    if isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(
            f"{field} must be finite and at least 0, got {value}; 0 is uniform "
            "sparsity, the default of DLP's paper is 0.15"
        )
    if value > _STRONGEST:
        raise ValueError(f"{field} must be at most {_STRONGEST:g}, got {value}; 0.15 is usual")
    return value


def importances(scores: Sequence[float]) -> list[float]:
    """Relative importance of blocks: ``I_b = 1 - U_b / sum(U)`` (paper, eq. 5).

    :param scores: unimportance ``U_b`` per block, finite and at least 0
    :return: one importance per block; ``1 - 1/blocks`` each if all scores are 0
    """
    total = math.fsum(scores)
    if total == 0:
        return [1 - 1 / len(scores)] * len(scores)
    return [1 - score / total for score in scores]


def allocate(
    scores: Sequence[float], weights: Sequence[int], sparsity: float, alpha: float
) -> list[float]:
    """Sparsity of every block from its unimportance (paper, eqs. 5 to 7).

    ``k_b = 2 alpha (I_b - I_min) / (I_max - I_min)`` is how much more of block ``b``
    is kept than of the least important block; a common shift then puts the global
    sparsity on target. In ``I`` the normalising sum cancels, so ``k_b`` is computed
    from ``U`` directly.

    Two blocks of equal size, U = 1 and 3, target 0.7, alpha 0.1: k = 0.2 and 0, so
    the blocks keep 0.4 and 0.2 and their sparsities are 0.6 and 0.8.

    :param scores: unimportance ``U_b`` per block, finite and at least 0
    :param weights: number of prunable weights per block, at least 1
    :param sparsity: target over all blocks together, in (0, 1)
    :param alpha: half the range of the blocks' sparsities, at least 0; the range is
        exactly ``2 * alpha`` unless a block is clipped at 0 or 1
    :return: sparsity per block in [0, 1]; their mean weighted by ``weights`` equals
        ``sparsity``; a block with a larger score never gets a smaller sparsity
    :raises ValueError: if a value is outside its bounds or the lengths differ
    """
    check_sparsity(sparsity)
    check_strength(alpha, "alpha")
    if not scores or len(scores) != len(weights):
        raise ValueError(
            f"need one score and one weight count per block, got {len(scores)} "
            f"scores and {len(weights)} weight counts"
        )
    for index, (score, count) in enumerate(zip(scores, weights, strict=True)):
        if not (math.isfinite(score) and score >= 0):
            raise ValueError(f"score of block {index} must be finite and at least 0, got {score}")
        if count < 1:
            raise ValueError(f"weights of block {index} must be at least 1, got {count}")

    highest, lowest = max(scores), min(scores)
    if highest == lowest:
        return [sparsity] * len(scores)
    extra = [2 * alpha * ((highest - u) / (highest - lowest)) for u in scores]
    shift = _shift(extra, weights, 1 - sparsity)
    return [1 - min(max(k + shift, 0.0), 1.0) for k in extra]


def _shift(extra: Sequence[float], weights: Sequence[int], keep: float) -> float:
    """Find ``c`` such that ``clip(extra + c, 0, 1)`` keeps the fraction ``keep``.

    The kept fraction is piecewise linear and does not fall as ``c`` grows. Its kinks
    are where a block leaves 0 (``-k``) or reaches 1 (``1 - k``): find the stretch
    between two kinks that holds the target and solve there.
    """
    total = sum(weights)

    def kept(shift: float) -> float:
        clipped = (min(max(k + shift, 0.0), 1.0) for k in extra)
        return math.fsum(w * k for w, k in zip(weights, clipped, strict=True)) / total

    kinks = sorted({-k for k in extra} | {1 - k for k in extra})
    upper = next(kink for kink in kinks if kept(kink) >= keep)
    lower = kinks[kinks.index(upper) - 1]
    middle = (lower + upper) / 2
    free = [(k, w) for k, w in zip(extra, weights, strict=True) if 0 < k + middle < 1]
    if not free:  # the two kinks are neighbouring floats
        return upper
    full = sum(w for k, w in zip(extra, weights, strict=True) if k + middle >= 1)
    wanted = keep * total - full - math.fsum(k * w for k, w in free)
    return wanted / sum(w for _, w in free)
