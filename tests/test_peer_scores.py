"""The peers' block scores against naive twins in numpy's float64, written from the papers."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dlp_plugin.scoring import scores, spectra
from dlp_plugin.scoring.outliers import outlier_ratio
from dlp_plugin.scoring.spectra import block_exponent, power_law_exponent

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
TAILS = ["peak", "median"]

Parts = dict[str, tuple[torch.Tensor, torch.Tensor]]


def random_weight(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Heavier tails than a plain normal's: its rows differ in scale."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(rows, 1, generator=generator, dtype=torch.float64) * 2
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return (weight * scale.exp() * 0.02).to(dtype)


def random_parts(shapes: list[tuple[int, int]], dtype: torch.dtype, seed: int = 0) -> Parts:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"linear{i}": (
            random_weight(*shape, dtype, seed + i),
            torch.randn(shape[1], generator=generator).exp(),
        )
        for i, shape in enumerate(shapes)
    }


class TestOutlierRatio:
    @staticmethod
    def naive(parts: Parts, multiple: float) -> float:
        """All the scores of the block at once, in float32."""
        every = np.concatenate(
            [(w.abs().float() * norms).flatten().numpy() for w, norms in parts.values()]
        )
        limit = np.float32(multiple * every.mean(dtype=np.float64))
        return 100 * np.count_nonzero(every > limit) / every.size

    def test_worked_example(self) -> None:
        # scores 1*1, 1*1, 1*1, 3*3: mean 3, limit 6, one of four above
        parts = {
            "a": (torch.tensor([[1.0], [-1.0]]), torch.tensor([1.0])),
            "b": (torch.tensor([[1.0, -3.0]]), torch.tensor([1.0, 3.0])),
        }
        assert outlier_ratio(parts, 2) == 25

    def test_a_score_equal_to_the_limit_is_none(self) -> None:
        # scores 1, 1, 1, 5: mean 2
        parts = {"l": (torch.tensor([[1.0, 1.0, 1.0, 5.0]]), torch.ones(4))}
        assert outlier_ratio(parts, 2.5) == 0
        assert outlier_ratio(parts, 2.499) == 25

    def test_the_mean_is_the_blocks_and_not_each_linears(self) -> None:
        # by itself neither Linear has a score that is not equal to its mean
        small = (torch.ones(3, 1), torch.ones(1))
        large = (torch.full((1, 1), 9.0), torch.ones(1))
        assert outlier_ratio({"small": small, "large": large}, 2) == 25
        assert outlier_ratio({"small": small}, 2) == outlier_ratio({"large": large}, 2) == 0

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("multiple", [0.5, 3, 5, 7])
    @pytest.mark.parametrize("shapes", [[(33, 17)], [(64, 64), (7, 64), (300, 129)], [(1, 1001)]])
    def test_equals_all_scores_at_once(
        self, dtype: torch.dtype, multiple: float, shapes: list
    ) -> None:
        parts = random_parts(shapes, dtype)
        expected = self.naive(parts, multiple)
        assert outlier_ratio(parts, multiple) == pytest.approx(expected, abs=1e-6)
        assert expected > 0

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_in_many_chunks(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scores, "CHUNK", 256)
        parts = random_parts([(64, 64), (7, 64), (64, 300)], dtype)
        assert outlier_ratio(parts, 5) == pytest.approx(self.naive(parts, 5), abs=1e-6)

    @pytest.mark.parametrize("factor", [1 / 128, 2.0, 1024.0])
    def test_a_common_factor_of_the_norms_cancels(self, factor: float) -> None:
        """So it is no matter that the released code divides by the number of sequences."""
        parts = random_parts([(64, 64), (64, 129)], torch.bfloat16)
        scaled = {name: (w, norms * factor) for name, (w, norms) in parts.items()}
        assert outlier_ratio(scaled, 5) == outlier_ratio(parts, 5)

    # Whole numbers up to 64, powers of two as norms: every sum and product is exact, so
    # that a score equal to the limit is equal in the twin as well.
    @settings(max_examples=100, deadline=None)
    @given(
        rows=st.integers(1, 24),
        columns=st.integers(1, 24),
        values=st.lists(st.integers(-64, 64), min_size=1, max_size=9),
        norms=st.lists(st.sampled_from([0.0, 0.5, 1.0, 4.0]), min_size=1, max_size=5),
        multiple=st.sampled_from([0.25, 1, 2, 5, 100, 1e30]),
        dtype=st.sampled_from(DTYPES),
    )
    def test_with_ties_zeros_and_single_elements(
        self,
        rows: int,
        columns: int,
        values: list[int],
        norms: list[float],
        multiple: float,
        dtype: torch.dtype,
    ) -> None:
        repeat = torch.arange(rows * columns) * 7 % len(values)
        weight = torch.tensor(values)[repeat].reshape(rows, columns).to(dtype)
        channel = torch.tensor(norms)[torch.arange(columns) % len(norms)]
        parts = {"l": (weight, channel), "m": (weight.flip(0), channel)}
        assert outlier_ratio(parts, multiple) == pytest.approx(
            self.naive(parts, multiple), abs=1e-6
        )

    def test_a_block_of_zeros_has_none(self) -> None:
        assert outlier_ratio({"l": (torch.zeros(4, 4), torch.ones(4))}, 5) == 0
        assert outlier_ratio({"l": (torch.ones(4, 4), torch.zeros(4))}, 5) == 0

    @pytest.mark.parametrize("multiple", [0, -1, math.inf, math.nan])
    def test_a_multiple_out_of_bounds(self, multiple: float) -> None:
        with pytest.raises(ValueError, match="multiple must be finite and above 0, got"):
            outlier_ratio(random_parts([(4, 4)], torch.float32), multiple)

    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
    def test_a_weight_that_is_not_finite_is_named(self, value: float) -> None:
        parts = random_parts([(8, 8), (8, 8)], torch.bfloat16)
        parts["linear1"][0][3, 4] = value
        with pytest.raises(ValueError, match="weight of linear1 holds infinite or undefined"):
            outlier_ratio(parts, 5)

    def test_a_quantized_weight_is_refused(self) -> None:
        parts = {"l": (torch.zeros(4, 4, dtype=torch.int8), torch.ones(4))}
        with pytest.raises(ValueError, match=r"weight of l is torch.int8.*dequantized"):
            outlier_ratio(parts, 5)


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
        with pytest.raises(ValueError, match="mean over its Linears, got none"):
            block_exponent({})
