"""Recipes as they are written and saved, plans that are given, and searches that go on."""

import json
from pathlib import Path

import pytest
import yaml
from helpers import EVERY, MakeModel, assert_same, prune, recipe, refuses, weights_of
from llmcompressor.modifiers.pruning import WandaPruningModifier

from dlp_plugin import DLPModifier, Plan, last_plans


class TestRecipes:
    def test_yaml_and_python_objects_work_the_same(self, make_model: MakeModel) -> None:
        stage = WandaPruningModifier(sparsity=0.7, **EVERY)
        objects = prune(make_model(), DLPModifier(alpha=0.15), stage)
        (plan,) = last_plans()
        assert plan.sparsity == pytest.approx(0.7)
        assert_same(weights_of(objects), weights_of(prune(make_model(), recipe())))
        assert last_plans() == [plan]

    def test_a_saved_recipe_runs_again_and_gives_the_same_masks(
        self, make_model: MakeModel, tmp_path: Path
    ) -> None:
        source, first, second = (str(tmp_path / name) for name in ("source", "first", "second"))
        make_model().save_pretrained(source)
        load = type(make_model()).from_pretrained
        plan_path = str(tmp_path / "plan.json")
        one = prune(load(source), recipe({"plan_path": plan_path}), output_dir=first)
        saved = yaml.safe_load(Path(first, "recipe.yaml").read_text())
        fields = saved["pruning_stage"]["pruning_modifiers"]
        assert fields["WandaPruningModifier"]["sparsity"] == 0.7
        assert fields["WandaPruningModifier"]["ignore"] == ["re:.*lm_head"]
        assert len(fields["DLPModifier"]["from_plan"]["blocks"]) == 3
        assert "plan_path" not in fields["DLPModifier"]

        two = prune(load(source), str(Path(first, "recipe.yaml")), output_dir=second)
        assert_same(weights_of(one), weights_of(two))
        again = yaml.safe_load(Path(second, "recipe.yaml").read_text())
        for text in (saved, again):  # deprecated; the host writes another value than it read
            del text["pruning_stage"]["pruning_modifiers"]["WandaPruningModifier"][
                "sequential_update"
            ]
        assert again == saved

    def test_a_saved_recipe_of_python_objects_keeps_every_pair_in_order(
        self, make_model: MakeModel, tmp_path: Path
    ) -> None:
        source, first = str(tmp_path / "source"), str(tmp_path / "first")
        make_model().save_pretrained(source)
        load = type(make_model()).from_pretrained
        pairs = [
            DLPModifier(),
            WandaPruningModifier(sparsity=0.5, targets=["re:.*self_attn$"]),
            DLPModifier(alpha=0.05),
            WandaPruningModifier(sparsity=0.7, targets=["re:.*mlp$"]),
        ]
        one = prune(load(source), pairs, output_dir=first)
        two = prune(load(source), str(Path(first, "recipe.yaml")))
        assert_same(weights_of(one), weights_of(two))

    def test_the_target_may_stand_in_either_place(self, make_model: MakeModel) -> None:
        in_stage = prune(make_model(), recipe())
        in_dlp = prune(make_model(), recipe({"sparsity": 0.7}, sparsity=None))
        in_both = prune(make_model(), recipe({"sparsity": 0.7}))
        left_out = recipe({"sparsity": 0.7})
        del left_out["pruning_stage"]["pruning_modifiers"]["WandaPruningModifier"]["sparsity"]
        for other in (in_dlp, in_both, prune(make_model(), left_out)):
            assert_same(weights_of(in_stage), weights_of(other))


