"""What is saved as recipe.yaml runs: of a model that was pruned before too, with all modifiers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from helpers import (
    EVERY,
    MakeModel,
    assert_same,
    prune,
    recipe,
    refuses,
    weights_of,
    word_tokenizer,
)
from transformers import AutoModelForCausalLM

from dlp_plugin import MaskedGPTQModifier, WandaPruningModifier
from dlp_plugin.modifiers.recipe import check_recipe

WEIGHTS = {"num_bits": 4, "strategy": "group", "group_size": 32}
GROUPS = {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}}


@pytest.fixture
def dense(make_model: MakeModel, tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path / "dense")
    word_tokenizer().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def test_of_a_model_that_was_pruned_before(dense: Path) -> None:
    """llm-compressor would call the stages pruning_stage_0 and _1, and skip them when it reads."""
    folders = [dense, *(dense.with_name(f"pruned{times}") for times in (1, 2, 3))]
    for source, target, sparsity in zip(folders, folders[1:], (0.2, 0.4, 0.6), strict=False):
        prune(load(source), recipe(sparsity=sparsity), output_dir=str(target))
    saved = folders[3] / "recipe.yaml"
    check_recipe(saved)
    assert list(yaml.safe_load(saved.read_text())) == [
        "pruning_stage",
        "pruning_1_stage",
        "pruning_2_stage",
    ]
    again = prune(load(dense), str(saved))
    assert_same(weights_of(again), weights_of(load(folders[3])))


def test_of_two_stages_of_one_kind_without_a_plan(dense: Path) -> None:
    stages = [
        WandaPruningModifier(sparsity=0.5, targets=[pattern])
        for pattern in ("re:.*mlp$", "re:.*self_attn$")
    ]
    pruned = prune(load(dense), *stages, output_dir=str(dense.with_name("pruned")))
    again = prune(load(dense), str(dense.with_name("pruned") / "recipe.yaml"))
    assert_same(weights_of(again), weights_of(pruned))


def test_of_a_quantizer_with_groups(dense: Path) -> None:
    """Whose enumerations llm-compressor would write as objects of Python."""
    fields = {"config_groups": GROUPS, "ignore": ["lm_head"], "actorder": "weight"}
    packed, again = dense.with_name("packed"), dense.with_name("again")
    prune(load(dense), MaskedGPTQModifier(**fields), output_dir=str(packed))
    check_recipe(packed / "recipe.yaml")
    prune(load(dense), str(packed / "recipe.yaml"), output_dir=str(again))
    assert (packed / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("p_stage: [", "while parsing a flow node"),
        ("- DLPModifier", "it is no mapping of stages"),
        ("p_stage: !!python/object:x.Y {}", "could not determine a constructor"),
    ],
)
@pytest.mark.parametrize("kind", ["stage", "quantizer"])
def test_beside_one_that_cannot_be_read(dense: Path, text: str, problem: str, kind: str) -> None:
    """It would end the run when the model is saved, and all work would be lost."""
    (dense / "recipe.yaml").write_text(text)
    stage = WandaPruningModifier(sparsity=0.5, **EVERY)
    quantizer = MaskedGPTQModifier(scheme="W8A8", ignore=["lm_head"])
    message = rf"dense/recipe.yaml cannot be read, .*\(.*{problem}.*\): mend it, or move it away"
    refuses(load(dense), message, stage if kind == "stage" else quantizer)
