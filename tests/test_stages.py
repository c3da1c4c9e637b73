"""The stages: an N of N:M for every block, and one-shot magnitude, through ``oneshot()``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from compressed_tensors.offload import load_offloaded_model
from conftest import linears_of, random_samples, run, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from llmcompressor.modifiers import pruning
from loguru import logger
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from dlp_plugin import (
    DLPModifier,
    LinearSparsityModifier,
    OneShotMagnitudeModifier,
    Plan,
    SparseGPTModifier,
    WandaPruningModifier,
    last_plans,
)
from dlp_plugin.planning import view
from dlp_plugin.planning.methods import DLP
from dlp_plugin.planning.structure import MaskStructure
from dlp_plugin.pruning.magnitude import smallest

MakeModel = Callable[..., LlamaForCausalLM]
PRUNERS = [WandaPruningModifier, SparseGPTModifier, OneShotMagnitudeModifier]
CALIBRATED = PRUNERS[:2]
EVERY = {"targets": ["Linear"], "ignore": ["re:.*lm_head"]}


def prune(model: torch.nn.Module, *recipe: object, **arguments: object) -> torch.nn.Module:
    return run(model, list(recipe), random_samples(), **arguments)


def block_linears(model: LlamaForCausalLM, depth: int) -> dict[str, torch.nn.Linear]:
    return linears_of(model.model.layers[depth])


def zeros_per_group(weight: torch.Tensor, m: int) -> set[int]:
    """How many zeros the groups of M consecutive weights of the rows have."""
    return set((weight == 0).unflatten(1, (-1, m)).sum(2).flatten().tolist())


def numbers_of(model: LlamaForCausalLM, m: int) -> list[int]:
    """Every block's N, the same in every group of every row of every Linear."""
    numbers = []
    for depth in range(len(model.model.layers)):
        found = [zeros_per_group(lin.weight, m) for lin in block_linears(model, depth).values()]
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
        assert (model.lm_head.weight != 0).all()

    @pytest.mark.parametrize("pruner", CALIBRATED)
    def test_uniform_is_the_stock_stage(self, make_model: MakeModel, pruner: type) -> None:
        """The same bits, so errors are passed on from block to block as the host does."""
        fed = prune(make_model(), DLPModifier(alpha=0), pruner(mask_structure="4:8", **EVERY))
        stock = getattr(pruning, pruner.__name__)(sparsity=0.5, mask_structure="4:8", **EVERY)
        expected = prune(make_model(), stock)
        for name, value in expected.state_dict().items():
            assert torch.equal(fed.state_dict()[name], value), name

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
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(mixed.state_dict()[name], value, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("pruner", PRUNERS)
    def test_none_and_all(self, make_model: MakeModel, pruner: type) -> None:
        before = make_model()
        stage = pruner(
            sparsity=[0.0, 0.5, 1.0], mask_structure="2:4", targets=["LlamaDecoderLayer"]
        )
        model = prune(make_model(), stage)
        assert numbers_of(model, 4) == [0, 2, 4]
        for name, linear in block_linears(model, 0).items():
            assert torch.equal(linear.weight, block_linears(before, 0)[name].weight)

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
        zeros = sum(int((lin.weight == 0).sum()) for lin in pruned)
        assert zeros / sum(weights) == pytest.approx(plan.sparsity, abs=1e-9)
        if refined:
            assert any(len(set(block.linears.values())) > 1 for block in plan.blocks)

    def test_a_peer(self, make_model: MakeModel) -> None:
        peer = LinearSparsityModifier(beta=1 / 8)
        model = prune(make_model(), peer, WandaPruningModifier(mask_structure="4:8", **EVERY))
        assert numbers_of(model, 8) == [3, 4, 5]

    def test_the_recipe_saved_with_the_model_gives_the_same_masks(
        self, make_model: MakeModel, tmp_path: Path
    ) -> None:
        text = yaml.safe_dump(
            {
                "pruning_stage": {
                    "pruning_modifiers": {
                        "DLPModifier": {"alpha": 0.3, "sparsity": 0.5},
                        "WandaPruningModifier": {"mask_structure": "4:8", **EVERY},
                    }
                }
            }
        )
        dataset = random_samples()
        first = run(make_model(), text, dataset, output_dir=str(tmp_path))
        saved = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
        stage = saved["pruning_stage"]["pruning_modifiers"]["WandaPruningModifier"]
        assert stage["mask_structure"] == "4:8"
        assert not isinstance(stage.get("sparsity"), list)
        second = run(make_model(), str(tmp_path / "recipe.yaml"), dataset)
        for name, value in first.state_dict().items():
            assert torch.equal(second.state_dict()[name], value), name

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


def refuses(make_model: MakeModel, message: str, *recipe: object) -> None:
    """The run stops with this message, and no weight has changed."""
    model, untouched = make_model(), make_model().state_dict()
    with pytest.raises(ValueError, match=message):
        prune(model, *recipe)
    for name, value in model.state_dict().items():
        assert torch.equal(value, untouched[name]), name


class TestBadPatterns:
    @pytest.mark.parametrize("pruner", PRUNERS)
    def test_columns_that_groups_do_not_divide(self, make_model: MakeModel, pruner: type) -> None:
        message = (
            r"model.layers.0.self_attn.q_proj has 64 columns, which groups of 6 weights do not "
            rf"divide: add them to {pruner.__name__}.ignore"
        )
        refuses(make_model, message, DLPModifier(), pruner(mask_structure="3:6", **EVERY))
        refuses(make_model, message, pruner(mask_structure="3:6", **EVERY))

    def test_a_plan_of_another_structure(self, make_model: MakeModel, tmp_path: Path) -> None:
        free, fixed = tmp_path / "free.json", tmp_path / "fixed.json"
        prune(make_model(), DLPModifier(sparsity=0.5, plan_path=str(free)))
        Plan.load(free).at(mask_structure="4:8").save(fixed)
        refuses(
            make_model,
            r"is for unstructured pruning, and the stages' mask_structure is 4:8: .*"
            r"show plan.json --mask-structure 4:8",
            DLPModifier(from_plan=str(free)),
            WandaPruningModifier(mask_structure="4:8", **EVERY),
        )
        refuses(
            make_model,
            "is for 4:8, and the stages' mask_structure is 2:4",
            DLPModifier(from_plan=str(fixed)),
            WandaPruningModifier(mask_structure="2:4", **EVERY),
        )
        refuses(
            make_model,
            "is for 4:8, and the stages' mask_structure is 0:0",
            DLPModifier(from_plan=str(fixed)),
            WandaPruningModifier(sparsity=0.5, **EVERY),
        )

    def test_a_sparsity_that_is_not_the_structure_s(self, make_model: MakeModel) -> None:
        stage = WandaPruningModifier(mask_structure="4:8", **EVERY)
        message = "DLPModifier.sparsity is 0.6, but mask_structure 4:8 is 0.5 on average"
        refuses(make_model, message, DLPModifier(sparsity=0.6), stage)
        stage = WandaPruningModifier(sparsity=0.7, mask_structure="4:8", **EVERY)
        refuses(make_model, "WandaPruningModifier.sparsity is 0.7, but", DLPModifier(), stage)

    def test_a_list_of_what_is_no_number_of_weights(self, make_model: MakeModel) -> None:
        stage = WandaPruningModifier(
            sparsity=[0.5, 0.6, 0.5], mask_structure="4:8", targets=["LlamaDecoderLayer"]
        )
        message = "an entry of WandaPruningModifier.sparsity is 0.6, which is no whole number of"
        refuses(make_model, message, stage)

    def test_a_list_of_another_length(self, make_model: MakeModel) -> None:
        stage = WandaPruningModifier(sparsity=[0.5, 0.5], targets=["LlamaDecoderLayer"])
        refuses(make_model, "sparsity holds 2 values, and its targets match 3 modules", stage)

    @pytest.mark.parametrize("pruner", PRUNERS)
    @pytest.mark.parametrize("value", [70, -0.1, [0.5, -0.125, 0.5]])
    def test_a_sparsity_out_of_range(
        self, make_model: MakeModel, pruner: type, value: float | list[float]
    ) -> None:
        structure = "4:8" if isinstance(value, list) else "0:0"
        stage = pruner(sparsity=value, mask_structure=structure, targets=["LlamaDecoderLayer"])
        refuses(make_model, rf"{pruner.__name__}.sparsity must be between 0 and 1, got", stage)

    @pytest.mark.parametrize("value", [True, [0.5, True, 0.5]])
    def test_a_yes_is_no_number(self, value: object) -> None:
        message = r"sparsity is .*True.*, which is no number: state it, e\.g\. 0\.7"
        for pruner in PRUNERS:
            with pytest.raises(ValueError, match=message):
                pruner(sparsity=value, targets=["LlamaDecoderLayer"])

    @pytest.mark.parametrize("pruner", PRUNERS)
    def test_targets_that_match_nothing(self, make_model: MakeModel, pruner: type) -> None:
        message = (
            rf"{pruner.__name__} prunes nothing in LlamaForCausalLM: its targets are \['Conv2d'\]"
        )
        refuses(make_model, message, pruner(sparsity=0.5, targets=["Conv2d"]))

    @pytest.mark.parametrize("structure", ["8:8", "5:4", "0:8", "4"])
    def test_a_structure_that_is_none(self, structure: str) -> None:
        with pytest.raises(ValueError, match=f"mask_structure must be N:M.*got '{structure}'"):
            WandaPruningModifier(mask_structure=structure, **EVERY)

    def test_a_structure_that_yaml_reads_as_a_number(self, make_model: MakeModel) -> None:
        """Base 60, as in times of day."""
        text = "p_stage: {p_modifiers: {WandaPruningModifier: {mask_structure: 4:8}}}"
        with pytest.raises(ValueError, match='mask_structure is 248: quote it, "2:4"'):
            run(make_model(), text, random_samples())

    def test_a_sparsity_that_a_stage_alone_contradicts(self, make_model: MakeModel) -> None:
        stage = WandaPruningModifier(sparsity=0.7, mask_structure="4:8", **EVERY)
        refuses(make_model, "WandaPruningModifier.sparsity is 0.7, but mask_structure 4:8", stage)

    def test_a_plan_that_no_stage_follows(self, make_model: MakeModel, tmp_path: Path) -> None:
        path = str(tmp_path / "plan.json")
        modifier = DLPModifier(mask_structure="3:6", alpha="auto", plan_path=path)
        refuses(make_model, "q_proj has 64 columns, which groups of 6 weights do not", modifier)

    def test_a_refined_plan_is_not_made_to_fit(self, make_model: MakeModel) -> None:
        refined = DLPModifier(sparsity=0.5, refine=1)
        prune(make_model(), refined, WandaPruningModifier(**EVERY, sparsity=0.5))
        given = DLPModifier(from_plan=refined.plan.model_dump(mode="json"))
        stage = WandaPruningModifier(mask_structure="4:8", **EVERY)
        refuses(make_model, "mask_structure is 4:8: search again", given, stage)

    def test_stages_of_different_structure(self, make_model: MakeModel) -> None:
        stages = [
            WandaPruningModifier(mask_structure="4:8", targets=["re:.*mlp$"]),
            WandaPruningModifier(mask_structure="2:4", targets=["re:.*self_attn$"]),
        ]
        refuses(
            make_model, "4:8 in Wanda.*, 2:4 in Wanda.*: state the same", DLPModifier(), *stages
        )

    def test_the_host_s_own_class(self, make_model: MakeModel) -> None:
        stage = pruning.WandaPruningModifier(sparsity=0.5, mask_structure="4:8", **EVERY)
        message = "llm-compressor's own class, which has one N for the whole model: import it from"
        refuses(make_model, message, DLPModifier(), stage)

    def test_groups_cut_by_the_block_size_of_sparsegpt(self, make_model: MakeModel) -> None:
        stage = SparseGPTModifier(mask_structure="4:8", block_size=20, **EVERY)
        refuses(make_model, "block_size 20 would cut through groups of 8 weights", stage)

    def test_zeros_that_sparsegpt_looks_for_in_the_wrong_columns(
        self, make_model: MakeModel
    ) -> None:
        stage = SparseGPTModifier(mask_structure="4:8", preserve_sparsity_mask=True, **EVERY)
        refuses(make_model, "preserve_sparsity_mask looks for the zeros .*: leave it out", stage)

    @pytest.mark.parametrize("pruner", PRUNERS)
    def test_no_sparsity(self, make_model: MakeModel, pruner: type) -> None:
        with pytest.raises(ValueError, match="sparsity\n  Field required"):
            pruner(**EVERY)
        refuses(
            make_model,
            rf"{pruner.__name__}.sparsity is not stated",
            pruner(sparsity=None, **EVERY),
        )


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
        with pytest.raises(
            ValueError, match=r"weight of model.layers.1.mlp.up_proj holds infinite"
        ):
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
            assert int(pruned.sum()) == int(pruned.numel() * 0.7)  # ties included, as in bf16
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
            for linear in block_linears(model, depth).values():
                assert int((linear.weight == 0).sum()) == int(linear.weight.numel() * sparsity)
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
        make_model().save_pretrained(tmp_path / "dense")
        word_tokenizer().save_pretrained(tmp_path / "dense")
        with load_offloaded_model():
            model = AutoModelForCausalLM.from_pretrained(
                tmp_path / "dense",
                dtype=torch.float32,
                device_map="auto_offload",
                max_memory={"cpu": 1 << 17},
                offload_folder=str(tmp_path / "offload"),
            )
        model = run(model, [OneShotMagnitudeModifier(sparsity=0.5, **EVERY)], None)
        assert len(list((tmp_path / "offload").iterdir())) > 0
        for name, linear in linears_of(expected).items():
            assert torch.equal(linears_of(model)[name].weight, linear.weight), name

    def test_a_profile_is_refused(self, make_model: MakeModel) -> None:
        stage = OneShotMagnitudeModifier(
            sparsity=0.5, sparsity_profile="owl", owl_m=5, owl_lmbda=0.1, **EVERY
        )
        refuses(make_model, "put OWLModifier before it", stage)


def linear_of(model: LlamaForCausalLM) -> torch.nn.Linear:
    return model.model.layers[1].mlp.up_proj


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


class TestIgnore:
    """Names and patterns mean in a stage what they mean everywhere."""

    ENTRIES = (
        ("lm_head", "lm_head"),
        ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"),
        (r"re:.*layers\.0\.self_attn\.q_proj$", "model.layers.0.self_attn.q_proj"),
    )

    @pytest.mark.parametrize(
        ("pruner", "fed"),
        [*((p, fed) for p in PRUNERS for fed in (1, 0)), (pruning.WandaPruningModifier, 1)],
    )
    def test_exact_names_and_ends(self, make_model: MakeModel, pruner: type, fed: int) -> None:
        ignore = [entry for entry, _ in self.ENTRIES]
        stage = pruner(sparsity=0.5, targets=["Linear"], ignore=ignore)
        model = prune(make_model(), *([DLPModifier()] if fed else []), stage)
        dense = {n for n, linear in linears_of(model).items() if not (linear.weight == 0).any()}
        assert dense == {name for _, name in self.ENTRIES}
        assert stage.ignore == ignore  # the recipe reads as it was written

    @pytest.mark.parametrize("fed", [True, False])
    @pytest.mark.parametrize(
        ("entry", "found"),
        [
            ("model.head", "no module of LlamaForCausalLM: mend or remove it; the names are"),
            ("Conv2d", "no module of LlamaForCausalLM"),
            ("model.layers.1", r"model.layers.1, but nothing that is pruned, as .* in it is"),
            ("LlamaMLP", r"model.layers.0.mlp, but .*: write 're:model\\\.layers\\\.0\\\.mlp\\\.'"),
            (
                "re:.*self_attn$",
                r".*: write 're:model\\\.layers\\\.0\\\.self_attn\\\.' to leave out all",
            ),
        ],
    )
    def test_an_entry_without_effect_is_an_error(
        self, make_model: MakeModel, entry: str, found: str, fed: bool
    ) -> None:
        stages = [WandaPruningModifier, pruning.WandaPruningModifier] if fed else PRUNERS
        for pruner in stages:
            stage = pruner(sparsity=0.5, targets=["Linear"], ignore=["re:.*lm_head", entry])
            said = rf"{pruner.__name__}.ignore holds {re.escape(repr(entry))}, which matches "
            refuses(make_model, said + found, *([DLPModifier()] if fed else []), stage)

    def test_the_remedy_leaves_out_all_that_is_in_a_module(self, make_model: MakeModel) -> None:
        ignore = [r"re:model\.layers\.1\.", "lm_head", "LlamaRMSNorm", "Embedding"]
        stage = WandaPruningModifier(sparsity=0.5, targets=["Linear"], ignore=ignore)
        model = prune(make_model(), stage)
        dense = {n for n, linear in linears_of(model).items() if not (linear.weight == 0).any()}
        blocks = {f"model.layers.1.{name}" for name in linears_of(model.model.layers[1])}
        assert dense == {"lm_head"} | blocks

    def test_a_module_of_which_nothing_is_pruned(self, make_model: MakeModel) -> None:
        stage = WandaPruningModifier(sparsity=0.5, targets=["re:.*attn$"], ignore=["LlamaMLP"])
        model = prune(make_model(), stage)
        assert (model.model.layers[0].self_attn.q_proj.weight == 0).any()

    def test_a_pattern_for_models_that_have_what_this_has_not(self, make_model: MakeModel) -> None:
        """As ``re:.*lm_head`` for an encoder: a line in the log."""
        messages: list[str] = []
        handle = logger.add(messages.append, level="WARNING", format="{message}")
        ignore = ["re:.*lm_head", "re:.*score$"]
        prune(make_model(), WandaPruningModifier(sparsity=0.5, targets=["Linear"], ignore=ignore))
        logger.remove(handle)
        said = "WandaPruningModifier.ignore holds 're:.*score$', which matches no module of"
        assert [said in message for message in messages].count(True) == 1
        assert not any("lm_head" in message for message in messages)

    @pytest.mark.parametrize("pattern", ["re:[", "re:a{99999999999999999999}"])
    @pytest.mark.parametrize("field", ["targets", "ignore"])
    def test_a_bad_regular_expression(
        self, make_model: MakeModel, field: str, pattern: str
    ) -> None:
        stage = SparseGPTModifier(**{"sparsity": 0.5, **EVERY, field: [pattern]})
        message = (
            rf"SparseGPTModifier\.{field} holds {re.escape(repr(pattern))}, which is no regular "
            r"expression \(.*\): mend it, or name the modules without re:"
        )
        refuses(make_model, message, stage)

    def test_no_list(self, make_model: MakeModel) -> None:
        message = r"WandaPruningModifier\.targets is 'Linear': write a list, \['Linear'\]"
        refuses(make_model, message, WandaPruningModifier(sparsity=0.5, targets="Linear"))
        with pytest.raises(ValueError, match=r"WandaPruningModifier\nignore\n.*a valid list"):
            WandaPruningModifier(sparsity=0.5, ignore="lm_head")

    def test_below_a_target_that_holds_several(self, make_model: MakeModel) -> None:
        ignore = ["model.layers.1.mlp.up_proj", r"re:.*q_proj$"]
        stage = WandaPruningModifier(sparsity=0.5, targets=["LlamaDecoderLayer"], ignore=ignore)
        model = prune(make_model(), stage)
        dense = {n for n, linear in linears_of(model).items() if not (linear.weight == 0).any()}
        queries = {f"model.layers.{depth}.self_attn.q_proj" for depth in range(3)}
        assert dense == {"lm_head", "model.layers.1.mlp.up_proj"} | queries
