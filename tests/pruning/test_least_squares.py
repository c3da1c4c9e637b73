"""Masks and weights by least squares, against arithmetic by hand, closed forms and naive twins."""

from __future__ import annotations

import pytest
import torch
from helpers import zeros_per_group
from hypothesis import given, settings
from hypothesis import strategies as st

from dlp_plugin.planning.structure import UNSTRUCTURED, MaskStructure
from dlp_plugin.pruning import least_squares
from dlp_plugin.pruning.least_squares import (
    EARLY,
    PENALTIES,
    RELAXATION,
    STEPS,
    LeastSquares,
    least,
)


def problem(
    rows: int, columns: int, tokens: int = 200, dampening: float = 0.01, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, LeastSquares]:
    """A weight, inputs that depend on each other and differ in scale, and the problem of both."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator) @ mix
    inputs *= torch.randn(columns, generator=generator).exp()
    weight = torch.randn(rows, columns, generator=generator)
    return weight, inputs, LeastSquares(inputs.T @ inputs, dampening)


def closed_form(
    weight: torch.Tensor, mask: torch.Tensor, inputs: torch.Tensor, dampening: float
) -> torch.Tensor:
    """Row by row in float64: the kept weights' own block of the Gram matrix, solved."""
    gram = inputs.double().T @ inputs.double()
    gram += dampening * gram.diagonal().diag()
    found = torch.zeros_like(weight, dtype=torch.float64)
    for row, kept in enumerate(mask):
        wanted = gram[kept] @ weight[row].double()
        found[row, kept] = torch.linalg.solve(gram[kept][:, kept], wanted)
    return found


