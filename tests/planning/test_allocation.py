"""Scores to sparsities: the paper's arithmetic, exact totals, order, bad input."""

import math
import subprocess
import sys
from itertools import pairwise

import pytest
from helpers import ROOT, naive_sparsities
from hypothesis import given
from hypothesis import strategies as st

from dlp_plugin.planning.allocation import (
    allocate,
    check_sparsity,
    check_strength,
    importances,
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
        check_strength(value, "alpha")


@pytest.mark.parametrize("value", [1e7, 1e308, HUGE])
def test_alpha_beyond_what_floats_can_carry_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"alpha must be at most 1e\+06, got 1.*0\.15 is usual"):
        check_strength(value, "alpha")
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


def test_the_arithmetic_stands_alone() -> None:
    # `dlp_plugin/__init__.py` registers the modifier, so the module is loaded by its path.
    code = (
        "import sys, importlib.util as u; "
        "s = u.spec_from_file_location('allocation', 'dlp_plugin/planning/allocation.py'); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); "
        "assert m.allocate([1, 2], [1, 1], 0.5, 0.1); "
        "assert not {'torch', 'llmcompressor'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
