"""N:M: read once, N whole, and sparsities rounded to it with the total kept."""

import math
from collections.abc import Sequence
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlp_plugin.planning.allocation import allocate
from dlp_plugin.planning.structure import UNSTRUCTURED, MaskStructure, balanced, whole_numbers

allocated = st.integers(1, 6).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(0, 10), min_size=n, max_size=n),
        st.lists(st.sampled_from([10, 13, 40]), min_size=n, max_size=n),
        st.floats(0, 0.6),
        st.sampled_from([(2, 4), (1, 4), (3, 4), (4, 8), (3, 7), (8, 16)]),
    )
)


class TestWholeNumbers:
    def test_worked_examples(self) -> None:
        half = MaskStructure(4, 8)
        # each rounded alone would be 5, 4 and 4 of 8: 13 where 12 are wanted
        assert whole_numbers([4.6 / 8, 3.7 / 8, 3.7 / 8], [10] * 3, half) == [4, 4, 4]
        # of equal parts missing the less important block is rounded up
        assert whole_numbers([5.5 / 8, 3.5 / 8, 3 / 8], [10] * 3, half) == [6, 3, 3]

    def test_the_largest_part_missing_comes_first_whatever_its_size(self) -> None:
        # 10 weights are missing; one N of the larger block is 20, which is no nearer
        assert whole_numbers([2.4 / 16, 7.2 / 16], [20, 10], MaskStructure(4, 16)) == [2, 7]
        assert whole_numbers([2.2 / 16, 7.6 / 16], [20, 10], MaskStructure(4, 16)) == [2, 8]

    def test_no_block_is_emptied_for_the_sake_of_rounding(self) -> None:
        exact = allocate([1, 2, 3, 4, 5, 6, 7, 8], [1] * 8, 0.75, 0.15)
        assert 3.5 < 4 * exact[-1] < 4
        numbers = whole_numbers(exact, [1] * 8, MaskStructure(3, 4))
        assert (max(numbers), sum(numbers)) == (3, 24)
        # here the total would be off by one of 8 weights otherwise
        assert whole_numbers([7.9 / 8, 7.9 / 8, 5.2 / 8], [1] * 3, MaskStructure(7, 8)) == [8, 7, 6]

    @given(allocated)
    def test_they_come_within_half_of_one_n_and_keep_the_order(self, drawn: tuple) -> None:
        scores, weights, alpha, (n, m) = drawn
        exact = allocate(scores, weights, n / m, alpha)
        numbers = whole_numbers(exact, weights, MaskStructure(n, m))
        off = off_target(numbers, weights, n)
        assert off <= max(weights) / 2
        near = neighbours(exact, m)
        assert all(number in options for number, options in zip(numbers, near, strict=True))
        assert is_ordered(exact, numbers)

    @given(allocated)
    def test_those_of_equal_blocks_are_the_best_that_hit_the_target(self, drawn: tuple) -> None:
        scores, _, alpha, (n, m) = drawn
        exact = allocate(scores, [1] * len(scores), n / m, alpha)
        numbers = whole_numbers(exact, [1] * len(scores), MaskStructure(n, m))
        assert sum(numbers) == n * len(scores)

        def cost(candidate: tuple[int, ...]) -> tuple[int, float]:
            error = sum((c - s * m) ** 2 for c, s in zip(candidate, exact, strict=True))
            return emptied(candidate, exact, m), error

        hit = [c for c in product(*neighbours(exact, m)) if sum(c) == n * len(scores)]
        best = min(cost(candidate) for candidate in hit)
        assert cost(tuple(numbers)) == (best[0], pytest.approx(best[1], abs=1e-7))

    def test_many_sizes(self) -> None:
        """Within half of one N of one block."""
        weights = [100 + 7 * i for i in range(40)]
        exact = allocate([math.sin(i) + 2 for i in range(40)], weights, 0.5, 0.2)
        numbers = whole_numbers(exact, weights, MaskStructure(4, 8))
        assert off_target(numbers, weights, 4) <= max(weights) / 2
        assert is_ordered(exact, numbers)
        assert len(set(numbers)) > 2


class TestBalanced:
    def test_worked_example(self) -> None:
        # 2 * 60 wanted, 90 given: 30 too few, the largest makes it 10 too many, a small one hits
        assert balanced([1, 3, 2], [40, 10, 10], MaskStructure(2, 4)) == [2, 2, 2]

    def test_what_hits_stays(self) -> None:
        assert balanced([1, 3], [10, 10], MaskStructure(2, 4)) == [1, 3]

    @given(allocated)
    def test_it_comes_within_half_of_the_smallest_or_as_near_as_it_was(self, drawn: tuple) -> None:
        scores, weights, alpha, (n, m) = drawn
        structure = MaskStructure(n, m)
        rounded = whole_numbers(allocate(scores, weights, n / m, alpha), weights, structure)
        found = balanced(rounded, weights, structure)
        assert off_target(found, weights, n) <= off_target(rounded, weights, n)
        assert all(abs(a - b) <= 1 and 0 <= a <= m for a, b in zip(found, rounded, strict=True))


def neighbours(exact: Sequence[float], m: int) -> list[set[int]]:
    return [{math.floor(s * m + 1e-9), math.ceil(s * m - 1e-9)} for s in exact]


def off_target(numbers: Sequence[int], weights: Sequence[int], n: int) -> int:
    return abs(sum(w * (number - n) for w, number in zip(weights, numbers, strict=True)))


def emptied(numbers: Sequence[int], exact: Sequence[float], m: int) -> int:
    return sum(number == m and s * m < m - 1e-9 for number, s in zip(numbers, exact, strict=True))


def is_ordered(exact: Sequence[float], numbers: Sequence[int]) -> bool:
    ordered = sorted((round(s, 9), number) for s, number in zip(exact, numbers, strict=True))
    return all(low <= high for (_, low), (_, high) in pairwise(ordered))


@pytest.mark.parametrize(
    "text", ["", "4", "4:", "4:4", "5:4", "0:4", "-1:4", "a:b", "1:2:3", f"1:{'9' * 5000}"]
)
def test_a_structure_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="mask_structure must be N:M, with N zeros"):
        MaskStructure.parse(text)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 4), (1, 0)])
def test_numbers_that_are_no_structure_are_refused(n: int, m: int) -> None:
    with pytest.raises(ValueError, match=f"and 0 < N < M, or 0:0 for none, got '{n}:{m}'"):
        MaskStructure(n, m)


def test_a_sparsity_that_a_structure_is_not() -> None:
    assert MaskStructure(1, 3).exact_target(0.3333) == 1 / 3
    assert UNSTRUCTURED.exact_target(0.7) == 0.7
    with pytest.raises(ValueError, match="sparsity is 0.7, but mask_structure 4:8 is 0.5 on av"):
        MaskStructure(4, 8).exact_target(0.7)


def test_the_n_of_a_sparsity() -> None:
    structure = MaskStructure.parse("4:8")
    assert [structure.number(n / 8) for n in range(9)] == list(range(9))
    for sparsity in (0.3, -0.125, 1.125):
        with pytest.raises(ValueError, match=f"a block is {sparsity}, which is no whole number"):
            structure.number(sparsity, "a block")


def test_structures() -> None:
    assert MaskStructure.parse("2:4") == MaskStructure(2, 4)
    assert MaskStructure.parse("0:0") == UNSTRUCTURED
    assert not UNSTRUCTURED
    assert str(MaskStructure(2, 4)) == "2:4"
    assert MaskStructure(2, 4).sparsity == 0.5