class TestPolish:
    def test_by_hand(self) -> None:
        """Two inputs that are always equal: what the pruned weight gave, the other gives.

        G = [[1, 1], [1, 1]], of the weights 2 and 3 the first is pruned: the least of
        (z - 3)^2 - 2 * 2 (z - 3) + 4 is at 5; a dampening of 0.25 draws it back to 3 with
        a quarter of the force: (z - 5) + 0.25 (z - 3) = 0 at 4.6.
        """
        weight, pruned = torch.tensor([[2.0, 3.0]]), torch.tensor([[0.0, 3.0]])
        for dampening, expected in {0.0: 5.0, 0.25: 4.6}.items():
            found = LeastSquares(torch.ones(2, 2), dampening).polished(weight, pruned, 2)
            assert found.tolist() == [[0, pytest.approx(expected)]]

    @pytest.mark.parametrize("seed", range(4))
    def test_it_equals_the_closed_form(self, seed: int) -> None:
        weight, inputs, least_squares = problem(12, 24, seed=seed)
        mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
        mask[0], mask[1] = False, True  # an empty row and a full one
        found = least_squares.polished(weight, weight * mask, 60, tolerance=0)
        expected = closed_form(weight, mask, inputs, 0.01)
        assert torch.equal(found != 0, mask)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)

    def test_the_outputs_come_nearer_with_every_step(self) -> None:
        weight, inputs, least_squares = problem(16, 32, dampening=1e-6)
        pruned = weight * (
            torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3
        )
        errors = [
            float(((least_squares.polished(weight, pruned, steps, 0) - weight) @ inputs.T).norm())
            for steps in (0, 1, 5, 20)
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < errors[0]

    def test_it_stops_where_little_is_left(self) -> None:
        weight, inputs, least_squares_of = problem(16, 32, dampening=0.1)
        pruned = weight * (weight.abs() > 0.5)
        found, exact = (
            least_squares_of.polished(weight, pruned, 60, tolerance) for tolerance in (1e-2, 0)
        )
        assert not torch.equal(found, exact)
        errors = [float(((each - weight) @ inputs.T).norm()) for each in (found, exact, pruned)]
        assert errors[0] < 1.05 * errors[1] < errors[2]

    def test_rows_that_are_computed_apart(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weight, _, least_squares_of = problem(10, 8)
        pruned = weight * (weight.abs() > 0.5)
        together = least_squares_of.polished(weight, pruned, 10, tolerance=0)
        monkeypatch.setattr(least_squares, "_WEIGHTS", 24)  # three rows at a time
        apart = least_squares_of.polished(weight, pruned, 10, tolerance=0)
        torch.testing.assert_close(apart, together)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_inputs_that_are_always_zero(self, dtype: torch.dtype) -> None:
        """Nothing is known of their weights, which stay what they are."""
        inputs = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
        inputs[:, 2:4] = 0
        weight = torch.ones(3, 6, dtype=dtype)
        pruned = weight.clone()
        pruned[:, 3] = 0
        found = LeastSquares(inputs.T @ inputs, 0.01).polished(weight, pruned, 10)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, pruned.float())

    def test_no_input_at_all(self) -> None:
        weight = torch.ones(2, 4)
        found = LeastSquares(torch.zeros(4, 4), 0.01).polished(weight, weight, 5)
        torch.testing.assert_close(found, weight)


def naive_admm(
    weight: torch.Tensor, inputs: torch.Tensor, count: int, dampening: float
) -> torch.Tensor:
    """The formulas as they stand, in float64, with an inverse and a sort."""
    gram = inputs.double().T @ inputs.double()
    n = gram.diagonal().sqrt()
    gram = gram / n.outer(n)
    gram += dampening * torch.eye(len(n), dtype=torch.float64)
    w = weight.double() * n
    z, v, y = w, w, torch.zeros_like(w)
    mask = torch.ones_like(w)
    rhos = [rho for rho in PENALTIES for _ in range(STEPS)]
    for t, rho in enumerate(rhos, 1):
        if t > 1:
            inverse = torch.linalg.inv(gram + rho * torch.eye(len(n), dtype=torch.float64))
            v = (w @ gram + rho * z - y) @ inverse
        v = RELAXATION * v + (1 - RELAXATION) * z
        going = int(count * (1 - (1 - t / len(rhos)) ** EARLY))
        mask = torch.ones(w.numel(), dtype=torch.float64)
        mask[(v + y / rho).abs().flatten().argsort(stable=True)[:going]] = 0
        mask = mask.view(w.shape)
        z = (v + y / rho) * mask
        y = y + rho * (v - z)
    return z / n


class TestADMM:
    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("sparsity", [0.3, 0.7, 0.95])
    def test_its_masks_are_those_of_a_naive_twin(self, seed: int, sparsity: float) -> None:
        weight, inputs, least_squares = problem(20, 32, seed=seed)
        found = least_squares.pruned(weight, sparsity, UNSTRUCTURED)
        expected = naive_admm(weight, inputs, int(640 * sparsity), 0.01)
        assert torch.equal(found == 0, expected == 0)
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
    def test_its_outputs_are_nearer_than_wandas(self, sparsity: float) -> None:
        weight, inputs, least_squares = problem(64, 64, tokens=500)
        scores = weight.abs() * inputs.norm(dim=0)
        order = scores.argsort(dim=1)[:, : int(64 * sparsity)]
        wanda = weight.scatter(1, order, 0)
        polished = least_squares.polished(weight, wanda, 20)
        admm = least_squares.pruned(weight, sparsity, UNSTRUCTURED)

        def error(found: torch.Tensor) -> float:
            return float(((found - weight) @ inputs.T).square().sum())

        assert error(admm) < error(polished) < error(wanda)
        assert int((admm == 0).sum()) == int((wanda == 0).sum())

    @pytest.mark.parametrize("structure", ["2:4", "1:4", "5:8"])
    def test_every_group_has_its_zeros(self, structure: str) -> None:
        weight, _, least_squares = problem(12, 16)
        of = MaskStructure.parse(structure)
        found = least_squares.pruned(weight, of.sparsity, of)
        assert zeros_per_group(found, of.m) == {of.n}

    def test_everything_and_nearly_nothing(self) -> None:
        weight, _, least_squares = problem(4, 8)
        assert not least_squares.pruned(weight, 1.0, UNSTRUCTURED).any()
        barely = least_squares.pruned(weight, 1 / 32, UNSTRUCTURED)
        assert int((barely == 0).sum()) == 1

    def test_a_weight_that_is_pruned_already(self) -> None:
        """Equal scores: exactly as many go, the zeros among them."""
        weight, _, least_squares = problem(8, 16)
        weight[:, ::2] = 0
        found = least_squares.pruned(weight, 0.75, UNSTRUCTURED)
        assert int((found == 0).sum()) == 96

    def test_the_same_bytes_again(self) -> None:
        weight, _, least_squares = problem(32, 32)
        first, second = (least_squares.pruned(weight, 0.6, UNSTRUCTURED) for _ in range(2))
        assert torch.equal(first, second)


class TestLeast:
    @given(st.lists(st.integers(0, 4), min_size=8, max_size=8), st.integers(0, 8))
    def test_exactly_so_many_and_of_equal_ones_the_first(
        self, values: list[int], count: int
    ) -> None:
        gone = least(torch.tensor([values]).float(), count / 8, UNSTRUCTURED)[0]
        order = sorted(range(8), key=lambda place: (values[place], place))
        assert gone.nonzero().flatten().tolist() == sorted(order[:count])

    @given(st.floats(0.01, 1), st.integers(0, 3))
    @settings(max_examples=30)
    def test_what_goes_first_is_among_what_goes(self, share: float, seed: int) -> None:
        scores = torch.rand(6, 16, generator=torch.Generator().manual_seed(seed))
        for structure in (UNSTRUCTURED, MaskStructure(2, 4)):
            all_of_them = least(scores, 0.5, structure)
            some = least(scores, 0.5, structure, share)
            assert not (some & ~all_of_them).any()
            assert int(some.sum()) == int(48 * share)
