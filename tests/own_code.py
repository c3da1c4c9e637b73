"""The worked examples of extending.md: what their code defines, and a comparison with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from helpers import ROOT, random_samples, word_tokenizer

from dlp_plugin.comparison.results import Comparison
from dlp_plugin.comparison.run import compare
from dlp_plugin.comparison.yardstick import Yardstick

WINDOWS = [torch.tensor(row) for row in random_samples(4, seed=1)["input_ids"]]


def names_in_document(name: str) -> dict[str, Any]:
    """Everything that the document's code block with a name in it defines."""
    text = (ROOT / "dlp_plugin" / "extending.md").read_text()
    (code,) = (each for each in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
               if name in each)  # fmt: skip
    found: dict[str, Any] = {}
    exec(compile(code, "extending.md", "exec", dont_inherit=True), found)
    return found


def compared(
    model: torch.nn.Module, folder: Path, methods: list[str], pruners: list[str]
) -> Comparison:
    """Compare methods and pruners at half the weights, on random tokens."""
    model.save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    calibration = {
        "tokenizer": word_tokenizer(),
        "dataset": random_samples(),
        "num_calibration_samples": 8,
        "max_seq_length": 32,
        "shuffle_calibration_samples": False,
    }
    return compare(
        str(folder / "model"),
        calibration,
        Yardstick(WINDOWS),
        folder / "found",
        methods=methods,
        sparsities=[0.5],
        pruners=pruners,
    )
