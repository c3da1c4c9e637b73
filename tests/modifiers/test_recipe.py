"""Recipes that llm-compressor would misread, refused before a model is loaded."""

from pathlib import Path

import pytest
import yaml
from helpers import ROOT

from dlp_plugin.modifiers.recipe import check_recipe, with_sparsity


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_here_is_one(path: Path) -> None:
    check_recipe(path)


TWICE = """pruning_stage:
  pruning_modifiers:
    WandaPruningModifier: {sparsity: 0.5}
    WandaPruningModifier: {sparsity: 0.7}
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty, and a recipe is a mapping of stages"),
        ("- DLPModifier", "is a list, and a recipe"),
        ("DLPModifier", "is a str, and a recipe"),
        ("pruning_stage: [", "line 1: .*; mend the YAML"),
        (TWICE, "line 4: 'WandaPruningModifier' stands twice in one mapping"),
        ("pruning_modifiers: {DLPModifier: {}}", "holds 'pruning_modifiers', .*end in _stage"),
        ("pruning_stage: {DLPModifier: {}}", "pruning_stage holds 'DLPModifier', .*_modifiers"),
        ("pruning_stage:", "pruning_stage is None: write a mapping"),
        ("pruning_stage: {a_modifiers: {}}", r"a_modifiers is empty: name a \.\.\.Modifier"),
        (
            "pruning_stage: {a_modifiers: {DLPModifier: }}",
            r"pruning_stage\.a_modifiers\.DLPModifier is None: write a mapping",
        ),
    ],
)
def test_what_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"recipe\.yaml.*{message}"):
        check_recipe(tmp_path / "recipe.yaml")


def test_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"recipe\.yaml is not UTF-8 text"):
        check_recipe(tmp_path / "recipe.yaml")


def test_another_sparsity_wherever_one_is_stated(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(TWICE.replace("0.5}\n    Wanda", "0.5}\n    Magnitude") + "args: {a: 1}\n")
    stage = yaml.safe_load(with_sparsity(path, 0.6))["pruning_stage"]["pruning_modifiers"]
    assert [fields["sparsity"] for fields in stage.values()] == [0.6, 0.6]
    experts = "REAPPruningModifier: {sparsity: 0.25}\n    WandaPruningModifier: {sparsity: 0.5}"
    path.write_text(f"pruning_stage:\n  pruning_modifiers:\n    {experts}\n")
    stage = yaml.safe_load(with_sparsity(path, 0.6))["pruning_stage"]["pruning_modifiers"]
    assert [fields["sparsity"] for fields in stage.values()] == [0.25, 0.6]
    with pytest.raises(ValueError, match=r"w4a16\.yaml, which prunes nothing: leave it out"):
        with_sparsity(ROOT / "recipes" / "w4a16.yaml", 0.6)
    with pytest.raises(
        ValueError, match=r"4of8\.yaml, where no modifier .* with N:M change mask_structure"
    ):
        with_sparsity(ROOT / "recipes" / "dlp_wanda_4of8.yaml", 0.6)
