"""A pruning stage that is declared in one class: that of the worked example in the documents."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EVERY, ROOT, MakeModel, linears_of, prune, random_samples, word_tokenizer, zeros
from llmcompressor.modifiers.factory import ModifierFactory

from dlp_plugin import DLPModifier
from dlp_plugin.comparison.names import pruner_named
from dlp_plugin.comparison.run import compare
from dlp_plugin.comparison.yardstick import Yardstick
from dlp_plugin.pruning.base import PruningStage, declared

WINDOWS = [torch.tensor(row) for row in random_samples(4, seed=1)["input_ids"]]


@pytest.fixture
def kind() -> Iterator[type[PruningStage]]:
    """The class of the document, known as long as the test runs."""
    (code,) = re.findall(
        r"^```python\n((?:(?!^```).)*?RandomPruningModifier.*?)^```",
        (ROOT / "dlp_plugin" / "extending.md").read_text(),
        re.M | re.S,
    )
    names: dict[str, Any] = {}
    exec(code, names)
    yield names["RandomPruningModifier"]
    names["RandomPruningModifier"].pruner = ""
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
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    calibration = {
        "tokenizer": word_tokenizer(),
        "dataset": random_samples(),
        "num_calibration_samples": 8,
        "max_seq_length": 32,
        "shuffle_calibration_samples": False,
    }
    found = compare(
        str(tmp_path / "model"),
        calibration,
        Yardstick(WINDOWS),
        tmp_path / "found",
        methods=["uniform"],
        sparsities=[0.5],
        pruners=["magnitude", "random-polished"],
    )
    assert [cell.pruner for cell in found.cells] == ["magnitude", "random-polished"]
    assert [cell.achieved for cell in found.cells] == pytest.approx([0.5, 0.5], abs=0.01)
    assert "RandomPruningModifier" in found.only(["uniform"], ["0.5"], ["random-polished"]).recipe()


def test_the_stages_of_the_package(kind: type[PruningStage]) -> None:
    assert list(declared()) == ["admm", "magnitude", "random", "sparsegpt", "wanda"]
    assert pruner_named("random").kind is kind
    with pytest.raises(
        ValueError, match="there is no pruner 'rnd'; there are .*random, sparsegpt, wanda, and each"
    ):
        pruner_named("rnd")
