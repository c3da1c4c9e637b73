"""OWL's block scores against a naive twin: all scores of a block at once."""

import math

import numpy as np
import pytest
import torch
from helpers import DTYPES, Parts, random_parts
from hypothesis import given, settings
from hypothesis import strategies as st

from dlp_plugin.scoring import scores
from dlp_plugin.scoring.outliers import outlier_ratio


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
