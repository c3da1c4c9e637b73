"""AlphaPruning's block scores against naive twins in numpy's float64, written from the paper."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import DTYPES, random_weight
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dlp_plugin.scoring import spectra
from dlp_plugin.scoring.spectra import block_exponent, power_law_exponent

TAILS = ["peak", "median"]


def naive_exponent(weight: torch.Tensor, tail: str) -> float:
    """From singular values, one tail after the other."""
    values = np.sort(np.linalg.svd(weight.double().numpy(), compute_uv=False) ** 2)
    values = values[values > 1e-12 * values[-1]]

    def fit(start: int) -> tuple[float, float]:
        """Exponent of a tail and its Kolmogorov-Smirnov distance."""
        top = values[start:]
        exponent = 1 + len(top) / np.log(top / top[0]).sum()
        steps = np.arange(len(top)) / len(top)
        return exponent, np.abs(1 - (top / top[0]) ** (1 - exponent) - steps).max()

    if tail == "median":
        return fit(len(values) // 2)[0]
    counts, edges = np.histogram(np.log10(values), bins=100)
    peak = 10 ** edges[counts.argmax()]
    starts = [
        start
        for start, value in enumerate(values[:-1])
        if math.log10(0.95 * peak) <= value <= 1.5 * peak
    ]
    return min((fit(start) for start in starts), key=lambda found: found[1])[0]


def with_spectrum(eigenvalues: list[float], extra: int = 3, seed: int = 0) -> torch.Tensor:
    """A float64 ``[n, n + extra]`` whose Gram matrix has these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)

    def rotation(size: int) -> torch.Tensor:
        normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(normal).Q

    size = len(eigenvalues)
    roots = torch.tensor(eigenvalues, dtype=torch.float64).sqrt()
    return rotation(size) * roots @ rotation(size + extra)[:size]


