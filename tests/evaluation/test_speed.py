"""What a user gains, measured: the figures are of what they say, and the table reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import MakeModel, command
from input_kinds import packed, tied
from rich.console import Console
from transformers import AutoModelForCausalLM

from dlp_plugin.cli.speed import speed_table
from dlp_plugin.comparison import speeds as module
from dlp_plugin.comparison.speeds import Speed, cache_bytes, speeds
from dlp_plugin.evaluation.speed import prefill_and_decode, weight_bytes


class Counting(torch.nn.Module):
    """Notes the shapes that a model is given."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: torch.Tensor, **arguments: object) -> object:
        self.shapes.append(tuple(input_ids.shape))
        return self.model(input_ids=input_ids, **arguments)


def test_a_prompt_is_read_and_tokens_are_written_one_by_one(make_model: MakeModel) -> None:
    model = Counting(make_model())
    read, written = prefill_and_decode(model, 24, 3, [1, 5])
    assert model.shapes[:4] == [(1, 24)] * 4  # once to warm up
    assert model.shapes[4:] == [(1, 16), *[(1, 1)] * 4, (5, 16), *[(5, 1)] * 4]
    assert read > 0
    assert written.keys() == {1, 5}
    assert min(written.values()) > 0


def test_weights_count_once_where_they_are_tied(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tied(tmp_path / "model"), dtype="auto")
    head = model.lm_head.weight.nbytes
    assert weight_bytes(model) == sum(
        each.nbytes for each in (*model.parameters(), *model.buffers())
    )
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    assert weight_bytes(model) - head == sum(
        each.nbytes for name, each in model.named_parameters() if name != "lm_head.weight"
    ) + sum(each.nbytes for each in model.buffers())


def test_the_command(tmp_path: Path) -> None:
    folder = packed(tmp_path / "packed")
    line = ["speed", folder, "--prompt", 16, "--tokens", 2, "--batches", "1,2", "--rounds", 1]
    output = command(*line, "--json", tmp_path / "speed.json").output
    for row in ("load, s", "weights in memory", "writing 1 text, tokens/s", "writing 2 texts"):
        assert row in output
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found.keys() == {"dense", "sparse"}
    assert found["dense"]["decode"].keys() == {"1", "2"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="auto")
    assert found["dense"]["weights"] == weight_bytes(loaded)


def test_what_cannot_be_packed_is_told(tmp_path: Path) -> None:
    from input_kinds import saved
    from transformers import LlamaConfig

    folder = saved(LlamaConfig(vocab_size=256, hidden_size=32, num_hidden_layers=0), tmp_path / "x")
    with pytest.raises(ValueError, match="would shrink by packing: prune it first"):
        speeds(folder)


def test_numbers_of_texts(tmp_path: Path) -> None:
    for given in ("0", "1,x", ""):
        output = command("speed", tmp_path, "--batches", given, code=1).output
        assert f"--batches is {given!r}: give batch sizes" in " ".join(output.split())


FOUND = {
    "dense": Speed(4.0, 1 << 30, 1 << 31, 100.0, {1: 2.0, 8: 16.0}),
    "sparse": Speed(2.0, 1 << 29, 1 << 29, 90.0, {1: 5.0, 8: 16.0}),
}


def shown(found: dict[str, Speed]) -> list[str]:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(speed_table(found, "model"))
    return capture.get().splitlines()


def gain(lines: list[str], row: str) -> float:
    return float(next(line for line in lines if row in line).split("│")[-2])


def test_a_gain_is_more_than_one_where_less_is_better_and_where_more_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "cache_bytes", lambda: 1 << 20)
    lines = shown(FOUND)
    assert gain(lines, "load, s") == 2.0
    assert gain(lines, "weights in memory") == 2.0
    assert gain(lines, "peak while loading") == 4.0
    assert gain(lines, "prompt, tokens/s") == 0.9
    assert gain(lines, "writing 1 text, ") == 2.5
    assert gain(lines, "writing 8 texts, ") == 1.0
    assert "cache" not in " ".join(lines)


def test_a_model_in_the_cache_shows_nothing_and_that_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "cache_bytes", lambda: 1 << 30)
    assert "The processor's cache of 1,074 MB" in " ".join(shown(FOUND))


def test_the_size_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_L3", tmp_path / "size")
    assert cache_bytes() is None
    (tmp_path / "size").write_text("32768K\n")
    assert cache_bytes() == 32 << 20
