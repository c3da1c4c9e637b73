"""Names and patterns mean in a stage what they mean everywhere."""

from __future__ import annotations

import re

import pytest
from helpers import EVERY, PRUNERS, Logged, MakeModel, linears_of, prune, refuses, zeros
from llmcompressor.modifiers import pruning

from dlp_plugin import DLPModifier, SparseGPTModifier, WandaPruningModifier


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
        dense = {name for name, linear in linears_of(model).items() if not zeros(linear)}
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
            refuses(make_model(), said + found, *([DLPModifier()] if fed else []), stage)

    def test_the_remedy_leaves_out_all_that_is_in_a_module(self, make_model: MakeModel) -> None:
        ignore = [r"re:model\.layers\.1\.", "lm_head", "LlamaRMSNorm", "Embedding"]
        stage = WandaPruningModifier(sparsity=0.5, targets=["Linear"], ignore=ignore)
        model = prune(make_model(), stage)
        dense = {name for name, linear in linears_of(model).items() if not zeros(linear)}
        blocks = {f"model.layers.1.{name}" for name in linears_of(model.model.layers[1])}
        assert dense == {"lm_head"} | blocks

    def test_a_module_of_which_nothing_is_pruned(self, make_model: MakeModel) -> None:
        stage = WandaPruningModifier(sparsity=0.5, targets=["re:.*attn$"], ignore=["LlamaMLP"])
        model = prune(make_model(), stage)
        pruned = {name for name, linear in linears_of(model).items() if zeros(linear)}
        names = [name for name in linears_of(make_model()) if ".self_attn." in name]
        assert pruned == set(names)

    def test_a_pattern_for_models_that_have_what_this_has_not(
        self, make_model: MakeModel, logged: Logged
    ) -> None:
        """As ``re:.*lm_head`` for an encoder: a line in the log."""
        ignore = ["re:.*lm_head", "re:.*score$"]
        prune(make_model(), WandaPruningModifier(sparsity=0.5, targets=["Linear"], ignore=ignore))
        messages = logged("WARNING")
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
        refuses(make_model(), message, stage)

    def test_no_list(self, make_model: MakeModel) -> None:
        message = r"WandaPruningModifier\.targets is 'Linear': write a list, \['Linear'\]"
        refuses(make_model(), message, WandaPruningModifier(sparsity=0.5, targets="Linear"))
        with pytest.raises(ValueError, match=r"WandaPruningModifier\nignore\n.*a valid list"):
            WandaPruningModifier(sparsity=0.5, ignore="lm_head")

    def test_below_a_target_that_holds_several(self, make_model: MakeModel) -> None:
        ignore = ["model.layers.1.mlp.up_proj", r"re:.*q_proj$"]
        stage = WandaPruningModifier(sparsity=0.5, targets=["LlamaDecoderLayer"], ignore=ignore)
        model = prune(make_model(), stage)
        dense = {name for name, linear in linears_of(model).items() if not zeros(linear)}
        queries = {f"model.layers.{depth}.self_attn.q_proj" for depth in range(3)}
        assert dense == {"lm_head", "model.layers.1.mlp.up_proj"} | queries
