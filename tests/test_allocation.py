"""Scores to sparsities: the paper's arithmetic, exact totals, order, bad input."""

import math
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise, product

import pytest
from conftest import ROOT, naive_sparsities
from hypothesis import given
from hypothesis import strategies as st

from dlp_plugin.planning.allocation import (
    allocate,
    check_alpha,
    check_sparsity,
    check_target,
    importances,
    split_structure,
    whole_numbers,
)

HUGE = pytest.param(10**400, id="400 digits")


def test_worked_example_of_two_blocks() -> None:
    # k = 2 * 0.1 * (3 - U) / (3 - 1) = 0.2, 0; mean 0.1; keep = k - 0.1 + 0.3 = 0.4, 0.2
    assert allocate([1, 3], [10, 10], 0.7, 0.1) == pytest.approx([0.6, 0.8], abs=1e-15)


def test_equal_sizes_give_the_papers_numbers() -> None:
    scores = [0.31, 0.11, 0.27, 0.45, 0.29]
    expected = naive_sparsities(scores, 0.7, 0.15)
    assert allocate(scores, [1000] * 5, 0.7, 0.15) == pytest.approx(expected, abs=1e-14)


def test_range_is_twice_alpha_and_a_common_factor_drops_out() -> None:
    scores = [0.2, 0.5, 0.3]
    result = allocate(scores, [7, 5, 9], 0.6, 0.12)
    assert max(result) - min(result) == pytest.approx(0.24, abs=1e-14)
    scaled = allocate([1e6 * score for score in scores], [7, 5, 9], 0.6, 0.12)
    assert scaled == pytest.approx(result, abs=1e-12)


def test_block_sizes_weigh_in() -> None:
    # keep = c + 0.2 and c; (1 * (c + 0.2) + 3 * c) / 4 = 0.3, so c = 0.25
    assert allocate([1, 2], [1, 3], 0.7, 0.1) == pytest.approx([0.55, 0.75], abs=1e-15)


def test_what_is_clipped_is_redistributed() -> None:
    # k = 1, 0.5, 0 at target 0.9: unclipped keeps would be 0.6, 0.1, -0.4.
    # The last is clipped at keep 0; c + 1 + c + 0.5 = 0.3 gives c = -0.6, so the
    # second is clipped too, and the first keeps all there is: 0.3.
    assert allocate([1, 2, 3], [5, 5, 5], 0.9, 0.5) == pytest.approx([0.7, 1, 1], abs=1e-15)
    # The mirror image: the most important block is kept whole.
    assert allocate([1, 2, 3], [5, 5, 5], 0.1, 0.5) == pytest.approx([0, 0, 0.3], abs=1e-15)


@pytest.mark.parametrize("scores", [[0.4], [0.4] * 5, [0.0] * 3])
def test_one_block_or_equal_scores_are_uniform(scores: list[float]) -> None:
    assert allocate(scores, [3] * len(scores), 0.7, 0.15) == [0.7] * len(scores)


def test_alpha_zero_is_uniform() -> None:
    assert allocate([1, 2, 3], [4, 5, 6], 0.65, 0) == pytest.approx([0.65] * 3, abs=1e-15)


blocks = st.lists(st.tuples(st.floats(0, 1e30), st.integers(1, 10**12)), min_size=1, max_size=40)


@given(blocks, st.floats(0.001, 0.999), st.floats(0, 5) | st.floats(0, 1e6))
def test_total_is_exact_and_order_never_inverts(
    rows: list[tuple[float, int]], sparsity: float, alpha: float
) -> None:
    scores, weights = zip(*rows, strict=True)
    result = allocate(scores, weights, sparsity, alpha)
    assert all(0 <= value <= 1 for value in result)
    total = math.fsum(w * s for w, s in zip(weights, result, strict=True)) / sum(weights)
    assert total == pytest.approx(sparsity, abs=1e-9)
    ranked = sorted(zip(scores, result, strict=True))
    assert all(low[1] <= high[1] for low, high in pairwise(ranked))