class TestPlans:
    @pytest.fixture
    def plan_path(self, make_model: MakeModel, tmp_path: Path) -> str:
        """Made by a modifier that only writes a plan."""
        path = str(tmp_path / "plan.json")
        model = make_model()
        before = weights_of(model)
        prune(model, DLPModifier(sparsity=0.7, plan_path=path))
        assert_same(weights_of(model), before)
        return path

    def test_prunes_from_it_without_scoring(
        self, make_model: MakeModel, plan_path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scored = prune(make_model(), recipe())
        monkeypatch.setattr(
            "dlp_plugin.scoring.scores.block_score", lambda *_: pytest.fail("scored")
        )
        planned = prune(make_model(), recipe({"from_plan": plan_path}))
        assert_same(weights_of(scored), weights_of(planned))

    def test_at_another_target_and_alpha(self, make_model: MakeModel, plan_path: str) -> None:
        planned = prune(make_model(), recipe({"from_plan": plan_path, "alpha": 0.05}, sparsity=0.5))
        scored = prune(make_model(), recipe({"alpha": 0.05}, sparsity=0.5))
        assert_same(weights_of(scored), weights_of(planned))

    def test_at_its_own_target_if_none_is_stated(
        self, make_model: MakeModel, plan_path: str
    ) -> None:
        planned = prune(make_model(), recipe({"from_plan": plan_path}, sparsity=None))
        assert_same(weights_of(prune(make_model(), recipe())), weights_of(planned))

    def test_of_another_model_is_refused(self, make_model: MakeModel, plan_path: str) -> None:
        refuses(
            make_model(num_hidden_layers=4),
            "block model.layers.3 has no weights to prune in the plan and 36864 here",
            recipe({"from_plan": plan_path}),
        )
        refuses(
            make_model(intermediate_size=192),
            "block model.layers.0 has 36864 weights to prune in the plan and 49152 here",
            recipe({"from_plan": plan_path}),
        )

    def test_of_other_linears_is_refused(self, make_model: MakeModel, plan_path: str) -> None:
        text = recipe({"from_plan": plan_path}, targets=["re:.*mlp$"])
        refuses(make_model(), "score this model again with the same stages: plan_path", text)

    def test_of_another_statistic_is_refused(self, make_model: MakeModel, plan_path: str) -> None:
        text = recipe({"from_plan": plan_path, "statistic": "mean"})
        refuses(
            make_model(), "statistic is mean, but the plan's scores were made with median", text
        )

    def test_damaged_is_refused(self, make_model: MakeModel, plan_path: str) -> None:
        content = json.loads(Path(plan_path).read_text())
        content["blocks"][0]["sparsity"] = 0.0
        Path(plan_path).write_text(json.dumps(content))
        refuses(make_model(), "is not a sound plan", recipe({"from_plan": plan_path}))


class TestSearchFile:
    """How far a search is, beside the plan: kept until the plan is written, and no longer."""

    @pytest.fixture
    def plan_path(self, tmp_path: Path) -> Path:
        return tmp_path / "plan.json"

    @pytest.fixture
    def search(self, plan_path: Path) -> Path:
        return plan_path.with_name("plan.json.search")

    def test_a_plan_that_cannot_be_written_loses_no_search(
        self,
        make_model: MakeModel,
        plan_path: Path,
        search: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def fail(*_: object) -> None:
            raise OSError("disk is full")

        text = recipe({"plan_path": str(plan_path), "refine": 2})
        with monkeypatch.context() as meanwhile:
            meanwhile.setattr(Plan, "save", fail)
            with pytest.raises(OSError, match="disk is full"):
                prune(make_model(), text)
        assert search.is_file()
        assert not plan_path.exists()
        monkeypatch.setattr(
            "dlp_plugin.search.judge.Judge.divergence",
            lambda *_, **__: pytest.fail("measured again"),
        )
        prune(make_model(), text)
        assert len(Plan.load(plan_path).search) == 3
        assert not search.exists()

    def test_another_plan_written_there_leaves_it(
        self, make_model: MakeModel, plan_path: Path, search: Path
    ) -> None:
        refined = DLPModifier(sparsity=0.5, refine=1)
        prune(make_model(), refined, WandaPruningModifier(sparsity=0.5, **EVERY))
        search.write_text("of an interrupted search")
        given = DLPModifier(
            from_plan=refined.plan.model_dump(mode="json"), plan_path=str(plan_path)
        )
        prune(make_model(), given, WandaPruningModifier(sparsity=0.5, **EVERY))
        assert Plan.load(plan_path).search == refined.plan.search
        assert search.read_text() == "of an interrupted search"
