"""Sparsities, structures and plans that the stages refuse before a weight has changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import (
    EVERY,
    PRUNERS,
    MakeModel,
    kept_on_disk,
    linears_of,
    prune,
    refuses,
    weights_of,
    zeros,
)
from llmcompressor.modifiers import pruning

from dlp_plugin import (
    ADMMPruningModifier,
    DLPModifier,
    MaskedGPTQModifier,
    Plan,
    SparseGPTModifier,
    WandaPruningModifier,
)


class TestBadPatterns:
    @pytest.mark.parametrize("pruner", PRUNERS)
    def test_columns_that_groups_do_not_divide(self, make_model: MakeModel, pruner: type) -> None:
        message = (
            r"model.layers.0.self_attn.q_proj has 64 columns, which is not a multiple of 6: "
            rf"add them to {pruner.__name__}.ignore"
        )
        refuses(make_model(), message, DLPModifier(), pruner(mask_structure="3:6", **EVERY))
        refuses(make_model(), message, pruner(mask_structure="3:6", **EVERY))

    def test_a_plan_of_another_structure(self, make_model: MakeModel, tmp_path: Path) -> None:
        free, fixed = tmp_path / "free.json", tmp_path / "fixed.json"
        prune(make_model(), DLPModifier(sparsity=0.5, plan_path=str(free)))
        Plan.load(free).at(mask_structure="4:8").save(fixed)
        refuses(
            make_model(),
            r"is for unstructured pruning, and the stages' mask_structure is 4:8: .*"
            r"show plan.json --mask-structure 4:8",
            DLPModifier(from_plan=str(free)),
            WandaPruningModifier(mask_structure="4:8", **EVERY),
        )
        refuses(
            make_model(),
            "is for 4:8, and the stages' mask_structure is 2:4",
            DLPModifier(from_plan=str(fixed)),
            WandaPruningModifier(mask_structure="2:4", **EVERY),
        )
        refuses(
            make_model(),
            "is for 4:8, and the stages' mask_structure is 0:0",
            DLPModifier(from_plan=str(fixed)),
            WandaPruningModifier(sparsity=0.5, **EVERY),
        )

    def test_a_sparsity_that_is_not_the_structure_s(self, make_model: MakeModel) -> None:
        stage = WandaPruningModifier(mask_structure="4:8", **EVERY)
        message = "DLPModifier.sparsity is 0.6, but mask_structure 4:8 is 0.5 on average"
        refuses(make_model(), message, DLPModifier(sparsity=0.6), stage)
        stage = WandaPruningModifier(sparsity=0.7, mask_structure="4:8", **EVERY)
        refuses(make_model(), "WandaPruningModifier.sparsity is 0.7, but", DLPModifier(), stage)

    def test_a_list_of_what_is_no_number_of_weights(self, make_model: MakeModel) -> None:
        stage = WandaPruningModifier(
            sparsity=[0.5, 0.6, 0.5], mask_structure="4:8", targets=["LlamaDecoderLayer"]
        )
        message = "an entry of WandaPruningModifier.sparsity is 0.6, which is no whole number of"
        refuses(make_model(), message, stage)

    def test_a_list_of_another_length(self, make_model: MakeModel) -> None:
        stage = WandaPruningModifier(sparsity=[0.5, 0.5], targets=["LlamaDecoderLayer"])
        refuses(make_model(), "sparsity holds 2 values, and its targets match 3 modules", stage)

    @pytest.mark.parametrize("pruner", PRUNERS)
    @pytest.mark.parametrize("value", [70, -0.1, [0.5, -0.125, 0.5]])
    def test_a_sparsity_out_of_range(
        self, make_model: MakeModel, pruner: type, value: float | list[float]
    ) -> None:
        structure = "4:8" if isinstance(value, list) else "0:0"
        stage = pruner(sparsity=value, mask_structure=structure, targets=["LlamaDecoderLayer"])
        refuses(make_model(), rf"{pruner.__name__}.sparsity must be between 0 and 1, got", stage)

    @pytest.mark.parametrize("value", [1, [0.5, 1.0, 0.5]])
    def test_all_weights_by_sparsegpt(self, make_model: MakeModel, value: object) -> None:
        """Which the host's ends with an IndexError in the midst of pruning."""
        stage = SparseGPTModifier(sparsity=value, targets=["LlamaDecoderLayer"])
        refuses(make_model(), "SparseGPTModifier.sparsity is 1, and .*: state less", stage)

    @pytest.mark.parametrize("value", [True, [0.5, True, 0.5]])
    def test_a_yes_is_no_number(self, value: object) -> None:
        message = r"sparsity is .*True.*, which is not a number: state it, e\.g\. 0\.7"
        for pruner in PRUNERS:
            with pytest.raises(ValueError, match=message):
                pruner(sparsity=value, targets=["LlamaDecoderLayer"])

    @pytest.mark.parametrize("pruner", PRUNERS)
    def test_targets_that_match_nothing(self, make_model: MakeModel, pruner: type) -> None:
        message = (
            rf"{pruner.__name__} prunes nothing in LlamaForCausalLM: its targets are \['Conv2d'\]"
        )
        refuses(make_model(), message, pruner(sparsity=0.5, targets=["Conv2d"]))

    @pytest.mark.parametrize("structure", ["8:8", "5:4", "0:8", "4"])
    def test_a_structure_that_is_none(self, structure: str) -> None:
        with pytest.raises(ValueError, match=f"mask_structure must be N:M.*got '{structure}'"):
            WandaPruningModifier(mask_structure=structure, **EVERY)

    def test_a_structure_that_yaml_reads_as_a_number(self, make_model: MakeModel) -> None:
        """Base 60, as in times of day."""
        text = "p_stage: {p_modifiers: {WandaPruningModifier: {mask_structure: 4:8}}}"
        refuses(make_model(), 'mask_structure is 248: quote it, "2:4"', text)

    def test_a_sparsity_that_a_stage_alone_contradicts(self, make_model: MakeModel) -> None:
        stage = WandaPruningModifier(sparsity=0.7, mask_structure="4:8", **EVERY)
        refuses(make_model(), "WandaPruningModifier.sparsity is 0.7, but mask_structure 4:8", stage)

    def test_a_plan_that_no_stage_follows(self, make_model: MakeModel, tmp_path: Path) -> None:
        path = str(tmp_path / "plan.json")
        modifier = DLPModifier(mask_structure="3:6", alpha="auto", plan_path=path)
        refuses(make_model(), "q_proj has 64 columns, which is not a multiple of 6", modifier)

    def test_a_refined_plan_is_not_made_to_fit(self, make_model: MakeModel) -> None:
        refined = DLPModifier(sparsity=0.5, refine=1)
        prune(make_model(), refined, WandaPruningModifier(**EVERY, sparsity=0.5))
        given = DLPModifier(from_plan=refined.plan.model_dump(mode="json"))
        stage = WandaPruningModifier(mask_structure="4:8", **EVERY)
        refuses(make_model(), "mask_structure is 4:8: search again", given, stage)

    def test_stages_of_different_structure(self, make_model: MakeModel) -> None:
        stages = [
            WandaPruningModifier(mask_structure="4:8", targets=["re:.*mlp$"]),
            WandaPruningModifier(mask_structure="2:4", targets=["re:.*self_attn$"]),
        ]
        refuses(
            make_model(), "4:8 in Wanda.*, 2:4 in Wanda.*: state the same", DLPModifier(), *stages
        )

    def test_the_host_s_own_class(self, make_model: MakeModel) -> None:
        stage = pruning.WandaPruningModifier(sparsity=0.5, mask_structure="4:8", **EVERY)
        message = "llm-compressor's own class, which has one N for the whole model: import it from"
        refuses(make_model(), message, DLPModifier(), stage)

    def test_groups_cut_by_the_block_size_of_sparsegpt(self, make_model: MakeModel) -> None:
        stage = SparseGPTModifier(mask_structure="4:8", block_size=20, **EVERY)
        refuses(make_model(), "block_size 20 would cut through groups of 8 weights", stage)

    def test_zeros_that_sparsegpt_looks_for_in_the_wrong_columns(
        self, make_model: MakeModel
    ) -> None:
        stage = SparseGPTModifier(mask_structure="4:8", preserve_sparsity_mask=True, **EVERY)
        refuses(make_model(), "preserve_sparsity_mask looks for the zeros .*: leave it out", stage)

    @pytest.mark.parametrize("pruner", PRUNERS)
    def test_no_sparsity(self, make_model: MakeModel, pruner: type) -> None:
        for stage in (pruner(**EVERY), pruner(sparsity=None, **EVERY)):
            refuses(make_model(), rf"{pruner.__name__}.sparsity is not stated", stage)


