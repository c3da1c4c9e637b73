"""``DLPModifier`` through the real ``oneshot()``: the definition, and the stages that it feeds."""

from pathlib import Path

import pytest
import torch
from helpers import (
    EVERY,
    Logged,
    MakeModel,
    assert_same,
    linears_of,
    naive_scores,
    naive_sparsities,
    prune,
    random_samples,
    recipe,
    run,
    weights_of,
    zeros,
)
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

from dlp_plugin import DLPModifier, Plan

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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
        run(model, [plan_only], random_samples(4))
        assert len(calls) == 3 * 4

    def test_alpha_zero_prunes_like_the_stage_alone(self, make_model: MakeModel) -> None:
        with_dlp = prune(make_model(), recipe({"alpha": 0.0}))
        alone = recipe()
        del alone["pruning_stage"]["pruning_modifiers"]["DLPModifier"]
        assert_same(weights_of(with_dlp), weights_of(prune(make_model(), alone)))

    def test_the_norm_is_over_all_tokens_however_samples_are_batched(
        self, make_model: MakeModel, tmp_path: Path
    ) -> None:
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
        model = prune(make_model(), dlp, stage)
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
        self, make_model: MakeModel, logged: Logged, pruner: str, targets: list
    ) -> None:
        model = make_model(num_hidden_layers=1)
        head = model.lm_head.weight.clone()
        prune(model, recipe(pruner=pruner, targets=targets, ignore=[]))
        assert torch.equal(model.lm_head.weight, head)
        up = linears_of(model)["model.layers.0.mlp.up_proj"]
        assert zeros(up) / up.weight.numel() == pytest.approx(0.7, abs=0.02)
        assert any("left dense" in m and "['lm_head']" in m for m in logged("INFO"))

    @pytest.mark.parametrize("pruner", ["WandaPruningModifier", "SparseGPTModifier"])
    def test_blocks_clipped_at_nothing_and_at_everything(
        self, make_model: MakeModel, logged: Logged, pruner: str
    ) -> None:
        dlp = DLPModifier(alpha=2.0)
        kind = {"W": WandaPruningModifier, "S": SparseGPTModifier}[pruner[0]]
        stage = kind(sparsity=0.5, **EVERY)
        model = prune(make_model(), dlp, stage)
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
        assert any("pruned to nothing" in m and emptied in m for m in logged("WARNING"))

    def test_two_stages_after_one_modifier_are_one_plan(self, make_model: MakeModel) -> None:
        dlp = DLPModifier(sparsity=0.6)
        attention = WandaPruningModifier(sparsity=None, targets=["re:.*self_attn$"])
        mlp = WandaPruningModifier(sparsity=0.6, targets=["re:.*mlp$"])
        model = prune(make_model(), dlp, attention, mlp)
        naive = naive_scores(make_model(), random_samples(), block_linears())
        expected = naive_sparsities([s["median"] for s in naive.values()], 0.6, 0.15)
        assert [b.sparsity for b in dlp.plan.blocks] == pytest.approx(expected, abs=1e-6)
        assert_wanda_zeros(model, dlp.plan, block_linears())

    def test_two_pairs_have_their_own_plans(self, make_model: MakeModel) -> None:
        first, second = DLPModifier(alpha=0.1), DLPModifier(alpha=0.05)
        model = prune(
            make_model(),
            first,
            WandaPruningModifier(sparsity=0.5, targets=["re:.*self_attn$"]),
            second,
            WandaPruningModifier(sparsity=0.7, targets=["re:.*mlp$"]),
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
        model = prune(make_model(), dlp, stage, gptq)
        assert dlp.plan.sparsity == pytest.approx(0.7, abs=1e-9)
        for name, linear in linears_of(model).items():
            if name != "lm_head":
                assert len(linear.weight[0].unique()) > 1
                assert hasattr(linear, "weight_scale"), name

    def test_blocks_of_unequal_size_come_to_the_target(self, make_model: MakeModel) -> None:
        dlp = DLPModifier()
        ignore = ["re:.*lm_head", "re:.*layers.0.mlp", "re:.*layers.1.self_attn"]
        stage = WandaPruningModifier(sparsity=0.7, targets=["Linear"], ignore=ignore)
        prune(make_model(), dlp, stage)
        assert len({block.weights for block in dlp.plan.blocks}) == 3
        assert dlp.plan.sparsity == pytest.approx(0.7, abs=1e-9)


def test_the_log_tells_how_far_scoring_is(make_model: MakeModel, logged: Logged) -> None:
    run(make_model(), recipe(), random_samples(4))
    assert logged("INFO", by="dlp_plugin") == [
        "Scoring 3 blocks on 4 batches",
        *(f"scored block {n + 1} of 3: model.layers.{n}" for n in range(3)),
    ]
