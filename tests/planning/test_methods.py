"""DLP's peers through the real ``oneshot()``, each against its paper's formula."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from helpers import (
    EVERY,
    Logged,
    MakeModel,
    as_if_loaded,
    assert_same,
    linears_of,
    prune,
    random_samples,
    recorded_inputs,
    run,
    weights_of,
    zeros,
)
from hypothesis import given
from hypothesis import strategies as st
from llmcompressor.modifiers.pruning import WandaPruningModifier
from transformers import BertConfig, BertForMaskedLM

from dlp_plugin import (
    AlphaPruningModifier,
    DLPModifier,
    LinearSparsityModifier,
    OWLModifier,
    Plan,
    last_plans,
)
from dlp_plugin.comparison.names import contender_named
from dlp_plugin.comparison.results import recipe_of
from dlp_plugin.modifiers.base import AllocationModifier
from dlp_plugin.planning.allocation import allocate
from dlp_plugin.planning.methods import (
    METHODS,
    AlphaPruning,
    Method,
    Strength,
    method_of,
    options,
)


class TestFormulas:
    """The numbers by hand, on four blocks at 70 %."""

    @staticmethod
    def sparsities(
        name: str, strength: float, scores: list[float], weights: list[int]
    ) -> list[float]:
        kind = METHODS[name]
        method = kind(**{kind.strength_field: strength})
        half = method.half_range(strength, scores, weights, 0.7)
        return allocate(method.unimportances(scores), weights, 0.7, half)

    def test_owl_keeps_blocks_with_many_outliers(self) -> None:
        # 2 * 0.08 * (r - 1) / (5 - 1) = .04, .16, .08, 0; mean .07; kept .27, .39, .31, .23
        found = self.sparsities("owl", 0.08, [2, 5, 3, 1], [1] * 4)
        assert found == pytest.approx([0.73, 0.61, 0.69, 0.77])

    def test_alpha_pruning_spreads_in_proportion(self) -> None:
        # p = .85, 1.3, 1, .7; eta = .7 * 4 / 3.85
        found = self.sparsities("alpha_pruning", 0.3, [2.5, 4, 3, 2], [1] * 4)
        assert found == pytest.approx([0.6181818, 0.9454545, 0.7272727, 0.5090909])

    def test_alpha_pruning_weighs_sizes(self) -> None:
        found = self.sparsities("alpha_pruning", 0.3, [2.5, 4, 3, 2], [1, 2, 3, 4])
        assert found == pytest.approx([0.6432432, 0.9837838, 0.7567568, 0.5297297])

    def test_alpha_pruning_is_clipped_and_stays_on_target(self) -> None:
        """The released code asks for 122 % of the second block."""
        found = self.sparsities("alpha_pruning", 0.8, [2.5, 4, 3, 2], [1] * 4)
        assert found[1] == 1
        assert sum(found) / 4 == pytest.approx(0.7)
        with pytest.raises(ValueError, match="epsilon must be at most 1, got 2"):
            self.sparsities("alpha_pruning", 2, [2, 2, 2, 10], [1] * 4)

    @given(
        st.sampled_from([kind() for kind in METHODS.values()]),
        st.lists(st.tuples(st.floats(0, 9), st.integers(1, 9)), min_size=2, max_size=6),
        st.floats(0, 0.3),
        st.floats(0.3, 0.7),
    )
    def test_a_strength_becomes_a_half_range_and_back(
        self, method: Method, blocks: list, half: float, target: float
    ) -> None:
        scores, weights = zip(*blocks, strict=True)
        strength = method.strength_of(half, scores, weights, target)
        if isinstance(method, AlphaPruning) and (strength in (0, 1) or half < 1e-9):
            return  # equal exponents have no range, and no epsilon is above 1
        again = method.half_range(strength, scores, weights, target)
        assert again == pytest.approx(half, rel=1e-9)

    def test_a_chosen_epsilon_is_at_most_one(self) -> None:
        assert AlphaPruning().strength_of(0.3, [1, 2, 9], [1, 1, 1], 0.2) == 1

    def test_linear_is_an_arithmetic_progression(self) -> None:
        found = self.sparsities("linear", 0.05, [0, 1, 2, 3], [1] * 4)
        assert found == pytest.approx([0.625, 0.675, 0.725, 0.775])

    @pytest.mark.parametrize("method", ["owl", "alpha_pruning", "linear"])
    def test_one_block_or_equal_scores_are_uniform(self, method: str) -> None:
        assert self.sparsities(method, 0.3, [2.0], [7]) == [0.7]
        assert self.sparsities(method, 0.3, [2.0, 2.0], [7, 3]) == [0.7, 0.7]


def plan_of(model: torch.nn.Module, modifier: object) -> Plan:
    prune(model, modifier, WandaPruningModifier(sparsity=0.7, **EVERY))
    return modifier.plan


def block_scores(model: torch.nn.Module) -> list[torch.Tensor]:
    """All weight scores of each block in float64, from a plain forward pass."""
    with recorded_inputs(model) as inputs, torch.no_grad():
        for ids in random_samples(8)["input_ids"]:
            model(input_ids=torch.tensor([ids]))
    linears = linears_of(model)
    return [
        torch.cat(
            [
                (linears[n].weight.double().abs() * torch.cat(inputs[n]).norm(dim=0)).flatten()
                for n in linears
                if n.startswith(f"model.layers.{block}.")
            ]
        ).detach()
        for block in range(3)
    ]


@pytest.mark.parametrize("multiple", [2.0, 3.0])
def test_owl_equals_the_original_formula(make_model: MakeModel, multiple: float) -> None:
    scores = block_scores(make_model())
    ratios = [100 * (s > multiple * s.mean()).double().mean().item() for s in scores]
    k = [0.16 * (r - min(ratios)) / (max(ratios) - min(ratios)) for r in ratios]
    expected = [1 - (x - sum(k) / 3 + 0.3) for x in k]
    model = make_model()
    plan = plan_of(model, OWLModifier(owl_m=multiple))
    assert plan.method == "owl"
    assert [b.score for b in plan.blocks] == pytest.approx(ratios, abs=1e-6)
    assert [b.sparsity for b in plan.blocks] == pytest.approx(expected, abs=1e-6)
    for block in plan.blocks:
        down = linears_of(model)[f"{block.name}.mlp.down_proj"]
        assert zeros(down) == int(down.in_features * block.sparsity) * down.out_features


def test_alpha_pruning_equals_the_original_formula(make_model: MakeModel) -> None:
    def hill(weight: torch.Tensor) -> float:
        values = torch.linalg.svdvals(weight.detach().double()).square().sort().values
        tail = values[len(values) // 2 :]
        return 1 + len(tail) / (tail / tail[0]).log().sum().item()

    model = make_model()
    linears = linears_of(model)
    exponents = []
    for block in range(3):
        found = [hill(m.weight) for n, m in linears.items() if f"layers.{block}." in n]
        exponents.append(sum(found) / len(found))
    low, high = min(exponents), max(exponents)
    p = [0.9 + 0.2 * (e - low) / (high - low) for e in exponents]
    expected = [0.7 * 3 / sum(p) * x for x in p]
    modifier = AlphaPruningModifier(epsilon=0.1, tail="median")
    model = make_model()
    plan = plan_of(model, modifier)
    assert [b.score for b in plan.blocks] == pytest.approx(exponents, rel=1e-6)
    assert [b.sparsity for b in plan.blocks] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("modifier", [AlphaPruningModifier(), LinearSparsityModifier(beta=0.05)])
def test_what_needs_no_data_plans_without(
    make_model: MakeModel, tmp_path: Path, modifier: object
) -> None:
    path = tmp_path / "plan.json"
    alone = type(modifier)(
        **modifier.model_dump(include=modifier.model_fields_set), sparsity=0.7, plan_path=str(path)
    )
    run(make_model(), [alone], None)
    with_data = plan_of(make_model(), modifier)
    assert Plan.load(path).blocks == with_data.blocks


def test_linear_in_a_recipe(make_model: MakeModel) -> None:
    plan = plan_of(make_model(), LinearSparsityModifier(beta=0.05))
    assert [b.sparsity for b in plan.blocks] == pytest.approx([0.65, 0.7, 0.75])


def test_every_peer_by_name_in_yaml_and_again_from_its_saved_recipe(
    make_model: MakeModel, tmp_path: Path
) -> None:
    for number, (kind, fields) in enumerate(
        {
            "OWLModifier": {"owl_m": 3, "owl_lmbda": 0.1},
            "AlphaPruningModifier": {"epsilon": 0.2},
            "LinearSparsityModifier": {"beta": 0.02},
        }.items()
    ):
        stage = {kind: fields, "WandaPruningModifier": {"sparsity": 0.7, **EVERY}}
        text = {"pruning_stage": {"pruning_modifiers": stage}}
        folder = tmp_path / str(number)
        model = prune(make_model(), text, output_dir=str(folder))
        again = prune(make_model(), str(folder / "recipe.yaml"))
        (plan,) = last_plans()
        assert plan.strength == next(iter(reversed(fields.values())))
        assert_same(weights_of(again), weights_of(model))


class TestBadInput:
    def test_an_m_that_no_weight_exceeds_makes_all_blocks_alike(
        self, make_model: MakeModel, logged: Logged
    ) -> None:
        plan = plan_of(make_model(), OWLModifier(owl_m=1e6))
        assert [b.sparsity for b in plan.blocks] == [0.7] * 3
        assert any(
            "All blocks have the same score (% of scores above 1e+06" in m
            for m in logged("WARNING")
        )

    def test_a_degenerate_spectrum_is_named(self, make_model: MakeModel) -> None:
        model = make_model()
        model.model.layers[1].mlp.up_proj.weight.data.zero_()
        with pytest.raises(ValueError, match=r"no power law fits.*model.layers.1.mlp.up_proj"):
            plan_of(model, AlphaPruningModifier())

    def test_a_plan_of_another_method(self, make_model: MakeModel, tmp_path: Path) -> None:
        path = str(tmp_path / "plan.json")
        plan_of(make_model(), OWLModifier(plan_path=path))
        with pytest.raises(
            ValueError, match="a plan of method owl, but DLPModifier makes plans of dlp"
        ):
            plan_of(make_model(), DLPModifier(from_plan=path))

    @pytest.mark.parametrize(
        ("modifier", "fields"),
        [
            (OWLModifier, {"owl_m": 3.0}),
            (AlphaPruningModifier, {"tail": "median"}),
        ],
    )
    def test_a_plan_made_with_other_settings(
        self, make_model: MakeModel, tmp_path: Path, modifier: type, fields: dict
    ) -> None:
        ((name, value),) = fields.items()
        path = str(tmp_path / "plan.json")
        plan_of(make_model(), modifier(plan_path=path))
        with pytest.raises(
            ValueError, match=f"{name} is {value}, but the plan's scores were made with"
        ):
            plan_of(make_model(), modifier(from_plan=path, **fields))
        other = tmp_path / "other.json"
        plan_of(make_model(), modifier(plan_path=str(other), **fields))
        again = modifier(from_plan=str(other))
        plan_of(make_model(), again)
        assert getattr(again, name) == value  # what a saved recipe then says

    @pytest.mark.parametrize("kind", [DLPModifier, LinearSparsityModifier])
    def test_what_is_no_causal_language_model_is_not_judged(
        self, kind: type, tmp_path: Path
    ) -> None:
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
        model = BertForMaskedLM(BertConfig(vocab_size=256, num_hidden_layers=2, **sizes))
        as_if_loaded(model, tmp_path)
        with pytest.raises(ValueError, match="BertForMaskedLM is not one: its predictions change"):
            plan_of(model, kind(**{kind.strength_field: "auto"}))

    @pytest.mark.parametrize(
        ("modifier", "fields"),
        [
            (OWLModifier, {"owl_m": 0}),
            (OWLModifier, {"owl_m": True}),
            (OWLModifier, {"owl_lmbda": -1}),
            (OWLModifier, {"owl_lmbda": True}),
            (AlphaPruningModifier, {"epsilon": -0.1}),
            (AlphaPruningModifier, {"epsilon": True}),
            (AlphaPruningModifier, {"epsilon": 1.1}),
            (AlphaPruningModifier, {"tail": "head"}),
            (LinearSparsityModifier, {"beta": -0.1}),
            (LinearSparsityModifier, {"beta": True}),
        ],
    )
    def test_settings_out_of_bounds_are_named(self, modifier: type, fields: dict) -> None:
        (name,) = fields
        with pytest.raises(ValueError, match=rf"{modifier.__name__}\n{name}\n"):
            modifier(**fields)

    def test_peers_do_not_feed_each_others_stages(self, make_model: MakeModel) -> None:
        owl, dlp = OWLModifier(), DLPModifier()
        stages = [
            WandaPruningModifier(sparsity=0.7, targets=[f"re:.*{name}_proj$"])
            for name in ("down", "up")
        ]
        prune(make_model(), owl, stages[0], dlp, stages[1])
        assert owl.plan.blocks[0].weights == dlp.plan.blocks[0].weights == 64 * 128
        assert [plan.method for plan in last_plans()] == ["owl", "dlp"]


class Alternating(Method):
    """A method of one's own: every other block is pruned harder."""

    swing: Strength = 0.1
    first: float = 0.0

    name: ClassVar[str] = "by_turns"
    title: ClassVar[str] = "By turns"
    modifier: ClassVar[str] = "AlternatingModifier"
    strength_field: ClassVar[str] = "swing"
    sees_activations: ClassVar[bool] = False

    @property
    def score_name(self) -> str:
        return "whether the block is even"

    def score(self, depth: int, parts: Mapping[str, object]) -> float:
        return (self.first + depth) % 2


class AlternatingModifier(Alternating, AllocationModifier):
    """The same, as recipes name it."""


def test_a_method_is_one_class_and_a_line_of_the_registry(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(METHODS, Alternating.name, Alternating)
    assert "by-turns" in options()
    assert method_of("by-turns") is Alternating
    contender = contender_named("by-turns-refined:0.2")
    assert (contender.name, contender.method.swing) == ("by-turns:0.2 refined 16", 0.2)
    modifier = AlternatingModifier(first=1, plan_path=str(tmp_path / "plan.json"))
    prune(make_model(), modifier, WandaPruningModifier(sparsity=0.7, **EVERY))
    plan = Plan.load(tmp_path / "plan.json")
    # the first and third block of three: k = 0, 0.2 and 0, their mean 0.0667
    assert [b.sparsity for b in plan.blocks] == pytest.approx([0.7667, 0.5667, 0.7667], abs=1e-4)
    assert (plan.method, plan.settings, plan.strength) == ("by_turns", {"first": 1.0}, 0.1)
    again = plan.at(strength=0.0)
    assert [b.sparsity for b in again.blocks] == [0.7] * 3
    assert "AlternatingModifier" in recipe_of(plan, "wanda")
