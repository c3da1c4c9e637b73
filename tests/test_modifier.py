"""``DLPModifier`` through the real ``oneshot()`` on tiny models with random weights."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import (
    linears_of,
    naive_scores,
    naive_sparsities,
    random_samples,
    run,
    zeros,
)
from datasets import Dataset
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from loguru import logger

from dlp_plugin import DLPModifier, Plan

MakeModel = Callable[..., torch.nn.Module]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def recipe(
    dlp: dict | None = None, pruner: str = "WandaPruningModifier", **stage: object
) -> dict[str, object]:
    stage = {"sparsity": 0.7, "targets": ["Linear"], "ignore": ["re:.*lm_head"], **stage}
    return {"pruning_stage": {"pruning_modifiers": {"DLPModifier": dlp or {}, pruner: stage}}}


def prune(model: torch.nn.Module, text: object, **arguments: object) -> torch.nn.Module:
    return run(
        model,
        yaml.safe_dump(text) if isinstance(text, dict) else text,
        arguments.pop("dataset", random_samples()),
        **arguments,
    )


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def block_linears(names: tuple[str, ...] = PROJECTIONS, blocks: int = 3) -> dict[str, list[str]]:
    def path(name: str) -> str:
        return ("mlp." if name in PROJECTIONS[4:] else "self_attn.") + name

    return {
        f"model.layers.{i}": [f"model.layers.{i}.{path(name)}" for name in names]
        for i in range(blocks)
    }


def assert_wanda_zeros(model: torch.nn.Module, plan: Plan, names: dict[str, list[str]]) -> None:
    """Wanda prunes ``int(columns * sparsity)`` weights of every row."""
    linears = linears_of(model)
    for block in plan.blocks:
        for name in names[block.name]:
            linear = linears[name]
            pruned = int(linear.in_features * block.sparsity)
            assert ((linear.weight == 0).sum(1) == pruned).all(), name
    pruned_names = {name for group in names.values() for name in group}
    for name in linears.keys() - pruned_names:
        assert zeros(linears[name]) == 0, name


class TestDefinition:
    @pytest.mark.parametrize("statistic", ["median", "mean"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_sparsities_equal_the_definition_in_float64(
        self, make_model: MakeModel, statistic: str, dtype: torch.dtype, tmp_path: Path
    ) -> None:
        dataset = random_samples()
        naive = naive_scores(make_model(dtype), dataset, block_linears())
        expected = naive_sparsities([s[statistic] for s in naive.values()], 0.7, 0.15)
        path = tmp_path / "plan.json"
        model = prune(make_model(dtype), recipe({"statistic": statistic, "plan_path": str(path)}))
        plan = Plan.load(path)
        assert [b.name for b in plan.blocks] == list(naive)
        assert [b.sparsity for b in plan.blocks] == pytest.approx(expected, abs=1e-6)
        assert plan.sparsity == pytest.approx(0.7, abs=1e-9)
        assert_wanda_zeros(model, plan, block_linears())

    def test_sparsegpt_prunes_each_group_of_128_columns(
        self, make_model: MakeModel, tmp_path: Path
    ) -> None:
        path = tmp_path / "plan.json"
        model = make_model(hidden_size=256, intermediate_size=256, torch_dtype=torch.float32)
        prune(model, recipe({"plan_path": str(path)}, "SparseGPTModifier"))
        linears = linears_of(model)
        for block in Plan.load(path).blocks:
            for name in block_linears()[block.name]:
                for group in linears[name].weight.split(128, dim=1):
                    # it zeroes what is at most the sorted value at this place: one more,
                    # and more again where values are equal
                    least = int(group.numel() * block.sparsity) + 1
                    assert least <= int((group == 0).sum()) <= least + 1, name

    def test_same_inputs_give_the_same_bytes(self, make_model: MakeModel, tmp_path: Path) -> None:
        for name in ("one", "two"):
            path = str(tmp_path / f"{name}.json")
            model = prune(make_model(), recipe({"plan_path": path}))
            torch.save(weights_of(model), tmp_path / name)
        assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
        assert_same(torch.load(tmp_path / "one"), torch.load(tmp_path / "two"))

    def test_scoring_runs_every_block_once(self, make_model: MakeModel, tmp_path: Path) -> None:
        model, calls = make_model(), []
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda *_: calls.append(1))
        plan_only = DLPModifier(sparsity=0.6, plan_path=str(tmp_path / "plan.json"))
        prune(model, [plan_only], dataset=random_samples(4))
        assert len(calls) == 3 * 4

    def test_alpha_zero_prunes_like_the_stage_alone(self, make_model: MakeModel) -> None:
        with_dlp = prune(make_model(), recipe({"alpha": 0.0}))
        alone = recipe()
        del alone["pruning_stage"]["pruning_modifiers"]["DLPModifier"]
        assert_same(weights_of(with_dlp), weights_of(prune(make_model(), alone)))

    def test_samples_of_unequal_length_and_batches(
        self, make_model: MakeModel, tmp_path: Path
    ) -> None:
        """The norm is over all tokens of all samples, however they are batched."""
        dataset = random_samples(8)
        plans = []
        for batch_size in (1, 4):
            path = str(tmp_path / f"{batch_size}.json")
            prune(make_model(), recipe({"plan_path": path}), batch_size=batch_size)
            plans.append(Plan.load(path))
        naive = naive_scores(make_model(), dataset, block_linears())
        for plan in plans:
            assert [b.score for b in plan.blocks] == pytest.approx(
                [s["median"] for s in naive.values()], rel=1e-6
            )


class TestFeeding:
    @pytest.mark.parametrize("pruner", ["WandaPruningModifier", "SparseGPTModifier"])
    @pytest.mark.parametrize(
        ("targets", "ignore", "names"),
        [
            (["Linear"], ["re:.*lm_head"], PROJECTIONS),
            ([r"re:.*layers\.\d+$"], [], PROJECTIONS),
            (["LlamaDecoderLayer"], ["re:.*down_proj"], PROJECTIONS[:6]),
            (["re:.*(q|k|v)_proj$"], [], PROJECTIONS[:3]),
            (["LlamaMLP", "re:.*o_proj$"], [], PROJECTIONS[3:]),
            (["re:.*mlp$", "re:.*up_proj$"], [], PROJECTIONS[4:]),
        ],
    )
    def test_whatever_the_targets_match(
        self, make_model: MakeModel, pruner: str, targets: list, ignore: list, names: tuple
    ) -> None:
        dataset = random_samples()
        naive = naive_scores(make_model(), dataset, block_linears(names))
        expected = naive_sparsities([s["median"] for s in naive.values()], 0.7, 0.15)
        dlp = DLPModifier()
        kind = {"W": WandaPruningModifier, "S": SparseGPTModifier}[pruner[0]]
        stage = kind(sparsity=0.7, targets=targets, ignore=ignore)
        model = prune(make_model(), [dlp, stage])
        assert [b.sparsity for b in dlp.plan.blocks] == pytest.approx(expected, abs=1e-6)
        if kind is WandaPruningModifier:
            assert_wanda_zeros(model, dlp.plan, block_linears(names))
        else:
            linears = linears_of(model)
            for block in dlp.plan.blocks:
                for name in block_linears(names)[block.name]:
                    found = zeros(linears[name]) / linears[name].weight.numel()
                    assert found == pytest.approx(block.sparsity, abs=2e-3), name

    @pytest.mark.parametrize("pruner", ["WandaPruningModifier", "SparseGPTModifier"])
    @pytest.mark.parametrize(
        "targets", [["Linear"], ["LlamaForCausalLM"], ["lm_head", "re:.*mlp$"]]
    )
    def test_linears_outside_every_block_stay_dense_and_are_named(
        self, make_model: MakeModel, pruner: str, targets: list
    ) -> None:
        messages: list[str] = []
        sink = logger.add(messages.append, level="INFO")
        model = make_model(num_hidden_layers=1)
        head = model.lm_head.weight.clone()
        prune(model, recipe(pruner=pruner, targets=targets, ignore=[]))
        logger.remove(sink)
        assert torch.equal(model.lm_head.weight, head)
        assert zeros(linears_of(model)["model.layers.0.mlp.up_proj"]) > 0
        assert any("left dense" in m and "['lm_head']" in m for m in messages)

    @pytest.mark.parametrize("pruner", ["WandaPruningModifier", "SparseGPTModifier"])
    def test_blocks_clipped_at_nothing_and_at_everything(
        self, make_model: MakeModel, pruner: str
    ) -> None:
        messages: list[str] = []
        sink = logger.add(messages.append, level="WARNING")
        dlp = DLPModifier(alpha=2.0)
        kind = {"W": WandaPruningModifier, "S": SparseGPTModifier}[pruner[0]]
        stage = kind(sparsity=0.5, targets=["Linear"], ignore=["re:.*lm_head"])
        model = prune(make_model(), [dlp, stage])
        logger.remove(sink)
        sparsities = [block.sparsity for block in dlp.plan.blocks]
        assert max(sparsities) == 1
        assert min(sparsities) == 0
        assert dlp.plan.sparsity == pytest.approx(0.5, abs=1e-9)
        linears = linears_of(model)
        for block in dlp.plan.blocks:
            for name in block_linears()[block.name]:
                found = zeros(linears[name]) / linears[name].weight.numel()
                assert found == pytest.approx(block.sparsity, abs=0.02), name
        emptied = dlp.plan.blocks[sparsities.index(1)].name
        assert any("pruned to nothing" in m and emptied in m for m in messages)

    def test_two_stages_after_one_modifier_are_one_plan(self, make_model: MakeModel) -> None:
        dlp = DLPModifier(sparsity=0.6)
        attention = WandaPruningModifier(sparsity=None, targets=["re:.*self_attn$"])
        mlp = WandaPruningModifier(sparsity=0.6, targets=["re:.*mlp$"])
        model = prune(make_model(), [dlp, attention, mlp])
        naive = naive_scores(make_model(), random_samples(), block_linears())
        expected = naive_sparsities([s["median"] for s in naive.values()], 0.6, 0.15)
        assert [b.sparsity for b in dlp.plan.blocks] == pytest.approx(expected, abs=1e-6)
        assert_wanda_zeros(model, dlp.plan, block_linears())

    def test_two_pairs_have_their_own_plans(self, make_model: MakeModel) -> None:
        first, second = DLPModifier(alpha=0.1), DLPModifier(alpha=0.05)
        model = prune(
            make_model(),
            [
                first,
                WandaPruningModifier(sparsity=0.5, targets=["re:.*self_attn$"]),
                second,
                WandaPruningModifier(sparsity=0.7, targets=["re:.*mlp$"]),
            ],
        )
        linears = linears_of(model)
        for plan, names in (
            (first.plan, block_linears(PROJECTIONS[:4])),
            (second.plan, block_linears(PROJECTIONS[4:])),
        ):
            for block in plan.blocks:
                for name in names[block.name]:
                    linear = linears[name]
                    pruned = int(linear.in_features * block.sparsity)
                    assert zeros(linear) == pruned * linear.out_features, name
        assert (first.plan.target, second.plan.target) == (0.5, 0.7)

    def test_gptq_after_it_in_one_recipe(self, make_model: MakeModel) -> None:
        dlp = DLPModifier()
        stage = WandaPruningModifier(sparsity=0.7, targets=["Linear"], ignore=["lm_head."])
        gptq = GPTQModifier(
            ignore=["lm_head"],
            config_groups={
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 4, "strategy": "group", "group_size": 64},
                }
            },
        )
        model = prune(make_model(), [dlp, stage, gptq])
        assert dlp.plan.sparsity == pytest.approx(0.7, abs=1e-9)
        for name, linear in linears_of(model).items():
            if name != "lm_head":
                assert len(linear.weight[0].unique()) > 1
                assert hasattr(linear, "weight_scale"), name

    def test_blocks_of_unequal_size_come_to_the_target(self, make_model: MakeModel) -> None:
        dlp = DLPModifier()
        ignore = ["re:.*lm_head", "re:.*layers.0.mlp", "re:.*layers.1.self_attn"]
        stage = WandaPruningModifier(sparsity=0.7, targets=["Linear"], ignore=ignore)
        prune(make_model(), [dlp, stage])
        assert len({block.weights for block in dlp.plan.blocks}) == 3
        assert dlp.plan.sparsity == pytest.approx(0.7, abs=1e-9)


class TestRecipes:
    def test_yaml_and_python_objects_work_the_same(self, make_model: MakeModel) -> None:
        stage = WandaPruningModifier(sparsity=0.7, targets=["Linear"], ignore=["re:.*lm_head"])
        objects = prune(make_model(), [DLPModifier(alpha=0.15), stage])
        assert_same(weights_of(objects), weights_of(prune(make_model(), recipe())))

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
        assert_same(weights_of(in_stage), weights_of(in_dlp))
        assert_same(weights_of(in_stage), weights_of(in_both))


class TestPlans:
    @pytest.fixture
    def plan_path(self, make_model: MakeModel, tmp_path: Path) -> str:
        """Made by a modifier that only writes a plan."""
        path = str(tmp_path / "plan.json")
        model = make_model()
        before = weights_of(model)
        prune(model, [DLPModifier(sparsity=0.7, plan_path=path)])
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
            recipe({"from_plan": plan_path}),
            "block model.layers.3 has no weights to prune in the plan and 36864 here",
        )
        refuses(
            make_model(intermediate_size=192),
            recipe({"from_plan": plan_path}),
            "block model.layers.0 has 36864 weights to prune in the plan and 49152 here",
        )

    def test_of_other_linears_is_refused(self, make_model: MakeModel, plan_path: str) -> None:
        text = recipe({"from_plan": plan_path}, targets=["re:.*mlp$"])
        refuses(make_model(), text, "score this model again with the same stages: plan_path")

    def test_of_another_statistic_is_refused(self, make_model: MakeModel, plan_path: str) -> None:
        text = recipe({"from_plan": plan_path, "statistic": "mean"})
        refuses(make_model(), text, "statistic is mean, but the plan's scores were made with median")

    def test_damaged_is_refused(self, make_model: MakeModel, plan_path: str) -> None:
        content = json.loads(Path(plan_path).read_text())
        content["blocks"][0]["sparsity"] = 0.0
        Path(plan_path).write_text(json.dumps(content))
        refuses(make_model(), recipe({"from_plan": plan_path}), "is not a sound plan")


def refuses(
    model: torch.nn.Module,
    text: object,
    message: str,
    dataset: Dataset | None = None,
    **arguments: object,
) -> None:
    """The run stops with this message, and no weight has changed."""
    before = weights_of(model)
    with pytest.raises(ValueError, match=message):
        prune(model, text, dataset=dataset or random_samples(), **arguments)
    assert_same(
        {name: value for name, value in weights_of(model).items() if not value.isnan().any()},
        {name: value for name, value in before.items() if not value.isnan().any()},
    )


class TestBadInput:
    @pytest.mark.parametrize("value", [0.0, 1.0, -0.5, 1.5, math.nan])
    def test_sparsity_outside_the_open_interval(self, make_model: MakeModel, value: float) -> None:
        message = "sparsity must be strictly between 0 and 1, got"
        refuses(make_model(), recipe({"sparsity": value}), message)
        refuses(make_model(), recipe(sparsity=value), rf"WandaPruningModifier\.{message}")

    @pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
    def test_alpha(self, make_model: MakeModel, value: float) -> None:
        refuses(make_model(), recipe({"alpha": value}), "alpha must be finite and at least 0, got")

    @pytest.mark.parametrize("field", ["alpha", "sparsity", "refine", "num_samples", "seed"])
    def test_a_yes_is_no_number(self, make_model: MakeModel, field: str) -> None:
        refuses(make_model(), recipe({field: True}), f"DLPModifier\n{field}\n.*True is no number")

    @pytest.mark.parametrize("field", ["targets", "ignore"])
    def test_a_bad_regular_expression(self, make_model: MakeModel, field: str) -> None:
        message = rf"WandaPruningModifier\.{field} holds 're:\[', which is no regular expression"
        refuses(make_model(), recipe(**{field: ["re:["]}), message)

    def test_an_ignore_entry_that_matches_nothing(self, make_model: MakeModel) -> None:
        message = r"ignore holds 'model\.head', which matches no module of LlamaForCausalLM: mend"
        refuses(make_model(), recipe(ignore=["re:.*lm_head", "model.head"]), message)

    def test_an_unknown_statistic_or_field(self, make_model: MakeModel) -> None:
        refuses(make_model(), recipe({"statistic": "max"}), "'median' or 'mean'")
        refuses(make_model(), recipe({"alhpa": 0.1}), "alhpa")

    def test_no_sparsity_anywhere(self, make_model: MakeModel) -> None:
        refuses(make_model(), recipe(sparsity=None), "no sparsity is stated")

    def test_contradicting_sparsities(self, make_model: MakeModel) -> None:
        text = recipe({"sparsity": 0.6})
        refuses(make_model(), text, "stated as 0.6 by DLPModifier, 0.7 by WandaPruningModifier")

    def test_no_stage_and_no_plan_to_write(self, make_model: MakeModel) -> None:
        refuses(make_model(), [DLPModifier(sparsity=0.7)], "add one, or set plan_path")

    def test_a_stage_before_it_is_not_after_it(self, make_model: MakeModel) -> None:
        stage = WandaPruningModifier(sparsity=0.7, targets=["Linear"])
        refuses(
            make_model(),
            [stage, DLPModifier(sparsity=0.7)],
            "no SparseGPTModifier, WandaPruningModifier or OneShot",
        )

    def test_a_stage_with_a_list(self, make_model: MakeModel) -> None:
        text = recipe(sparsity=[0.7] * 22)
        refuses(make_model(), text, "WandaPruningModifier.sparsity is a list")

    def test_a_stage_with_a_profile(self, make_model: MakeModel) -> None:
        text = recipe(sparsity_profile="owl", owl_m=5, owl_lmbda=0.08)
        refuses(make_model(), text, "WandaPruningModifier.sparsity_profile is 'owl'")

    def test_no_calibration_data(self, make_model: MakeModel) -> None:
        model = make_model()
        with pytest.raises(ValueError, match="got no calibration data: pass dataset="):
            prune(model, recipe(), dataset=None)
        others = Dataset.from_dict({"labels": [[1, 2], [3, 4]]})
        refuses(model, recipe(), "with input_ids or a text column", dataset=others)

    def test_targets_that_match_nothing(self, make_model: MakeModel) -> None:
        refuses(make_model(), recipe(targets=["Conv2d"]), "prunes no Linear in any block")
        # the host walks through the letters of a plain string
        message = r"WandaPruningModifier\.targets is 'Linear': write a list, \['Linear'\]"
        refuses(make_model(), recipe(targets="Linear"), message)
        refuses(make_model(), recipe(ignore=["Linear"]), "prunes no Linear in any block")

    def test_a_target_that_holds_several_blocks(self, make_model: MakeModel) -> None:
        text = recipe(targets=["LlamaModel"])
        refuses(make_model(), text, r"matches model, which holds 3 blocks.*use targets: \[Linear\]")

    def test_one_epoch_for_all_modifiers(self, make_model: MakeModel) -> None:
        refuses(make_model(), recipe(), "pipeline='independent'", pipeline="sequential")

    def test_a_folder_for_the_plan_that_is_not_there(
        self, make_model: MakeModel, tmp_path: Path
    ) -> None:
        text = recipe({"plan_path": str(tmp_path / "absent" / "plan.json")})
        refuses(make_model(), text, "plan_path: cannot write .* does not exist; create it first")

    def test_a_folder_where_the_plan_is_to_be(self, make_model: MakeModel, tmp_path: Path) -> None:
        text = recipe({"plan_path": str(tmp_path), "refine": 1})
        refuses(make_model(), text, "plan_path: .* is a folder; name a file in it")

    def test_a_weight_that_is_not_finite(self, make_model: MakeModel) -> None:
        model = make_model()
        with torch.no_grad():
            model.model.layers[2].mlp.down_proj.weight[0, 0] = math.nan
        refuses(model, recipe(), r"weight of model.layers.2.mlp.down_proj holds infinite or")

    def test_an_activation_that_is_not_finite(self, make_model: MakeModel) -> None:
        model = make_model()
        with torch.no_grad():
            model.model.layers[1].input_layernorm.weight[5] = math.inf
        message = r"inputs of model.layers.1.self_attn.q_proj hold infinite or undefined"
        refuses(model, recipe(), message)

    def test_a_model_without_blocks_the_host_can_name(self, make_model: MakeModel) -> None:
        model = make_model()
        model._no_split_modules = None
        refuses(model, recipe(), r"no blocks found in LlamaForCausalLM.*sequential_targets=")
        message = "no blocks found in LlamaForCausalLM by sequential_targets="
        refuses(make_model(), recipe(), message, sequential_targets=["Nothing"])

    def test_a_block_that_no_sample_reaches(self, make_model: MakeModel) -> None:
        model = make_model()
        model.config.num_hidden_layers = 2  # the third layer is there, and never called
        refuses(model, recipe(), r"no Linear of block model.layers.2 saw calibration data")

    def test_a_failed_run_writes_no_plan(self, make_model: MakeModel, tmp_path: Path) -> None:
        model = make_model()
        with torch.no_grad():
            model.model.layers[2].mlp.down_proj.weight[0, 0] = math.nan
        refuses(model, recipe({"plan_path": str(tmp_path / "plan.json")}), "holds infinite")
        assert list(tmp_path.iterdir()) == []


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
        stage = {"sparsity": 0.5, "targets": ["Linear"], "ignore": ["re:.*lm_head"]}
        prune(make_model(), [refined, WandaPruningModifier(**stage)])
        search.write_text("of an interrupted search")
        given = DLPModifier(
            from_plan=refined.plan.model_dump(mode="json"), plan_path=str(plan_path)
        )
        prune(make_model(), [given, WandaPruningModifier(**stage)])
        assert Plan.load(plan_path).search
        assert search.read_text() == "of an interrupted search"


def test_the_log_tells_how_far_scoring_is(make_model: MakeModel) -> None:
    messages: list[str] = []
    handle = logger.add(messages.append, level="INFO", format="{message}", filter="dlp_plugin")
    prune(make_model(), recipe(), dataset=random_samples(4))
    logger.remove(handle)
    assert [message.strip() for message in messages] == [
        "Scoring 3 blocks on 4 batches",
        *(f"scored block {n + 1} of 3: model.layers.{n}" for n in range(3)),
    ]


def test_one_weight_in_two_modules_is_refused(make_model: MakeModel) -> None:
    """It would be counted twice, and pruned twice (Zamba2 has such blocks)."""
    model = make_model()
    first, second = (model.model.layers[i].mlp.up_proj for i in (0, 1))
    second.weight = first.weight
    match = r"layers.0.mlp.up_proj and .*layers.1.mlp.up_proj share one.*add re:model.layers.1"
    with pytest.raises(ValueError, match=match):
        prune(model, recipe())
    model = prune(model, recipe(ignore=["re:.*lm_head", "re:model.layers.1.mlp.up_proj"]))
    assert (model.model.layers[0].mlp.up_proj.weight == 0).any()
