"""The allocation: one unimportance per block in, one sparsity per block out.

Pure arithmetic in float64 on the standard library; section 3.3 of the DLP paper
(arXiv 2505.23807), with two repairs to its released code: block sizes weigh in, and
what is cut off at 0 or 1 is redistributed, so the global sparsity is always the target.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise, product
from typing import Literal

__all__ = [
    "Method",
    "Statistic",
    "allocate",
    "check_alpha",
    "check_sparsity",
    "check_target",
    "check_whole",
    "half_range",
    "importances",
    "split_structure",
    "unimportances",
    "whole_numbers",
]

Method = Literal["dlp", "owl", "alpha_pruning", "linear"]
"""What a block's score is: DLP's, OWL's, AlphaPruning's, or its depth."""

Statistic = Literal["median", "mean"]
"""What of a block's weight scores is its unimportance: paper, or released code."""


# No sparsities lie further apart, and sums with far greater numbers lose their digits.
_STRONGEST = 1e6
# Roundings that are tried where blocks have several sizes.
_TRIED = 1 << 14


def check_sparsity(value: float, field: str = "sparsity") -> float:
    """Return ``value`` if it is a sparsity that can be aimed at.

    :raises ValueError: if it is not strictly between 0 and 1
    """
    if isinstance(value, bool) or not 0 < value < 1:
        raise ValueError(
            f"{field} must be strictly between 0 and 1, got {value}; it is the "
            "fraction of weights to set to zero, e.g. 0.7"
        )
    return value


