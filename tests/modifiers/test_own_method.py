"""An allocation method of one's own: that of the worked example in the documents."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EVERY, ROOT, MakeModel, linears_of, prune, random_samples, word_tokenizer
from llmcompressor.modifiers.factory import ModifierFactory

from dlp_plugin import OneShotMagnitudeModifier, Plan
from dlp_plugin.comparison.run import compare
from dlp_plugin.comparison.yardstick import Yardstick
from dlp_plugin.planning.methods import METHODS

WINDOWS = [torch.tensor(row) for row in random_samples(4, seed=1)["input_ids"]]


@pytest.fixture
def names() -> Iterator[dict[str, Any]]:
    """What the document's code defines, known as long as the test runs."""
    text = (ROOT / "dlp_plugin" / "extending.md").read_text()
    (code,) = (each for each in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
               if "MeanWeightModifier" in each)  # fmt: skip
    found: dict[str, Any] = {}
    exec(compile(code, "extending.md", "exec", dont_inherit=True), found)
    yield found
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
    make_model().save_pretrained(tmp_path / "model")
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
        methods=["mean-weight:0.2", "mean-weight:auto"],
        sparsities=[0.5],
        pruners=["magnitude"],
    )
    assert [cell.method for cell in found.cells] == ["mean-weight:0.2", "mean-weight:auto"]
    recipe = found.only(["mean-weight:0.2"], ["0.5"], ["magnitude"]).recipe()
    assert "MeanWeightModifier" in recipe
