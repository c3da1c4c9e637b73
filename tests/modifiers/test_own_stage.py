"""A pruning stage that is declared in one class: that of the worked example in the documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import EVERY, MakeModel, linears_of, prune, zeros
from llmcompressor.modifiers.factory import ModifierFactory
from own_code import compared, names_in_document

from dlp_plugin import DLPModifier
from dlp_plugin.comparison.names import pruner_named
from dlp_plugin.pruning.base import PruningStage, declared


@pytest.fixture
def kind() -> Iterator[type[PruningStage]]:
    """The class of the document, known as long as the test runs."""
    kind = names_in_document("RandomPruningModifier")["RandomPruningModifier"]
    yield kind
    kind.pruner = ""
    ModifierFactory._registered_registry.pop("RandomPruningModifier", None)


def test_it_is_fed_with_a_plan(kind: type[PruningStage], make_model: MakeModel) -> None:
    model, modifier = make_model(), DLPModifier(alpha=0.3)
    prune(model, [modifier, kind(sparsity=0.5, **EVERY)])
    assert modifier.plan is not None
    linears = linears_of(model)
    for block in modifier.plan.blocks:
        linear = linears[f"{block.name}.mlp.up_proj"]
        assert zeros(linear) / linear.weight.numel() == pytest.approx(block.sparsity, abs=0.01)


def test_it_is_compared(kind: type[PruningStage], make_model: MakeModel, tmp_path: Path) -> None:
    pruners = ["magnitude", "random-polished"]
    found = compared(make_model(), tmp_path, ["uniform"], pruners)
    assert [cell.pruner for cell in found.cells] == pruners
    assert [cell.achieved for cell in found.cells] == pytest.approx([0.5, 0.5], abs=0.01)
    assert "RandomPruningModifier" in found.only(["uniform"], ["0.5"], ["random-polished"]).recipe()


def test_the_stages_of_the_package(kind: type[PruningStage]) -> None:
    assert list(declared()) == ["admm", "magnitude", "random", "sparsegpt", "wanda"]
    assert pruner_named("random").kind is kind
    with pytest.raises(
        ValueError, match="there is no pruner 'rnd'; there are .*random, sparsegpt, wanda, and each"
    ):
        pruner_named("rnd")
