"""Recipes that llm-compressor would misread, refused before a model is loaded."""

from pathlib import Path

import pytest
from helpers import ROOT

from dlp_plugin.modifiers.recipe import check_recipe


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
    with pytest.raises(ValueError, match=r"recipe\.yaml is no UTF-8 text"):
        check_recipe(tmp_path / "recipe.yaml")
