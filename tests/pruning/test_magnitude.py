"""One-shot magnitude: no data, a threshold per matrix, or the least of each group."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import (
    EVERY,
    MakeModel,
    assert_same,
    kept_on_disk,
    linears_of,
    prune,
    refuses,
    run,
    weights_of,
    zeros,
    zeros_per_group,
)
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from dlp_plugin import DLPModifier, OneShotMagnitudeModifier, last_plans
from dlp_plugin.pruning.smallest import smallest


def linear_of(model: LlamaForCausalLM) -> torch.nn.Linear:
    return model.model.layers[1].mlp.up_proj


class TestOneShotMagnitude:
    def test_by_hand(self) -> None:
        weight = torch.tensor([[0.1, -0.5, 0.3], [-0.2, 0.2, 0.9]])
        expected = torch.tensor([[True, False, False], [True, False, False]])
        assert torch.equal(smallest(weight, 2), expected)  # of two 0.2 the first
        assert smallest(weight, 3).tolist() == [[True, False, False], [True, True, False]]
        assert not smallest(weight, 0).any()
        assert smallest(weight, 6).all()

    @given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
    def test_exactly_so_many_of_the_smallest(self, values: list[int], data: st.DataObject) -> None:
        count = data.draw(st.integers(0, len(values)))
        marked = smallest(torch.tensor([values], dtype=torch.bfloat16), count)[0].tolist()
        order = sorted(range(len(values)), key=lambda i: (abs(values[i]), i))
        assert [i for i, mark in enumerate(marked) if mark] == sorted(order[:count])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("share", [1e-6, 0.1, 0.5, 0.999, 1])
    def test_a_large_matrix_against_sorting_it(self, dtype: torch.dtype, share: float) -> None:
        weight = torch.randn(700, 900, generator=torch.Generator().manual_seed(0)).to(dtype)
        weight[:, ::3] = 0  # a third is pruned already
        count = max(int(weight.numel() * share), 1)
        order = weight.flatten().abs().argsort(stable=True)[:count]
        expected = torch.zeros(weight.numel(), dtype=torch.bool)
        expected[order] = True
        assert torch.equal(smallest(weight, count).flatten(), expected)

    def test_a_weight_that_is_not_finite(self, make_model: MakeModel) -> None:
        model = make_model()
        with torch.no_grad():
            linear_of(model).weight[0, 0] = torch.nan
        message = r"weight of model.layers.1.mlp.up_proj holds infinite"
        with pytest.raises(ValueError, match=message):
            run(model, [OneShotMagnitudeModifier(sparsity=0.5, **EVERY)], None)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_threshold_per_matrix_and_no_data(
        self, make_model: MakeModel, dtype: torch.dtype
    ) -> None:
        before = linears_of(make_model(dtype))
        model = run(make_model(dtype), [OneShotMagnitudeModifier(sparsity=0.7, **EVERY)], None)
        for name, linear in linears_of(model).items():
            if name == "lm_head":
                assert torch.equal(linear.weight, before[name].weight)
                continue
            pruned = linear.weight == 0
            assert zeros(linear) == int(pruned.numel() * 0.7)  # ties included, as in bf16
            dense = before[name].weight
            assert torch.equal(linear.weight[~pruned], dense[~pruned])
            assert dense[pruned].abs().max() <= dense[~pruned].abs().min()
        rows = (linear_of(model).weight == 0).sum(1)
        assert rows.min() < rows.max()  # not row by row, as Wanda's

    def test_fed_by_dlp(self, make_model: MakeModel) -> None:
        stage = OneShotMagnitudeModifier(sparsity=0.6, **EVERY)
        model = prune(make_model(), DLPModifier(alpha=0.2), stage)
        (plan,) = last_plans()
        sparsities = [block.sparsity for block in plan.blocks]
        assert max(sparsities) - min(sparsities) == pytest.approx(0.4)
        for depth, sparsity in enumerate(sparsities):
            for linear in linears_of(model.model.layers[depth]).values():
                assert zeros(linear) == int(linear.weight.numel() * sparsity)
        assert stage.sparsity == 0.6  # reads as it was written

    def test_the_least_of_each_group(self, make_model: MakeModel) -> None:
        dense = linear_of(make_model()).weight.detach()
        stage = OneShotMagnitudeModifier(mask_structure="2:4", **EVERY)
        weight = linear_of(run(make_model(), [stage], None)).weight
        kept = dense.unflatten(1, (-1, 4)).abs().sort(dim=2).values[..., 2:]
        assert torch.equal(weight.unflatten(1, (-1, 4)).abs().sort(dim=2).values[..., 2:], kept)
        assert zeros_per_group(weight, 4) == {2}

    def test_a_model_that_stays_on_disk(self, make_model: MakeModel, tmp_path: Path) -> None:
        expected = run(make_model(), [OneShotMagnitudeModifier(sparsity=0.5, **EVERY)], None)
        model = kept_on_disk(make_model(), tmp_path)
        run(model, [OneShotMagnitudeModifier(sparsity=0.5, **EVERY)], None)
        assert_same(weights_of(model), weights_of(expected))
        for name, linear in linears_of(expected).items():
            assert zeros(linear) == (name != "lm_head") * linear.weight.numel() // 2, name

    def test_a_profile_is_refused(self, make_model: MakeModel) -> None:
        stage = OneShotMagnitudeModifier(
            sparsity=0.5, sparsity_profile="owl", owl_m=5, owl_lmbda=0.1, **EVERY
        )
        refuses(make_model(), "put OWLModifier before it", stage)
