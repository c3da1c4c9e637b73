"""N:M structure: of every M consecutive weights of a row, N are zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["UNSTRUCTURED", "MaskStructure", "balanced", "whole_numbers"]


@dataclass(frozen=True)
class MaskStructure:
    """N zeros in every M consecutive weights of a row; ``0:0`` is no structure, and false.

    ``MaskStructure.parse("4:8")`` has ``n`` 4, ``m`` 8 and ``sparsity`` 0.5, and is printed as
    ``4:8``. In a plan with it every block has a separate N, 4 on average: a block of sparsity
    0.375 has ``number(0.375)``, 3.

    :param n: zeros in every ``m`` weights
    :param m: weights in a group
    :raises ValueError: if they are neither 0 and 0 nor ``0 < n < m``
    """

    n: int = 0
    m: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.n < self.m or self.n == self.m == 0):
            raise _no_structure(f"{self.n}:{self.m}")

    @classmethod
    def parse(cls, text: str) -> MaskStructure:
        """Read a stage's ``mask_structure``.

        :raises ValueError: if it is neither ``0:0`` nor ``N:M`` with N from 1 to M - 1
        """
        left, _, right = text.partition(":")
        if not all(part.isdecimal() and len(part) < 10 for part in (left, right)):
            raise _no_structure(text)
        try:
            return cls(int(left), int(right))
        except ValueError:
            raise _no_structure(text) from None

    def __bool__(self) -> bool:
        return self.m > 0

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that are zero; not defined for ``0:0``."""
        return self.n / self.m

    def exact_target(self, value: float, field: str = "sparsity") -> float:
        """Return the target that ``value`` stands for: the exact N / M where there is an M.

        :raises ValueError: naming both, if ``value`` is another
        """
        if not self:
            return value
        if not abs(value - self.sparsity) < 1e-4:
            raise ValueError(
                f"{field} is {value:g}, but mask_structure {self} is {self.sparsity:.4g} on "
                "average: leave out the one that is not meant"
            )
        return self.sparsity

    def number(self, sparsity: float, what: str = "sparsity") -> int:
        """How many of every M weights a sparsity is.

        :param what: what an error calls it
        :return: from 0 to M
        :raises ValueError: if it is no whole number, or outside [0, 1]
        """
        number = round(sparsity * self.m) if 0 <= sparsity <= 1 else -1
        if number < 0 or abs(sparsity * self.m - number) > 1e-6:
            raise ValueError(
                f"{what} is {sparsity}, which is no whole number of every {self.m} weights: "
                f"state N / {self.m}"
            )
        return number


UNSTRUCTURED = MaskStructure()


def _no_structure(text: str) -> ValueError:
    return ValueError(
        f"mask_structure must be N:M, with N zeros in every M weights and 0 < N < M, or "
        f"0:0 for none, got {text!r}"
    )


def whole_numbers(
    sparsities: Sequence[float], weights: Sequence[int], structure: MaskStructure
) -> list[int]:
    """Round sparsities to N zeros in every M weights, with the total near the structure's.

    Largest-remainder rounding. Every ``sparsity_b * M`` is rounded down. Then blocks get one more
    each, in the order of their remainders (of equal remainders the less important block first),
    as long as that brings the total nearer to the target. With blocks of one size the total is
    exact, and the square error is the least possible. Otherwise the total is off by at most half
    of one N of one block. A block is emptied only if the total would be further off without it.

    Three blocks of equal size, 4.6, 3.7 and 3.7 of 8 wanted, 4 on average: rounded down they are
    4, 3 and 3, two short, so 4, 4 and 4. (Each rounded alone: 5, 4 and 4.)

    :param sparsities: per block in [0, 1], as :func:`dlp_plugin.planning.allocation.allocate`
        returns them
    :param weights: number of prunable weights per block
    :param structure: whose N is that of all weights together
    :return: N per block, from 0 to M; a block with a larger sparsity never gets a smaller N
    """
    m = structure.m
    exact = [round(m * s, 9) for s in sparsities]  # a whole number but for rounding is one
    numbers = [math.floor(x) for x in exact]
    missing = structure.n * sum(weights)
    missing -= sum(w * n for w, n in zip(weights, numbers, strict=True))
    order = sorted(
        (b for b, n in enumerate(numbers) if n < exact[b]),
        key=lambda b: (numbers[b] + 1 == m, numbers[b] - exact[b], -exact[b], b),
    )
    for block in order:
        nearer = abs(missing - weights[block]) < abs(missing)
        near_enough = 2 * abs(missing) <= max(weights)
        if not nearer or (near_enough and numbers[block] + 1 == m):
            break
        numbers[block] += 1
        missing -= weights[block]
    return numbers


def balanced(numbers: Sequence[int], weights: Sequence[int], structure: MaskStructure) -> list[int]:
    """Bring the total nearer to the target by one N more or less in some units, largest first.

    Unlike :func:`whole_numbers` it does not keep the order of the units. Sizes 40, 10 and 10, 2
    of 4 wanted in each, and 1, 3 and 2 given: in weights times N that is 30 too few. One more in
    the largest makes 10 too many, and one less in a small unit meets the target.

    :param numbers: N per unit, as :func:`whole_numbers` returns them
    :param weights: number of prunable weights per unit
    :param structure: N:M; M is the largest N per unit
    :return: N per unit, from 0 to M, each at most one from the given
    """
    found = list(numbers)
    missing = structure.n * sum(weights)
    missing -= sum(w * n for w, n in zip(weights, found, strict=True))
    for unit in sorted(range(len(found)), key=lambda u: -weights[u]):
        step = 1 if missing > 0 else -1
        nearer = abs(missing - step * weights[unit]) < abs(missing)
        if nearer and 0 <= found[unit] + step <= structure.m:
            found[unit] += step
            missing -= step * weights[unit]
    return found