def test_importance_is_one_minus_the_share() -> None:
    assert importances([1, 3]) == [0.75, 0.25]
    assert importances([0, 0, 0, 0]) == [0.75] * 4


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, math.nan, math.inf, HUGE, True])
def test_sparsity_outside_the_open_interval_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"strictly between 0 and 1, got .*e\.g\. 0\.7"):
        check_sparsity(value)
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        allocate([1, 2], [1, 1], value, 0.1)


@pytest.mark.parametrize("value", [-0.01, math.nan, math.inf, True, False])
def test_alpha_negative_or_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="alpha must be finite and at least 0, got"):
        check_alpha(value)


@pytest.mark.parametrize("value", [1e7, 1e308, HUGE])
def test_alpha_beyond_what_floats_can_carry_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"alpha must be at most 1e\+06, got 1.*0\.15 is usual"):
        check_alpha(value)
    with pytest.raises(ValueError, match=r"alpha must be at most 1e\+06"):
        allocate([1, 2], [1, 1], 0.5, value)


@pytest.mark.parametrize(
    ("scores", "weights", "message"),
    [
        ([], [], "one score and one weight count per block"),
        ([1], [1, 2], "got 1 scores and 2 weight counts"),
        ([1, math.nan], [1, 1], "score of block 1 must be finite and at least 0, got nan"),
        ([-1, 1], [1, 1], "score of block 0 must be finite and at least 0, got -1"),
        ([1, 2], [1, 0], "weights of block 1 must be at least 1, got 0"),
    ],
)
def test_unusable_scores_are_refused(scores: list, weights: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate(scores, weights, 0.7, 0.15)


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
        # each rounded alone would be 5, 4 and 4 of 8: 13 where 12 are wanted
        assert whole_numbers([4.6 / 8, 3.7 / 8, 3.7 / 8], [10, 10, 10], 0.5, 8) == [4, 4, 4]
        # of equal parts missing the less important block is rounded up
        assert whole_numbers([5.5 / 8, 3.5 / 8, 3 / 8], [10, 10, 10], 0.5, 8) == [6, 3, 3]

    def test_of_every_size_as_many_as_bring_the_total_nearest(self) -> None:
        # the larger block misses more of a whole number, the smaller one hits the target
        assert whole_numbers([2.4 / 16, 7.2 / 16], [20, 10], 0.25, 16) == [2, 8]

    def test_no_block_is_emptied_for_the_sake_of_rounding(self) -> None:
        exact = allocate([1, 2, 3, 4, 5, 6, 7, 8], [1] * 8, 0.75, 0.15)
        assert 3.5 < 4 * exact[-1] < 4
        numbers = whole_numbers(exact, [1] * 8, 0.75, 4)
        assert (max(numbers), sum(numbers)) == (3, 24)
        # here the total would be off by one of 8 weights otherwise
        assert whole_numbers([7.9 / 8, 7.9 / 8, 5.2 / 8], [1] * 3, 7 / 8, 8) == [8, 7, 6]

    @given(allocated)
    def test_they_come_as_near_as_any_that_keep_the_order(self, drawn: tuple) -> None:
        scores, weights, alpha, (n, m) = drawn
        exact = allocate(scores, weights, n / m, alpha)
        numbers = whole_numbers(exact, weights, n / m, m)
        off = off_target(numbers, weights, n)
        assert off <= max(weights) / 2
        near = neighbours(exact, m)
        assert all(number in options for number, options in zip(numbers, near, strict=True))
        assert is_ordered(exact, numbers)
        if emptied(numbers, exact, m) == 0:
            # any choice of as many blocks of a size, those with the largest parts missing
            others = [
                c
                for c in product(*near)
                if is_ordered(exact, c) and largest_parts(exact, weights, c, m)
            ]
            assert off == min(off_target(c, weights, n) for c in others if not emptied(c, exact, m))

    @given(allocated)
    def test_those_of_equal_blocks_are_the_best_that_hit_the_target(self, drawn: tuple) -> None:
        scores, _, alpha, (n, m) = drawn
        exact = allocate(scores, [1] * len(scores), n / m, alpha)
        numbers = whole_numbers(exact, [1] * len(scores), n / m, m)
        assert sum(numbers) == n * len(scores)

        def cost(candidate: tuple[int, ...]) -> tuple[int, float]:
            error = sum((c - s * m) ** 2 for c, s in zip(candidate, exact, strict=True))
            return emptied(candidate, exact, m), error

        hit = [c for c in product(*neighbours(exact, m)) if sum(c) == n * len(scores)]
        best = min(cost(candidate) for candidate in hit)
        assert cost(tuple(numbers)) == (best[0], pytest.approx(best[1], abs=1e-7))

    def test_many_sizes(self) -> None:
        """More combinations than can be tried: one N at a time, within half of one N."""
        weights = [100 + 7 * i for i in range(40)]
        exact = allocate([math.sin(i) + 2 for i in range(40)], weights, 0.5, 0.2)
        numbers = whole_numbers(exact, weights, 0.5, 8)
        assert off_target(numbers, weights, 4) <= max(weights) / 2
        assert is_ordered(exact, numbers)
        assert len(set(numbers)) > 2


def neighbours(exact: Sequence[float], m: int) -> list[set[int]]:
    return [{math.floor(s * m + 1e-9), math.ceil(s * m - 1e-9)} for s in exact]


def off_target(numbers: Sequence[int], weights: Sequence[int], n: int) -> int:
    return abs(sum(w * (number - n) for w, number in zip(weights, numbers, strict=True)))


def emptied(numbers: Sequence[int], exact: Sequence[float], m: int) -> int:
    return sum(number == m and s * m < m - 1e-9 for number, s in zip(numbers, exact, strict=True))


def is_ordered(exact: Sequence[float], numbers: Sequence[int]) -> bool:
    ordered = sorted((round(s, 9), number) for s, number in zip(exact, numbers, strict=True))
    return all(low <= high for (_, low), (_, high) in pairwise(ordered))


def largest_parts(
    exact: Sequence[float], weights: Sequence[int], numbers: Sequence[int], m: int
) -> bool:
    """Whether of each size the blocks that miss most are rounded up, but for full ones."""
    parts: dict[int, list[tuple[float, bool]]] = {}
    for s, w, number in zip(exact, weights, numbers, strict=True):
        part = s * m - math.floor(s * m + 1e-9)
        if part > 1e-9 and math.ceil(s * m) < m:
            parts.setdefault(w, []).append((round(part, 9), number > s * m))
    return all(
        up >= other_up
        for group in parts.values()
        for (part, up), (other, other_up) in product(group, group)
        if part > other
    )


@pytest.mark.parametrize(
    "text", ["", "4", "4:", "4:4", "5:4", "0:4", "-1:4", "a:b", "1:2:3", f"1:{'9' * 5000}"]
)
def test_a_structure_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="mask_structure must be N:M, with N zeros"):
        split_structure(text)


def test_a_sparsity_that_a_structure_is_not() -> None:
    assert check_target(0.3333, "1:3") == 1 / 3
    assert check_target(0.7, "0:0") == 0.7
    with pytest.raises(ValueError, match="sparsity is 0.7, but mask_structure 4:8 is 0.5 on av"):
        check_target(0.7, "4:8")


def test_structures() -> None:
    assert split_structure("2:4") == (2, 4)
    assert split_structure("0:0") == (0, 0)


def test_the_arithmetic_stands_alone() -> None:
    # `dlp_plugin/__init__.py` registers the modifier, so the module is loaded by its path.
    code = (
        "import sys, importlib.util as u; "
        "s = u.spec_from_file_location('allocation', 'dlp_plugin/allocation.py'); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); "
        "assert m.allocate([1, 2], [1, 1], 0.5, 0.1); "
        "assert not {'torch', 'llmcompressor'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