class TestSharedWeights:
    """Pruning one module must not prune another, nor one twice."""

    HEAD = (
        "lm_head has the weight of model.embed_tokens, which would be pruned with it: add "
        r"'re:\.\*lm_head' to the stage's ignore"
    )

    @pytest.mark.parametrize("pruner", [*PRUNERS, ADMMPruningModifier])
    def test_a_head_that_is_tied_to_the_embeddings(
        self, make_model: MakeModel, pruner: type
    ) -> None:
        tied = make_model(tie_word_embeddings=True)
        refuses(tied, self.HEAD, pruner(sparsity=0.5, targets=["Linear"]))
        refuses(tied, self.HEAD, pruner(sparsity=0.5, targets=["LlamaForCausalLM"]))
        prune(make_model(), pruner(sparsity=0.5, targets=["Linear"]))
        prune(tied, pruner(sparsity=0.5, **EVERY))
        assert not zeros(tied.lm_head)

    def test_of_a_model_on_disk(self, make_model: MakeModel, tmp_path: Path) -> None:
        model = kept_on_disk(make_model(tie_word_embeddings=True), tmp_path)
        refuses(model, self.HEAD, WandaPruningModifier(sparsity=0.5, targets=["Linear"]))

    @pytest.mark.parametrize("pruner", [WandaPruningModifier, pruning.WandaPruningModifier])
    def test_what_a_plan_leaves_dense_is_no_mistake(
        self, make_model: MakeModel, pruner: type
    ) -> None:
        model = make_model(tie_word_embeddings=True)
        stage = pruner(sparsity=0.5, targets=["Linear"])
        prune(model, DLPModifier(), stage)
        assert {n for n, linear in linears_of(model).items() if not zeros(linear)} == {"lm_head"}
        assert stage.ignore == []

    def test_two_linears(self, make_model: MakeModel) -> None:
        model = make_model()
        first, second = (model.model.layers[i].mlp.up_proj for i in (0, 1))
        second.weight = first.weight
        match = r"layers.0.mlp.up_proj and .*layers.1.mlp.up_proj share one.*add re:model.layers.1"
        refuses(model, match, WandaPruningModifier(sparsity=0.5, **EVERY))

    def test_4_bits_are_the_head_s_alone(self, make_model: MakeModel) -> None:
        """The host unties what is to be quantized."""
        model = make_model(tie_word_embeddings=True)
        before = weights_of(model)
        weights = {"num_bits": 4, "strategy": "group", "group_size": 32}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        prune(model, MaskedGPTQModifier(config_groups=groups))
        assert torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])
        assert len(model.lm_head.weight[0, :32].unique()) <= 16
        assert not model.config.tie_word_embeddings
