"""Figures that are not finite: an error of the model that was given, a result of a pruned one."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from helpers import VOCABULARY, MakeModel, command, random_samples, word_tokenizer
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import Qwen3Config, Qwen3ForCausalLM

from dlp_plugin.comparison.results import Comparison

BROKEN = "model.layers.1.mlp.up_proj.weight"


def saved(model: torch.nn.Module, folder: Path) -> Path:
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def broken(model: torch.nn.Module) -> None:
    model.get_parameter(BROKEN)[3, 5] = math.nan


def overflowing(model: torch.nn.Module) -> None:
    for name in ("up_proj", "down_proj"):
        model.get_parameter(f"model.layers.0.mlp.{name}.weight").mul_(1e30)


def collapsed(model: torch.nn.Module) -> None:
    """Sure of one token or another, and wrong."""
    model.lm_head.weight *= 1e6


@pytest.fixture
def text(tmp_path: Path) -> Path:
    ids = random_samples(16, 32)["input_ids"]
    (tmp_path / "text.txt").write_text(" ".join(str(each) for row in ids for each in row))
    return tmp_path / "text.txt"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (broken, f" is nan; {BROKEN} holds NaN or infinity: take a checkpoint that does not"),
        (overflowing, " is nan; its weights are finite, so its activations overflow float32"),
        (collapsed, " is inf; it gives a part of the text a probability of 0: prune it less"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_ppl_is_a_number_or_an_error(
    make_model: MakeModel, tmp_path: Path, text: Path, harm: object, message: str
) -> None:
    model = make_model()
    with torch.no_grad():
        harm(model)
    folder = saved(model, tmp_path / "model")
    result = command("ppl", folder, "--data", text, "--length", 32, code=1)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert re.match(f"error: the perplexity of {folder}{message}", line)
    assert "perplexity nan" not in result.stdout


class TestCompare:
    def arguments(self, model: Path, text: Path, *more: object) -> list[object]:
        data = ["--data", text, "--test", text, "--samples", 4, "--length", 32]
        chosen = ["--methods", "uniform", "--sparsities", "0.5"]
        return ["compare", model, *data, *chosen, "--output", text.with_name("found"), *more]

    def test_a_model_of_no_perplexity_is_not_pruned(
        self,
        make_model: MakeModel,
        tmp_path: Path,
        text: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.delattr("dlp_plugin.checkpoints.loading.oneshot")
        model = make_model()
        with torch.no_grad():
            broken(model)
        folder = saved(model, tmp_path / "model")
        stderr = command(*self.arguments(folder, text), code=1).stderr
        assert f"error: the perplexity of {folder} is nan; {BROKEN} holds NaN" in stderr
        assert list((tmp_path / "found").iterdir()) == []

    def test_a_pruned_model_of_none_is_shown_and_never_the_best(
        self, tmp_path: Path, text: Path
    ) -> None:
        """Magnitude prunes all queries of a head, whose norm then divides zero by zero."""
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=0.0,
        )  # fmt: skip
        model = Qwen3ForCausalLM(config)
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight[:16] *= 1e-6
        folder, best = saved(model, tmp_path / "model"), tmp_path / "best.yaml"
        wanted = ["--write-recipe", best, "--pruners"]
        result = command(*self.arguments(folder, text, *wanted, "magnitude"), code=1)
        assert "error: no perplexity at 0.5 is finite, so none is the best: prune less" in (
            result.stderr
        )
        assert "magnitude 0.5 uniform: nan" in result.stdout
        assert "nan" in (tmp_path / "found" / "table.md").read_text()
        assert {file.name for file in (tmp_path / "found").iterdir()} == {
            "results.json", "table.md", "perplexity.png", "sparsities.png",
        }  # fmt: skip
        assert not best.exists()
        command(*self.arguments(folder, text, *wanted, "magnitude,wanda"))
        assert "uniform at 0.5, wanda: perplexity" in best.read_text()
        found = Comparison.model_validate_json((tmp_path / "found" / "results.json").read_text())
        perplexities = {cell.pruner: cell.perplexity for cell in found.cells}
        assert math.isnan(perplexities["magnitude"])
        assert math.isfinite(perplexities["wanda"])