def check_alpha(value: float, field: str = "alpha") -> float:
    """Return ``value`` if it is a usable strength.

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


def split_structure(mask_structure: str) -> tuple[int, int]:
    """N and M of a stage's ``mask_structure``: of every M consecutive weights N are zero.

    :return: 0 and 0 for ``0:0``, which is no structure
    :raises ValueError: if it is neither ``0:0`` nor ``N:M`` with N from 1 to M - 1
    """
    left, _, right = mask_structure.partition(":")
    n, m = (int(part) if part.isdecimal() and len(part) < 10 else -1 for part in (left, right))
    if not (0 < n < m or n == m == 0):
        raise ValueError(
            f"mask_structure must be N:M, with N zeros in every M weights and 0 < N < M, or "
            f"0:0 for none, got {mask_structure!r}"
        )
    return n, m


def check_target(value: float, mask_structure: str, field: str = "sparsity") -> float:
    """Return ``value``, or with N:M the exact N / M if ``value`` is that.

    :raises ValueError: naming both, if it is not
    """
    n, m = split_structure(mask_structure)
    if not m:
        return value
    if not abs(value - n / m) < 1e-4:
        raise ValueError(
            f"{field} is {value:g}, but mask_structure {mask_structure} is {n / m:.4g} on average: "
            "leave out the one that is not meant"
        )
    return n / m


def importances(scores: Sequence[float]) -> list[float]:
    """Relative importance of blocks: ``I_b = 1 - U_b / sum(U)`` (paper, eq. 5).

    :param scores: unimportance ``U_b`` per block, finite and at least 0
    :return: one importance per block; ``1 - 1/blocks`` each if all scores are 0
    """
    total = math.fsum(scores)
    if total == 0:
        return [1 - 1 / len(scores)] * len(scores)
    return [1 - score / total for score in scores]


def unimportances(method: Method, scores: Sequence[float]) -> list[float]:
    """Scores turned so that a larger one asks for a larger sparsity.

    DLP's scores, AlphaPruning's exponents and depths are so already; of OWL's outlier
    ratios the largest is to be kept most (arXiv 2310.05175, section 3.2).
    """
    if method == "owl":
        return [max(scores) - score for score in scores]
    return list(scores)


def half_range(
    method: Method,
    strength: float,
    scores: Sequence[float],
    weights: Sequence[int],
    sparsity: float,
) -> float:
    """Half the range of the sparsities (before clipping) from a method's own strength.

    - ``dlp``: alpha, and ``owl``: lambda, are that very half;
    - ``linear``: beta is the step from block to block (arXiv 2502.14770), so half the
      range over ``L`` blocks is ``beta (L - 1) / 2``;
    - ``alpha_pruning``: the sparsities are ``eta p_b`` with ``p_b`` between ``1 - epsilon``
      and ``1 + epsilon`` in proportion to the exponents, and ``eta`` such that the total
      is on target (arXiv 2410.10912, eq. 3), so half the range is ``eta epsilon``.

    :param strength: alpha, lambda, beta or epsilon
    :param scores: one per block, as the method makes them
    :param weights: number of prunable weights per block
    :param sparsity: target over all blocks together
    :raises ValueError: if an epsilon is above 1
    """
    if method == "linear":
        return strength * (len(scores) - 1) / 2
    if method == "alpha_pruning":
        if strength > 1:
            raise ValueError(f"AlphaPruning's epsilon must be at most 1, got {strength}")
        lowest, highest = min(scores), max(scores)
        if lowest == highest:
            return 0.0
        spread = [2 * strength * (score - lowest) / (highest - lowest) for score in scores]
        total = math.fsum(w * (1 - strength + p) for w, p in zip(weights, spread, strict=True))
        return strength * sparsity * sum(weights) / total
    return strength


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
    check_alpha(alpha)
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


def whole_numbers(
    sparsities: Sequence[float], weights: Sequence[int], sparsity: float, m: int
) -> list[int]:
    """Round sparsities to N zeros in every M weights, with the total as near as can be.

    Every block gets the whole part of ``sparsity_b * m``, and some get one N more: among
    blocks of one size those with the largest parts missing (of equal parts the less
    important), and of each size as many as bring the total nearest to the target. With
    blocks of one size the total hits the target, and no other such rounding has a smaller
    square error. With others it is off by at most half of one N of one block; where they
    have too many sizes to try all, one N at a time is handed out, to the largest part
    missing, until the total is nearest. A block that kept some of its weights is emptied
    only if the total would be further off than that otherwise.

    Three blocks of equal size, 4.6, 3.7 and 3.7 of 8 wanted, 4 on average: the whole parts
    leave two to hand out, so 4, 4 and 4. (Each rounded alone: 5, 4 and 4.)

    :param sparsities: per block in [0, 1], as :func:`allocate` returns them
    :param weights: number of prunable weights per block
    :param sparsity: target over all blocks together
    :param m: M, at least 2
    :return: N per block, from 0 to ``m``; a block with a larger sparsity never gets a
        smaller N
    """
    exact = [round(m * s, 9) for s in sparsities]  # a whole number but for rounding is one
    whole = [math.floor(x) for x in exact]
    missing = round(sparsity * m * sum(weights))
    missing -= sum(w * n for w, n in zip(weights, whole, strict=True))
    order = sorted(
        (b for b, n in enumerate(whole) if n < exact[b]),
        key=lambda b: (whole[b] + 1 == m, whole[b] - exact[b], -exact[b], b),
    )
    by_size: dict[int, list[int]] = {}
    for block in order:
        by_size.setdefault(weights[block], []).append(block)
    numbers_per_size = [range(len(blocks) + 1) for blocks in by_size.values()]
    tried: Iterable[list[int]] = (order[:number] for number in range(len(order) + 1))
    if math.prod(map(len, numbers_per_size)) <= _TRIED:
        tried = (
            [
                b
                for blocks, number in zip(by_size.values(), chosen, strict=True)
                for b in blocks[:number]
            ]
            for chosen in product(*numbers_per_size)
        )

    def raised(blocks: Collection[int]) -> list[int]:
        return [n + (b in blocks) for b, n in enumerate(whole)]

    def cost(blocks: list[int]) -> tuple[bool, bool, int, int, float]:
        ranked = sorted(zip(exact, raised(set(blocks)), strict=True))
        disordered = any(low > high for (_, low), (_, high) in pairwise(ranked))
        off = abs(missing - sum(weights[b] for b in blocks))
        emptied = sum(whole[b] + 1 == m for b in blocks)
        error = math.fsum(weights[b] * (1 - 2 * (exact[b] - whole[b])) for b in blocks)
        return disordered, 2 * off > max(weights), emptied, off, error

    best: list[int] = min(tried, key=cost)
    return raised(best)


def check_whole(sparsity: float, m: int, what: str) -> float:
    """Return ``sparsity`` if it is a whole number of every ``m`` weights.

    :param what: what an error calls it
    :raises ValueError: if it is not, or outside [0, 1]
    """
    if not 0 <= sparsity <= 1 or abs(sparsity * m - round(sparsity * m)) > 1e-6:
        raise ValueError(
            f"{what} is {sparsity}, which is no whole number of every {m} weights: state N / {m}"
        )
    return sparsity
