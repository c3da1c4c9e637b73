"""An N of N:M for every block, by every stage, through ``oneshot()``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers import (
    EVERY,
    PRUNERS,
    MakeModel,
    assert_same,
    linears_of,
    prune,
    recipe,
    weights_of,
    zeros,
    zeros_per_group,
)
from llmcompressor.modifiers import pruning
from transformers import LlamaForCausalLM

from dlp_plugin import DLPModifier, LinearSparsityModifier, Plan, WandaPruningModifier, last_plans
from dlp_plugin.planning import view
from dlp_plugin.planning.methods import DLP
from dlp_plugin.planning.structure import MaskStructure

CALIBRATED = PRUNERS[:2]


def numbers_of(model: LlamaForCausalLM, m: int) -> list[int]:
    """Every block's N, the same in every group of every row of every Linear."""
    numbers = []
    for depth in range(len(model.model.layers)):
        found = [
            zeros_per_group(lin.weight, m) for lin in linears_of(model.model.layers[depth]).values()
        ]
        (number,) = set().union(*found)
        numbers.append(number)
    return numbers


class TestMixedPatterns:
    @pytest.mark.parametrize("pruner", PRUNERS)
    @pytest.mark.parametrize("structure", ["2:4", "4:8", "8:16", "3:8"])
    def test_every_group_has_the_zeros_of_its_block(
        self, make_model: MakeModel, pruner: type, structure: str
    ) -> None:
        n, m = map(int, structure.split(":"))
        model = prune(
            make_model(), DLPModifier(alpha=0.3), pruner(mask_structure=structure, **EVERY)
        )
        (plan,) = last_plans()
        numbers = numbers_of(model, m)
        assert numbers == [block.sparsity * m for block in plan.blocks]
        assert len(set(numbers)) > 1
        assert sum(numbers) == 3 * n  # blocks of one size: the total is on target
        assert plan.deviation == pytest.approx(0)
        assert str(plan.mask_structure) == structure
        assert torch.equal(model.lm_head.weight, make_model().lm_head.weight)

    @pytest.mark.parametrize("pruner", CALIBRATED)
    def test_uniform_is_the_stock_stage(self, make_model: MakeModel, pruner: type) -> None:
        """The same bits, so errors are passed on from block to block as the host does."""
        fed = prune(make_model(), DLPModifier(alpha=0), pruner(mask_structure="4:8", **EVERY))
        stock = getattr(pruning, pruner.__name__)(sparsity=0.5, mask_structure="4:8", **EVERY)
        expected = prune(make_model(), stock)
        assert_same(weights_of(fed), weights_of(expected))

    @pytest.mark.parametrize("pruner", CALIBRATED)
    def test_a_block_is_pruned_as_the_stock_stage_does_with_its_number(
        self, make_model: MakeModel, pruner: type
    ) -> None:
        """The later blocks see what the earlier ones, with numbers of their own, pass on."""
        numbers = [2, 5, 4]
        stage = pruner(
            sparsity=[n / 8 for n in numbers], mask_structure="4:8", targets=["LlamaDecoderLayer"]
        )
        mixed = prune(make_model(), stage)
        assert numbers_of(mixed, 8) == numbers

        expected = make_model()
        for depth, n in enumerate(numbers):
            stock = getattr(pruning, pruner.__name__)(
                sparsity=n / 8, mask_structure=f"{n}:8", targets=[f"re:.*layers\\.{depth}$"]
            )
            prune(expected, stock)
        found = weights_of(mixed)
        torch.testing.assert_close(found, weights_of(expected), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("pruner", PRUNERS)
    def test_none_and_all(self, make_model: MakeModel, pruner: type) -> None:
        before = make_model()
        stage = pruner(
            sparsity=[0.0, 0.5, 1.0], mask_structure="2:4", targets=["LlamaDecoderLayer"]
        )
        model = prune(make_model(), stage)
        assert numbers_of(model, 4) == [0, 2, 4]
        assert_same(weights_of(model.model.layers[0]), weights_of(before.model.layers[0]))

    def test_each_linear_its_own(self, make_model: MakeModel) -> None:
        numbers = [1, 2, 3, 4, 5, 6, 7] * 3
        stage = WandaPruningModifier(
            sparsity=[n / 8 for n in numbers], mask_structure="4:8", targets=["re:.*_proj$"]
        )
        model = prune(make_model(), stage)
        projections = [lin for name, lin in linears_of(model).items() if name != "lm_head"]
        assert [zeros_per_group(lin.weight, 8) for lin in projections] == [{n} for n in numbers]

    def test_refined_and_chosen(self, make_model: MakeModel) -> None:
        modifier = DLPModifier(alpha="auto", refine=6)
        model = prune(make_model(), modifier, WandaPruningModifier(mask_structure="4:8", **EVERY))
        (plan,) = last_plans()
        assert plan.sparsity == pytest.approx(0.5, abs=1e-12)
        planned = {n: s for block in plan.blocks for n, s in block.linears.items()}
        for name, linear in linears_of(model).items():
            if name != "lm_head":
                assert zeros_per_group(linear.weight, 8) == {round(planned[name] * 8)}, name
        numbers = sorted({round(8 * s) for s in plan.blocks[0].linears.values()})
        shown = f"({numbers[0]} to {numbers[-1]}:8)" if len(numbers) > 1 else f"({numbers[0]}:8)"
        assert shown in view.text(plan)

    @pytest.mark.parametrize("refined", [0, 3])
    def test_blocks_of_unequal_size(self, make_model: MakeModel, refined: int) -> None:
        """The total is as near as the sizes allow, and the plan says how near."""
        ignore = ["re:.*lm_head", "re:.*layers.0.*k_proj", "re:.*layers.1.*up_proj"]
        stage = WandaPruningModifier(mask_structure="4:8", targets=["Linear"], ignore=ignore)
        model = prune(make_model(), DLPModifier(alpha=0.2, refine=refined), stage)
        (plan,) = last_plans()
        weights = [block.weights for block in plan.blocks]
        assert len(set(weights)) == 3
        assert abs(plan.deviation) <= max(weights) / 8 / 2 / sum(weights)
        left = {"lm_head", "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"}
        pruned = [lin for name, lin in linears_of(model).items() if name not in left]
        assert sum(lin.weight.numel() for lin in pruned) == sum(weights)
        found = sum(zeros(lin) for lin in pruned)
        assert found / sum(weights) == pytest.approx(plan.sparsity, abs=1e-9)
        if refined:
            assert any(len(set(block.linears.values())) > 1 for block in plan.blocks)

    def test_a_peer(self, make_model: MakeModel) -> None:
        peer = LinearSparsityModifier(beta=1 / 8)
        model = prune(make_model(), peer, WandaPruningModifier(mask_structure="4:8", **EVERY))
        assert numbers_of(model, 8) == [3, 4, 5]

    def test_the_recipe_saved_with_the_model_gives_the_same_masks(
        self, make_model: MakeModel, tmp_path: Path
    ) -> None:
        text = recipe({"alpha": 0.3, "sparsity": 0.5}, sparsity=None, mask_structure="4:8")
        first = prune(make_model(), text, output_dir=str(tmp_path))
        saved = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
        stage = saved["pruning_stage"]["pruning_modifiers"]["WandaPruningModifier"]
        assert stage["mask_structure"] == "4:8"
        assert not isinstance(stage.get("sparsity"), list)
        second = prune(make_model(), str(tmp_path / "recipe.yaml"))
        assert_same(weights_of(second), weights_of(first))

    def test_scores_serve_another_structure(self, make_model: MakeModel, tmp_path: Path) -> None:
        path = tmp_path / "plan.json"
        prune(make_model(), DLPModifier(sparsity=0.5, alpha=0.3, plan_path=str(path)))
        plan = Plan.load(path).at(mask_structure="4:8")
        plan.save(path)
        assert Plan.load(path) == plan
        model = prune(
            make_model(),
            DLPModifier(from_plan=str(path)),
            WandaPruningModifier(mask_structure="4:8", **EVERY),
        )
        assert numbers_of(model, 8) == [round(block.sparsity * 8) for block in plan.blocks]


def test_plans_of_a_structure_are_checked(tmp_path: Path) -> None:
    plan = Plan.make(
        [("a", 100, 1.0), ("b", 300, 3.0), ("c", 100, 2.0)],
        model="m",
        method=DLP(alpha=0.2),
        target=0.5,
        mask_structure=MaskStructure(4, 8),
    )
    # k = 0.4, 0, 0.2, mean by weights 0.12: keep 0.78, 0.38, 0.58; of 8 go 1.76, 4.96, 3.36.
    # The whole parts 1, 4 and 3 prune 1600 of 2000 eighths; b, with the largest part missing,
    # gets one more (1900), then a (2000).
    assert [round(block.sparsity * 8) for block in plan.blocks] == [2, 5, 3]
    assert plan.deviation == 0
    assert "(5:8)" in view.text(plan)
    assert "4:8 on average over all weights, off by +0.0000%" in " ".join(view.text(plan).split())
    content = json.loads(plan.model_dump_json())
    content["blocks"][0]["sparsity"] = 0.3
    with pytest.raises(
        ValueError, match="sparsity of a is 0.3, which is no whole number of every 8"
    ):
        Plan.load(content)
    content["blocks"][0]["sparsity"] = 7 / 8
    with pytest.raises(ValueError, match="blocks: their sparsities come to 0.625"):
        Plan.load(content)
