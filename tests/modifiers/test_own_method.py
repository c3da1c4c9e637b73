"""An allocation method of one's own: that of the worked example in the documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EVERY, MakeModel, linears_of, prune
from llmcompressor.modifiers.factory import ModifierFactory
from own_code import compared, names_in_document

from dlp_plugin import OneShotMagnitudeModifier, Plan
from dlp_plugin.planning.methods import METHODS


@pytest.fixture
def names() -> Iterator[dict[str, Any]]:
    """What the document's code defines, known as long as the test runs."""
    yield names_in_document("MeanWeightModifier")
    del METHODS["mean_weight"]
    ModifierFactory._registered_registry.pop("MeanWeightModifier", None)


def test_blocks_of_larger_weights_are_kept_more(
    names: dict[str, Any], make_model: MakeModel
) -> None:
    model = make_model()
    blocks = [f"model.layers.{depth}." for depth in range(2)]
    with torch.no_grad():
        for name, linear in linears_of(model).items():
            linear.weight.mul_(2.0 if name.startswith(blocks[0]) else 1.0)
    modifier = names["MeanWeightModifier"](gamma=0.1)
    prune(model, [modifier, OneShotMagnitudeModifier(sparsity=0.5, **EVERY)])
    first, *_, last = modifier.plan.blocks
    assert last.sparsity - first.sparsity == pytest.approx(0.2)
    assert Plan.load(modifier.plan.model_dump(mode="json")) == modifier.plan


def test_it_is_compared(names: dict[str, Any], make_model: MakeModel, tmp_path: Path) -> None:
    methods = ["mean-weight:0.2", "mean-weight:auto"]
    found = compared(make_model(), tmp_path, methods, ["magnitude"])
    assert [cell.method for cell in found.cells] == methods
    recipe = found.only(["mean-weight:0.2"], ["0.5"], ["magnitude"]).recipe()
    assert "MeanWeightModifier" in recipe
