"""Choosing a strength and refining a plan in recipes, on a model's own losses."""

import json
from pathlib import Path

import pytest
from helpers import (
    EVERY,
    MakeModel,
    assert_same,
    prune,
    random_samples,
    refuses,
    run,
    weights_of,
    zeros,
)
from llmcompressor.modifiers.pruning import WandaPruningModifier

from dlp_plugin import AlphaPruningModifier, DLPModifier, LinearSparsityModifier, OWLModifier, Plan
from dlp_plugin.search.judge import Judge


def wanda() -> WandaPruningModifier:
    return WandaPruningModifier(sparsity=0.6, **EVERY)


@pytest.mark.parametrize(
    "kind", [DLPModifier, OWLModifier, AlphaPruningModifier, LinearSparsityModifier]
)
def test_auto_in_a_recipe(make_model: MakeModel, kind: type) -> None:
    modifier = kind(**{kind.strength_field: "auto"})
    model = make_model()
    prune(model, modifier, wanda())
    plan = modifier.plan
    assert len(plan.candidates) == 7
    best = min(plan.candidates, key=lambda c: c.loss)
    assert plan.strength == best.strength == modifier.strength
    assert plan.sparsity == pytest.approx(0.6)
    assert modifier.from_plan == plan.model_dump(mode="json")


def test_refine_in_a_recipe_and_again_from_its_plan(make_model: MakeModel, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    model = make_model()
    modifier = DLPModifier(alpha="auto", refine=3, plan_path=str(path))
    prune(model, modifier, wanda())
    plan = Plan.load(path)
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["plan.json"]
    assert plan.search[-1].divergence <= plan.search[0].divergence
    for block in plan.blocks:
        for name, sparsity in block.linears.items():
            linear = model.get_submodule(name)
            assert zeros(linear) == int(linear.in_features * sparsity) * linear.out_features
    again = make_model()
    prune(again, DLPModifier(from_plan=str(path)), wanda())
    assert_same(weights_of(again), weights_of(model))


def test_a_search_whose_plan_cannot_be_written_is_not_lost(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    left = tmp_path / "plan.json.search"

    def search() -> Plan:
        modifier = DLPModifier(refine=2, plan_path=str(path))
        prune(make_model(), modifier, wanda())
        return modifier.plan

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Plan, "save", full)
        with pytest.raises(OSError, match="no space left"):
            search()
    assert len(json.loads(left.read_text())["steps"]) == 3
    with monkeypatch.context() as patch:
        patch.setattr(Judge, "divergence", lambda *_, **__: pytest.fail("measured again"))
        plan = search()
    assert Plan.load(path) == plan
    assert not left.exists()


class TestBadInput:
    def test_linears_that_do_not_come_to_their_block(
        self, make_model: MakeModel, tmp_path: Path
    ) -> None:
        path = tmp_path / "plan.json"
        prune(make_model(), DLPModifier(refine=1, plan_path=str(path)), wanda())
        content = json.loads(path.read_text())
        linears = content["blocks"][1]["linears"]
        large, small = "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.k_proj"
        linears[large], linears[small] = 0.9, 0.1
        message = r"block model\.layers\.1 has sparsity.*linears come to"
        refuses(make_model(), message, DLPModifier(from_plan=content), wanda())

    def test_too_few_samples_to_split(self, make_model: MakeModel) -> None:
        with pytest.raises(ValueError, match=r"held-out.*only one batch"):
            run(make_model(), [DLPModifier(alpha="auto"), wanda()], random_samples(1))

    def test_targets_that_hold_several_linears_cannot_be_refined(
        self, make_model: MakeModel
    ) -> None:
        stage = WandaPruningModifier(sparsity=0.6, targets=["LlamaDecoderLayer"])
        message = r"matches model.layers.0, which holds 7"
        refuses(make_model(), message, DLPModifier(refine=1), stage)

    @pytest.mark.parametrize("wanted", [{"alpha": "auto"}, {"refine": 2}])
    def test_a_plan_leaves_nothing_to_judge_by(
        self, make_model: MakeModel, tmp_path: Path, wanted: dict
    ) -> None:
        path = str(tmp_path / "plan.json")
        prune(make_model(), DLPModifier(plan_path=path), wanda())
        message = "from_plan prunes without calibration samples"
        refuses(make_model(), message, DLPModifier(from_plan=path, **wanted), wanda())

    @pytest.mark.parametrize("value", ["often", -0.1, float("nan")])
    def test_a_strength_is_a_number_or_auto(self, value: object) -> None:
        with pytest.raises(ValueError, match=r"DLPModifier\nalpha"):
            DLPModifier(alpha=value)