class TestPowerLawExponent:
    def test_worked_example(self) -> None:
        # eigenvalues 1, e, e^2, e^3: from the median on the tail is e^2, e^3, and the
        # logarithms of its ratios sum to 0 + 1. Each has a bar of its own in the
        # histogram, the first counts as peak, so the tail starts at 1 (up to 1.5), and
        # the logarithms sum to 0 + 1 + 2 + 3
        weight = torch.diag(torch.tensor([0.0, 1.0, 2.0, 3.0]).div(2).exp())
        assert power_law_exponent("l", weight, "median") == pytest.approx(1 + 2 / 1, rel=1e-6)
        assert power_law_exponent("l", weight, "peak") == pytest.approx(1 + 4 / 6, rel=1e-6)

    def test_an_odd_count_starts_in_the_middle(self) -> None:
        # 1, e, e^2: the tail is e, e^2
        weight = torch.diag(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).div(2).exp())
        assert power_law_exponent("l", weight, "median") == pytest.approx(3)

    def test_the_peak_is_the_default(self) -> None:
        weight = random_weight(40, 60, torch.float32)
        by_default = power_law_exponent("l", weight)
        assert by_default == power_law_exponent("l", weight, "peak")
        assert by_default != power_law_exponent("l", weight, "median")

    @pytest.mark.parametrize("tail", TAILS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(3, 9), (33, 17), (64, 64), (48, 200), (301, 64)])
    def test_equals_the_naive_twin(
        self, tail: str, dtype: torch.dtype, shape: tuple[int, int]
    ) -> None:
        weight = random_weight(*shape, dtype)
        expected = naive_exponent(weight, tail)
        assert power_law_exponent("l", weight, tail) == pytest.approx(expected, rel=1e-7)

    @pytest.mark.parametrize("tail", TAILS)
    @pytest.mark.parametrize("scale", [0.01, 1, 30])
    def test_equals_the_naive_twin_wherever_the_peak_lies(self, tail: str, scale: float) -> None:
        """The lower bound of a start, ``log10(0.95 peak)``, bites only for large weights."""
        weight = random_weight(96, 128, torch.float64) * scale
        expected = naive_exponent(weight, tail)
        assert power_law_exponent("l", weight, tail) == pytest.approx(expected, rel=1e-7)

    def test_close_to_singular_values_in_float32(self) -> None:
        """Which is what the released code takes."""
        weight = random_weight(128, 320, torch.bfloat16)
        logs = torch.linalg.svdvals(weight.float()).square().sort().values[64:].log()
        expected = 1 + 64 / float((logs - logs[0]).sum())
        assert power_law_exponent("l", weight, "median") == pytest.approx(expected, abs=1e-3)

    @pytest.mark.parametrize("tail", TAILS)
    def test_finds_the_exponent_of_a_power_law(self, tail: str) -> None:
        """Quantiles of the density ``x^-2.5`` from 1 on."""
        size = 400
        ranks = (np.arange(size) + 0.5) / size
        weight = with_spectrum(list((1 - ranks) ** (-1 / 1.5)))
        assert power_law_exponent("l", weight, tail) == pytest.approx(2.5, abs=0.05)

    @pytest.mark.parametrize("tail", TAILS)
    def test_in_many_chunks(self, tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
        weight = random_weight(40, 200, torch.float32)
        at_once = power_law_exponent("l", weight, tail)
        monkeypatch.setattr(spectra, "WIDE", 700)
        assert power_law_exponent("l", weight, tail) == pytest.approx(at_once, rel=1e-9)

    @settings(max_examples=60, deadline=None)
    @given(
        values=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=12),
        repeats=st.integers(1, 3),
        zeros=st.integers(0, 8),
        extra=st.integers(0, 5),
        seed=st.integers(0, 99),
    )
    def test_median_with_ties_and_zeros(
        self, values: list[float], repeats: int, zeros: int, extra: int, seed: int
    ) -> None:
        """Eigenvalues that are 0 are left out; equal ones count as often as they are."""
        spectrum = sorted(values * repeats)
        tail = np.log(spectrum[len(spectrum) // 2 :])
        assume(tail[-1] - tail[0] > 1e-3)
        expected = 1 + len(tail) / (tail - tail[0]).sum()
        weight = with_spectrum([0.0] * zeros + spectrum, extra, seed)
        for turned in (weight, weight.T, weight.flip(0), -weight, weight * 2.0**-20):
            found = power_law_exponent("l", turned, "median")
            assert found == pytest.approx(expected, rel=1e-6)

    @settings(max_examples=60, deadline=None)
    @given(
        rows=st.integers(4, 24),
        columns=st.integers(4, 24),
        zero_rows=st.integers(0, 12),
        copies=st.integers(0, 3),
        seed=st.integers(0, 99),
        dtype=st.sampled_from(DTYPES),
        tail=st.sampled_from(TAILS),
    )
    def test_repeated_and_dead_rows(
        self,
        rows: int,
        columns: int,
        zero_rows: int,
        copies: int,
        seed: int,
        dtype: torch.dtype,
        tail: str,
    ) -> None:
        """More than three eigenvalues that are not 0 have a tail of more than one."""
        assume(min(rows - zero_rows, columns) > 3)
        weight = random_weight(rows, columns, dtype, seed)
        weight[:zero_rows] = 0
        weight = torch.cat([weight] * (copies + 1))
        exponent = power_law_exponent("l", weight, tail)
        assert 1 < exponent < math.inf
        if tail == "median":
            assert exponent == pytest.approx(naive_exponent(weight, tail), rel=1e-6)

    @pytest.mark.parametrize("tail", TAILS)
    @pytest.mark.parametrize(
        "make",
        [
            pytest.param(lambda: torch.zeros(8, 6), id="zeros"),
            pytest.param(lambda: torch.ones(8, 6), id="one that is not 0"),
            pytest.param(lambda: torch.randn(1, 9), id="one row"),
            pytest.param(lambda: torch.randn(9, 1), id="one column"),
            pytest.param(lambda: torch.randn(0, 9), id="empty"),
            pytest.param(lambda: torch.eye(8), id="all equal"),
            pytest.param(lambda: torch.eye(1), id="one"),
            pytest.param(lambda: with_spectrum([0.3] * 60), id="equal but for rounding"),
            pytest.param(lambda: torch.diag(torch.tensor([0.01, 2, 2, 2])), id="a flat tail"),
        ],
    )
    def test_a_degenerate_spectrum_is_named(
        self, tail: str, make: Callable[[], torch.Tensor]
    ) -> None:
        with pytest.raises(ValueError, match=r"eigenvalues of model\.layers\.3\.q_proj, \["):
            power_law_exponent("model.layers.3.q_proj", make(), tail)

    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
    def test_a_weight_that_is_not_finite_is_named(self, value: float) -> None:
        weight = random_weight(8, 8, torch.bfloat16)
        weight[3, 4] = value
        with pytest.raises(ValueError, match="weight of q_proj holds infinite or undefined"):
            power_law_exponent("q_proj", weight)

    def test_a_quantized_weight_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"weight of l is torch.int8.*dequantized"):
            power_law_exponent("l", torch.zeros(4, 4, dtype=torch.int8))

    def test_a_parameter_is_left_as_it_is(self) -> None:
        weight = torch.nn.Linear(20, 30).weight
        before = weight.detach().clone()
        power_law_exponent("l", weight)
        assert torch.equal(weight, before)
        assert weight.grad is None


class TestBlockExponent:
    @pytest.mark.parametrize("tail", TAILS)
    def test_mean_over_the_linears_whatever_their_size(self, tail: str) -> None:
        weights = {
            "small": random_weight(16, 20, torch.float32, 1),
            "large": random_weight(200, 100, torch.float32, 2),
            "tall": random_weight(300, 40, torch.float32, 3),
        }
        expected = np.mean([naive_exponent(w, tail) for w in weights.values()])
        assert block_exponent(weights, tail) == pytest.approx(expected, rel=1e-7)

    def test_the_degenerate_one_is_named(self) -> None:
        weights = {"fine": random_weight(16, 20, torch.float32), "dead": torch.zeros(16, 20)}
        with pytest.raises(ValueError, match="eigenvalues of dead, "):
            block_exponent(weights)

    def test_a_block_without_linears(self) -> None:
        with pytest.raises(ValueError, match="mean over its Linears, but there are none"):
            block_exponent({})
