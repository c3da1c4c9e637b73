"""The comparison at fewer bits, and in bytes: on a tiny random model."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import SHIPPED, VOCABULARY, command, random_samples, word_tokenizer
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig

from dlp_plugin.checkpoints.files import bytes_on_disk
from dlp_plugin.checkpoints.loading import apply_recipe, load_to_prune
from dlp_plugin.checkpoints.packing import pack
from dlp_plugin.comparison import view
from dlp_plugin.comparison.names import bits_named
from dlp_plugin.comparison.pictures import draw
from dlp_plugin.comparison.results import Cell, Comparison, Plain
from dlp_plugin.comparison.run import compare
from dlp_plugin.comparison.storing import group_size_of
from dlp_plugin.comparison.yardstick import Yardstick
from dlp_plugin.evaluation.perplexity import perplexity

WINDOWS = [torch.tensor(row) for row in random_samples(4, seed=1)["input_ids"]]


def saved_model(folder: Path, **changes: int) -> Path:
    """A Llama of two blocks in bfloat16, whose columns groups of 128 do not divide."""
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, **changes}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, **settings, **heads)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(saved_model(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture(scope="module")
def calibration() -> dict[str, Any]:
    return {
        "tokenizer": word_tokenizer(),
        "dataset": random_samples(),
        "num_calibration_samples": 8,
        "max_seq_length": 32,
        "shuffle_calibration_samples": False,
    }


def compared(model: str, calibration: dict[str, Any], folder: Path, **settings: Any) -> Comparison:
    settings = {"methods": ["uniform"], "sparsities": [0.5], **settings}
    return compare(model, calibration, Yardstick(WINDOWS), folder, **settings)


@pytest.fixture(scope="module")
def finished(
    model: str, calibration: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Comparison]:
    folder = tmp_path_factory.mktemp("compare")
    return folder, compared(model, calibration, folder, sparsities=[0.5, 0.02], bits=[16, "4"])


@pytest.fixture
def cells(finished: tuple[Path, Comparison]) -> dict[tuple[int, str], Cell]:
    return {(cell.bits, cell.target): cell for cell in finished[1].cells}


class TestFigures:
    def test_every_cell_is_made_at_every_number_of_bits(
        self, finished: tuple[Path, Comparison], cells: dict[tuple[int, str], Cell]
    ) -> None:
        folder, found = finished
        assert list(cells) == [(16, "0.02"), (16, "0.5"), (4, "0.02"), (4, "0.5")]
        assert [file.name for file in folder.iterdir()] == ["results.json"]
        assert found.plain[16].perplexity == found.dense != found.plain[4].perplexity

    @pytest.mark.parametrize("bits", [16, 4])
    def test_what_is_stored_is_measured(
        self,
        model: str,
        calibration: dict[str, Any],
        finished: tuple[Path, Comparison],
        tmp_path: Path,
        bits: int,
    ) -> None:
        _, found = finished
        recipe = found.only(["uniform"], ["0.5"], ["wanda"], [bits]).recipe()
        saved, packed = tmp_path / "saved", tmp_path / "packed"
        (tmp_path / "recipe.yaml").write_text(recipe)
        apply_recipe(model, str(tmp_path / "recipe.yaml"), output=saved, **calibration)
        pack(saved, packed)
        cell = found.cell("uniform", "0.5", "wanda", bits)
        assert cell.bytes == bytes_on_disk(packed) < bytes_on_disk(saved)
        assert cell.perplexity == perplexity(load_to_prune(packed)[0], WINDOWS)

    def test_what_does_not_shrink_counts_as_it_is(
        self,
        model: str,
        finished: tuple[Path, Comparison],
        cells: dict[tuple[int, str], Cell],
    ) -> None:
        plain = finished[1].plain
        assert cells[16, "0.02"].bytes == plain[16].bytes == bytes_on_disk(Path(model))
        assert cells[4, "0.02"].bytes == pytest.approx(plain[4].bytes, rel=0.01)
        assert cells[4, "0.5"].bytes < cells[4, "0.02"].bytes < cells[16, "0.5"].bytes

    def test_recipes_have_groups_that_divide_the_columns(
        self, finished: tuple[Path, Comparison]
    ) -> None:
        _, found = finished
        recipe = found.only(["uniform"], ["0.5"], ["wanda"], [4]).recipe()
        assert re.match(r"# .*, uniform at 0.5, wanda, 4 bits: perplexity", recipe)
        stage = yaml.safe_load(recipe)["pruning_stage"]["quantization_modifiers"]
        (group,) = stage["MaskedGPTQModifier"]["config_groups"].values()
        assert group["weights"] == {"num_bits": 4, "strategy": "group", "group_size": 64}
        found = found.model_copy(update={"group_size": 128})
        assert "scheme: W4A16" in found.only(["uniform"], ["0.5"], ["wanda"], [4]).recipe()


class TestGroups:
    def test_of_128_where_they_divide_all_columns(self, tmp_path: Path) -> None:
        assert group_size_of(str(SHIPPED)) == 128
        changes = {"hidden_size": 128, "intermediate_size": 96}
        assert group_size_of(str(saved_model(tmp_path, **changes))) == 32

    def test_experts_count_which_transformers_holds_fused(self, tmp_path: Path) -> None:
        sizes = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 64}
        heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
        experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64}
        Qwen3MoeConfig(**sizes, **heads, **experts).save_pretrained(tmp_path)
        assert group_size_of(str(tmp_path)) == 64

    def test_none_that_does(self, calibration: dict[str, Any], tmp_path: Path) -> None:
        model = saved_model(tmp_path / "model", intermediate_size=72)
        words = (
            r"bits: .* divides the 72 columns of model.layers.0.mlp.down_proj: leave it at 16 bits"
        )
        with pytest.raises(ValueError, match=words):
            compared(str(model), calibration, tmp_path / "new", bits=[16, 4])
        assert not (tmp_path / "new").exists()


class TestGoingOn:
    def test_nothing_is_measured_twice(
        self,
        model: str,
        calibration: dict[str, Any],
        finished: tuple[Path, Comparison],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.delattr("dlp_plugin.checkpoints.loading.oneshot")
        folder, found = finished
        settings = {"sparsities": [0.5, 0.02]}
        assert compared(model, calibration, folder, bits=[16, 4], **settings) == found
        four = compared(model, calibration, folder, bits=[4], **settings)
        assert (four.cells, list(four.plain)) == (found.cells[2:], [4])

    def test_results_of_before_are_taken_up_and_get_sizes(
        self, model: str, calibration: dict[str, Any], tmp_path: Path
    ) -> None:
        found = compared(model, calibration, tmp_path)
        assert (found.cells[0].bytes, found.plain) == (None, {})
        content = json.loads((tmp_path / "results.json").read_text())
        del content["plain"], content["group_size"]
        for cell in content["cells"]:
            del cell["bits"], cell["bytes"], cell["memory"]
        (tmp_path / "results.json").write_text(json.dumps(content))
        again = compared(model, calibration, tmp_path)
        (cell,) = again.cells
        assert cell.memory is None
        known = cell.model_copy(update={"memory": found.cells[0].memory})
        assert again.model_copy(update={"cells": [known]}) == found
        seen: list[Cell] = []
        sized = compared(model, calibration, tmp_path, sizes=True, report=seen.append)
        assert (seen, list(sized.plain)) == (sized.cells, [16])
        assert 0 < sized.cells[0].bytes < sized.plain[16].bytes
        assert Comparison.model_validate_json((tmp_path / "results.json").read_text()) == sized


def test_of_two_into_one_folder_the_second_is_told(
    model: str, calibration: dict[str, Any], tmp_path: Path
) -> None:
    """It begins while the first measures; later it goes on with what that has found."""
    told: list[BaseException | None] = []

    def meanwhile(_: Cell) -> None:
        with ThreadPoolExecutor() as pool:
            second = pool.submit(compared, model, calibration, tmp_path, methods=["dlp"])
            told.append(second.exception())

    compared(model, calibration, tmp_path, report=meanwhile)
    (error,) = told
    assert isinstance(error, BlockingIOError)
    assert f"another run is writing {tmp_path}/results.json" in str(error)
    compared(model, calibration, tmp_path, methods=["dlp"])
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    found = Comparison.model_validate_json((tmp_path / "results.json").read_text())
    assert [cell.method for cell in found.cells] == ["uniform", "dlp:0.15"]


@pytest.mark.parametrize("bits", ["5", "many", 32, ""])
def test_bits_are_checked_before_any_work(
    model: str, calibration: dict[str, Any], tmp_path: Path, bits: int | str
) -> None:
    assert [bits_named(each) for each in (4, " 8", "16", 3)] == [4, 8, 16, 3]
    with pytest.raises(ValueError, match=f"bits must be 16 .*, got {bits!r}"):
        compared(model, calibration, tmp_path / "new", bits=[16, bits])
    assert not (tmp_path / "new").exists()


class TestTheAnswer:
    @staticmethod
    def found(*cells: tuple[int, float, int]) -> Comparison:
        """Plain 4 bits have 12 in 4 MB; cells are bits, perplexity and MB."""
        return Comparison(
            subject={"model": "m"},
            dense=10.0,
            plain={16: Plain(perplexity=10, bytes=16_000_000), 4: Plain(perplexity=12, bytes=4e6)},
            cells=[
                Cell(
                    method="owl",
                    target=f"0.{place}",
                    pruner="wanda",
                    perplexity=value,
                    achieved=0,
                    seconds=0,
                    bits=bits,
                    bytes=size * 1_000_000,
                )
                for place, (bits, value, size) in enumerate(cells, 5)
            ],
        )

    def test_the_best_that_is_no_larger(self) -> None:
        found = self.found((16, 11.0, 9), (16, 12.0, 6), (4, 15.0, 4), (4, 18.0, 3))
        assert view.verdicts(found) == [
            "Plain 4 bits: 12.0000 in 4.00 MB. The best pruned model that is no larger has 15.0000 "
            "in 4.00 MB, 1.250 times the perplexity (owl at 0.7, wanda, 4 bits). Of 4 pruned "
            "models 1 are larger and not better."
        ]
        (caption,) = view.verdicts(self.found((4, 9.0, 3)))
        assert "0.750 times the perplexity" in caption
        assert "Of 1 pruned models 0 are larger and not better." in caption

    def test_none_is_as_small(self) -> None:
        (text,) = view.verdicts(self.found((16, float("nan"), 9)))
        assert text.endswith(
            "No pruned model is as small. Of 1 pruned models 1 are larger and not better."
        )
        (text,) = view.verdicts(self.found((4, float("nan"), 3)))
        assert "No pruned model of finite perplexity is as small. Of 1 pruned" in text
        assert view.verdicts(self.found()) == []


def test_compare_in_the_terminal(model: str, tmp_path: Path) -> None:
    text, folder, best = tmp_path / "text.txt", tmp_path / "found", tmp_path / "best.yaml"
    ids = random_samples(16, 32)["input_ids"]
    text.write_text(" ".join(str(each) for row in ids for each in row))
    data = ["--data", text, "--test", text, "--samples", 4, "--length", 32, "--output", folder]
    chosen = ["--methods", "uniform", "--sparsities", "0.5", "--bits", "4", "--write-recipe", best]
    output = command("compare", model, *data, *chosen).stdout
    assert re.search(r"^wanda 0\.5 uniform, 4 bits: \S+ in 0\.\d\d MB \(\d+ s\)$", output, re.M)
    assert re.search(r"wanda +│ 4 +│ uniform +│ +\d\S+ \(\d\.\d\d\) │ 0\.\d\d │", output)
    assert "uniform at 0.5 with wanda and 4 bits written:" in output
    assert "MaskedGPTQModifier" in best.read_text()
    assert (folder / "bytes.png").read_bytes().startswith(b"\x89PNG")
    lines = (folder / "table.md").read_text().splitlines()
    assert lines[0].startswith(
        "| pruner | target | bits | method | strength | perplexity | ratio | MB"
    )
    assert re.match(r"\|  \| 0 \| 4 \| dense \|  \| [\d.]+ \| [\d.]+ \| 0\.\d\d \|", lines[3])
    assert lines[0].endswith("| seconds | peak MB |")
    assert {line.count("|") for line in lines[:5]} == {13}
    assert lines[6].startswith("Plain 4 bits: ")


def test_pictures_of_all_bits(finished: tuple[Path, Comparison], tmp_path: Path) -> None:
    draw(finished[1], tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "perplexity.png", "sparsities.png", "bytes.png",
    }  # fmt: skip
