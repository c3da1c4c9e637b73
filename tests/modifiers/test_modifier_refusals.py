"""What ``DLPModifier`` refuses before a weight has changed, and the remedy that it names."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import (
    VOCABULARY,
    MakeModel,
    as_if_loaded,
    assert_same,
    prune,
    recipe,
    refuses,
    run,
    weights_of,
    zeros,
)
from llmcompressor.modifiers.pruning import WandaPruningModifier
from transformers import BioGptConfig, BioGptForCausalLM

from dlp_plugin import DLPModifier, last_plans


class TestBadInput:
    @pytest.mark.parametrize("value", [0.0, 1.0, -0.5, 1.5, math.nan])
    def test_sparsity_outside_the_open_interval(self, make_model: MakeModel, value: float) -> None:
        message = "sparsity must be strictly between 0 and 1, got"
        refuses(make_model(), message, recipe({"sparsity": value}))
        refuses(make_model(), rf"WandaPruningModifier\.{message}", recipe(sparsity=value))

    @pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
    def test_alpha(self, make_model: MakeModel, value: float) -> None:
        refuses(make_model(), "alpha must be finite and at least 0, got", recipe({"alpha": value}))

    @pytest.mark.parametrize("field", ["alpha", "sparsity", "refine", "num_samples", "seed"])
    def test_a_yes_is_no_number(self, make_model: MakeModel, field: str) -> None:
        refuses(
            make_model(), f"DLPModifier\n{field}\n.*True is neither a number", recipe({field: True})
        )

    @pytest.mark.parametrize("field", ["targets", "ignore"])
    def test_a_bad_regular_expression(self, make_model: MakeModel, field: str) -> None:
        message = rf"WandaPruningModifier\.{field} holds 're:\[', which is no regular expression"
        refuses(make_model(), message, recipe(**{field: ["re:["]}))

    def test_an_ignore_entry_that_matches_nothing(self, make_model: MakeModel) -> None:
        message = r"ignore holds 'model\.head', which matches no module of LlamaForCausalLM: mend"
        refuses(make_model(), message, recipe(ignore=["re:.*lm_head", "model.head"]))

    def test_an_unknown_statistic_or_field(self, make_model: MakeModel) -> None:
        refuses(make_model(), "'median' or 'mean'", recipe({"statistic": "max"}))
        refuses(make_model(), "alhpa\n  Extra inputs are not permitted", recipe({"alhpa": 0.1}))

    def test_no_sparsity_anywhere(self, make_model: MakeModel) -> None:
        refuses(make_model(), "no sparsity is stated", recipe(sparsity=None))

    def test_contradicting_sparsities(self, make_model: MakeModel) -> None:
        text = recipe({"sparsity": 0.6})
        refuses(make_model(), "stated as 0.6 by DLPModifier, 0.7 by WandaPruningModifier", text)

    def test_no_stage_and_no_plan_to_write(self, make_model: MakeModel) -> None:
        refuses(make_model(), "add one, or set plan_path", DLPModifier(sparsity=0.7))

    def test_a_stage_before_it_is_not_after_it(self, make_model: MakeModel) -> None:
        stage = WandaPruningModifier(sparsity=0.7, targets=["Linear"])
        refuses(
            make_model(),
            "no SparseGPTModifier, WandaPruningModifier, ADMMPruningModifier or OneShot",
            stage,
            DLPModifier(sparsity=0.7),
        )

    def test_a_stage_with_a_list(self, make_model: MakeModel) -> None:
        text = recipe(sparsity=[0.7] * 22)
        refuses(make_model(), "WandaPruningModifier.sparsity is a list", text)

    def test_a_stage_with_a_profile(self, make_model: MakeModel) -> None:
        text = recipe(sparsity_profile="owl", owl_m=5, owl_lmbda=0.08)
        refuses(make_model(), "WandaPruningModifier.sparsity_profile is 'owl'", text)

    def test_no_calibration_data(self, make_model: MakeModel) -> None:
        model = make_model()
        before = weights_of(model)
        with pytest.raises(ValueError, match="got no calibration data: pass dataset="):
            run(model, recipe(), None)
        others = Dataset.from_dict({"labels": [[1, 2], [3, 4]]})
        with pytest.raises(ValueError, match="with input_ids or a text column"):
            run(model, recipe(), others)
        assert_same(weights_of(model), before)

    def test_targets_that_match_nothing(self, make_model: MakeModel) -> None:
        refuses(make_model(), "prunes no Linear in any block", recipe(targets=["Conv2d"]))
        # the host walks through the letters of a plain string
        message = r"WandaPruningModifier\.targets is 'Linear': write a list, \['Linear'\]"
        refuses(make_model(), message, recipe(targets="Linear"))
        refuses(make_model(), "prunes no Linear in any block", recipe(ignore=["Linear"]))

    def test_a_target_that_holds_several_blocks(self, make_model: MakeModel) -> None:
        text = recipe(targets=["LlamaModel"])
        refuses(make_model(), r"matches model, which holds 3 blocks.*use targets: \[Linear\]", text)

    def test_one_epoch_for_all_modifiers(self, make_model: MakeModel) -> None:
        refuses(make_model(), "pipeline='independent'", recipe(), pipeline="sequential")

    def test_a_folder_for_the_plan_that_is_not_there(
        self, make_model: MakeModel, tmp_path: Path
    ) -> None:
        text = recipe({"plan_path": str(tmp_path / "absent" / "plan.json")})
        refuses(make_model(), "plan_path: cannot write .* does not exist; create it first", text)

    def test_a_folder_where_the_plan_is_to_be(self, make_model: MakeModel, tmp_path: Path) -> None:
        text = recipe({"plan_path": str(tmp_path), "refine": 1})
        refuses(make_model(), "plan_path: .* is a folder; name a file in it", text)

    def test_a_weight_that_is_not_finite(self, make_model: MakeModel) -> None:
        model = make_model()
        with torch.no_grad():
            model.model.layers[2].mlp.down_proj.weight[0, 0] = math.nan
        refuses(model, r"weight of model.layers.2.mlp.down_proj holds infinite or", recipe())

    def test_an_activation_that_is_not_finite(self, make_model: MakeModel) -> None:
        model = make_model()
        with torch.no_grad():
            model.model.layers[1].input_layernorm.weight[5] = math.inf
        message = r"inputs of model.layers.1.self_attn.q_proj hold infinite or undefined"
        refuses(model, message, recipe())

    def test_a_model_without_blocks_the_host_can_name(
        self, make_model: MakeModel, tmp_path: Path
    ) -> None:
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
        config = BioGptConfig(vocab_size=VOCABULARY, num_hidden_layers=2, **sizes)
        model = as_if_loaded(BioGptForCausalLM(config), tmp_path)  # no class of blocks is declared
        refuses(model, r"no blocks found in BioGptForCausalLM: .*sequential_targets=", recipe())
        message = "no blocks found in LlamaForCausalLM by sequential_targets="
        refuses(make_model(), message, recipe(), sequential_targets=["Nothing"])

    def test_a_block_that_no_sample_reaches(self, make_model: MakeModel) -> None:
        model = make_model()
        model.config.num_hidden_layers = 2  # the third layer is there, and never called
        refuses(model, r"no Linear of block model.layers.2 received calibration data", recipe())

    def test_a_failed_run_writes_no_plan(self, make_model: MakeModel, tmp_path: Path) -> None:
        model = make_model()
        with torch.no_grad():
            model.model.layers[2].mlp.down_proj.weight[0, 0] = math.nan
        refuses(model, "holds infinite", recipe({"plan_path": str(tmp_path / "plan.json")}))
        assert list(tmp_path.iterdir()) == []


def test_one_weight_in_two_modules_is_refused(make_model: MakeModel) -> None:
    """It would be counted twice, and pruned twice (Zamba2 has such blocks)."""
    model = make_model()
    first, second = (model.model.layers[i].mlp.up_proj for i in (0, 1))
    second.weight = first.weight
    match = r"layers.0.mlp.up_proj and .*layers.1.mlp.up_proj share one.*add re:model.layers.1"
    refuses(model, match, recipe())
    prune(model, recipe(ignore=["re:.*lm_head", "re:model.layers.1.mlp.up_proj"]))
    (first_block, *_), linear = last_plans()[0].blocks, model.model.layers[0].mlp.up_proj
    assert zeros(linear) == int(linear.in_features * first_block.sparsity) * linear.out_features
