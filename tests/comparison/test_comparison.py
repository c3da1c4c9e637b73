"""The comparison on a trained model: its figures, and that nothing is measured twice."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import CALIBRATION_TEXT, EVERY, PRUNERS, SHIPPED, TEST_TEXT, deny_writing
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlp_plugin import (
    ADMMPruningModifier,
    AlphaPruningModifier,
    DLPModifier,
    OWLModifier,
    WandaPruningModifier,
)
from dlp_plugin.checkpoints.loading import apply_recipe, load_model
from dlp_plugin.comparison import view
from dlp_plugin.comparison.pictures import draw
from dlp_plugin.comparison.results import Cell, Comparison, recipe_of
from dlp_plugin.comparison.run import compare
from dlp_plugin.comparison.yardstick import Yardstick
from dlp_plugin.evaluation.perplexity import perplexity
from dlp_plugin.evaluation.text import calibrate_on, calibration_set, read_tokens, token_windows

STAGES = dict(zip(("wanda", "sparsegpt", "magnitude"), PRUNERS, strict=True))


@pytest.fixture(scope="module")
def calibration() -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    dataset = calibration_set(read_tokens(CALIBRATION_TEXT, tokenizer), 64, 8)
    return calibrate_on(dataset, tokenizer)


@pytest.fixture(scope="module")
def windows(calibration: dict[str, Any]) -> list[torch.Tensor]:
    return token_windows(read_tokens(TEST_TEXT, calibration["tokenizer"], limit=512), 64)


@pytest.fixture(scope="module")
def source(calibration: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model's first four blocks: a third of the work."""
    folder = tmp_path_factory.mktemp("source")
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, num_hidden_layers=4)
    model.save_pretrained(folder)
    calibration["tokenizer"].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compared(
    source: Path, calibration: dict[str, Any], windows: list[torch.Tensor]
) -> Callable[..., Comparison]:
    def run(folder: Path, methods: str, *sparsities: float, **changes: Any) -> Comparison:
        settings = {"methods": methods.split(","), "sparsities": sparsities, **changes}
        data = settings.pop("calibration", calibration)
        return compare(
            str(source), data, Yardstick(settings.pop("windows", windows)), folder, **settings
        )

    return run


@pytest.fixture(scope="module")
def finished(
    compared: Callable[..., Comparison], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Comparison]:
    folder = tmp_path_factory.mktemp("compare") / "results"
    return folder, compared(folder, "uniform,owl:0.1", 0.5, 0.7)


@pytest.fixture
def copied(finished: tuple[Path, Comparison], tmp_path: Path) -> Path:
    """A folder of its own that holds the finished comparison."""
    (tmp_path / "results.json").write_text((finished[0] / "results.json").read_text())
    return tmp_path


class Runs:
    """``oneshot()``, counted, and broken off at one of its calls."""

    def __init__(self, broken_at: int = 0) -> None:
        self.count = 0
        self.broken_at = broken_at

    def __call__(self, **arguments: Any) -> torch.nn.Module:
        self.count += 1
        if self.count == self.broken_at:
            raise KeyboardInterrupt("broken off")
        return oneshot(**arguments)


def counted(monkeypatch: pytest.MonkeyPatch, broken_at: int = 0) -> Runs:
    runs = Runs(broken_at)
    monkeypatch.setattr("dlp_plugin.checkpoints.loading.oneshot", runs)
    return runs


def figures(cells: list[Cell]) -> list[tuple[Any, ...]]:
    return [(c.method, c.target, c.pruner, c.perplexity, c.achieved) for c in cells]


class TestFigures:
    def test_every_method_is_measured_at_every_sparsity(
        self, finished: tuple[Path, Comparison]
    ) -> None:
        _, found = finished
        assert [(c.sparsity, c.method) for c in found.cells] == [
            (0.5, "uniform"),
            (0.5, "owl:0.1"),
            (0.7, "uniform"),
            (0.7, "owl:0.1"),
        ]
        for cell in found.cells:
            assert found.dense < cell.perplexity
            assert cell.sparsity - 0.01 < cell.achieved <= cell.sparsity
            assert cell.seconds > 0
            least = 1e5 if torch.cuda.is_available() else 1e8  # what torch alone takes
            assert cell.memory is None or cell.memory > least

    def test_the_dense_perplexity_is_the_model_s(
        self, source: Path, finished: tuple[Path, Comparison], windows: list[torch.Tensor]
    ) -> None:
        model = load_model(source)
        assert finished[1].dense == perplexity(model, windows)

    def test_every_cell_is_what_its_recipe_gives(
        self,
        source: Path,
        compared: Callable[..., Comparison],
        calibration: dict[str, Any],
        windows: list[torch.Tensor],
        tmp_path: Path,
    ) -> None:
        """Scored together in two portions, or each alone by its modifier: the same."""
        methods = "uniform,owl,alpha-pruning,dlp:auto,dlp-refined,uniform-evolved"
        alone = [
            None,
            OWLModifier(),
            AlphaPruningModifier(),
            DLPModifier(alpha="auto"),
            DLPModifier(refine=2),
            DLPModifier(alpha=0, refine=1, search="evolution"),
        ]
        found = compared(tmp_path, methods, 0.6, refine=2, evolve=1)
        assert len({cell.perplexity for cell in found.cells}) >= 4
        for cell, modifier in zip(found.cells, alone, strict=True):
            stage = WandaPruningModifier(sparsity=0.6, **EVERY)
            recipe = [stage] if modifier is None else [modifier, stage]
            model = apply_recipe(source, recipe, **calibration)
            assert cell.perplexity == perplexity(model, windows), cell.method
            if modifier is not None:
                assert modifier.plan.blocks == found.plans[cell.method]["0.6"].blocks

    def test_plans_for_what_is_repaired_are_those_of_recipes_too(
        self,
        source: Path,
        compared: Callable[..., Comparison],
        calibration: dict[str, Any],
        windows: list[torch.Tensor],
        tmp_path: Path,
    ) -> None:
        pruners = ["sparsegpt", "admm", "magnitude-polished"]
        found = compared(tmp_path, "dlp-refined", 0.5, 0.7, refine=2, pruners=pruners)
        assert {name: list(plans) for name, plans in found.plans.items()} == {
            "dlp:0.15 refined 2": ["0.5"],
            "dlp:0.15 refined 2, by magnitude": ["0.5"],
            "dlp:0.15 refined 2, 0.1 easier": ["0.7"],
            "dlp:0.15 refined 2, 0.2 easier": ["0.7"],
            "dlp:0.15 refined 2, by magnitude, 0.2 easier": ["0.7"],
        }
        alone = DLPModifier(refine=2)
        stage = ADMMPruningModifier(sparsity=0.7, **EVERY)
        model = apply_recipe(source, [alone, stage], **calibration)
        assert found.plan("dlp:0.15 refined 2", "0.5", "admm").searched_at is None
        plan = found.plan("dlp:0.15 refined 2", "0.7", "admm")
        assert plan.searched_at == 0.5
        assert plan.blocks == alone.plan.blocks
        cell = found.cell("dlp:0.15 refined 2", "0.7", "admm")
        assert cell.perplexity == perplexity(model, windows)

    def test_n_m_is_a_target_of_its_own(
        self,
        source: Path,
        compared: Callable[..., Comparison],
        calibration: dict[str, Any],
        windows: list[torch.Tensor],
        tmp_path: Path,
    ) -> None:
        pruners = ["wanda", "magnitude"]
        settings = {"pruners": pruners, "refine": 1}
        found = compared(tmp_path, "uniform,dlp:auto,dlp-refined", 0.5, "4:8", **settings)
        assert list(dict.fromkeys(cell.target for cell in found.cells)) == ["0.5", "4:8"]
        assert all(abs(plan["4:8"].deviation) < 1e-3 for plan in found.plans.values())
        text = view.markdown(found)
        assert "| magnitude | 4:8 | uniform |" in text
        wanda = found.cell("dlp:0.15 refined 1", "4:8", "wanda")
        stage = WandaPruningModifier(mask_structure="4:8", **EVERY)
        model = apply_recipe(source, [DLPModifier(refine=1), stage], **calibration)
        assert wanda.perplexity == perplexity(model, windows)
        assert compared(tmp_path, "uniform,dlp:auto,dlp-refined", 0.5, "4:8", **settings) == found
        (tmp_path / "recipe.yaml").write_text(found.recipe("4:8"))
        best = found.best("4:8")
        model = apply_recipe(source, str(tmp_path / "recipe.yaml"), **calibration)
        assert perplexity(model, windows) == best.perplexity

    def test_weights_of_measured_models_are_let_go(
        self,
        compared: Callable[..., Comparison],
        copied: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        models = []

        def kept(**arguments: Any) -> torch.nn.Module:
            models.append(oneshot(**arguments))
            return models[-1]

        monkeypatch.setattr("dlp_plugin.checkpoints.loading.oneshot", kept)
        compared(copied, "dlp:0.05", 0.5)
        assert len(models) == 2  # scoring, and the cell
        assert {p.device.type for model in models for p in model.parameters()} == {"meta"}


class TestGoingOn:
    def test_what_was_measured_is_not_measured_again(
        self,
        compared: Callable[..., Comparison],
        finished: tuple[Path, Comparison],
        copied: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        runs, seen = counted(monkeypatch), []
        again = compared(copied, "uniform,owl:0.1", 0.5, 0.7, report=seen.append)
        assert (runs.count, seen) == (0, [])
        assert again == finished[1]

    def test_only_new_cells_are_measured(
        self, compared: Callable[..., Comparison], copied: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runs, seen = counted(monkeypatch), []
        pruners = ["wanda", "sparsegpt"]
        found = compared(copied, "owl:0.1", 0.7, pruners=pruners, report=seen.append)
        assert runs.count == 1  # the plan is there, so nothing is scored
        assert [(c.method, c.sparsity, c.pruner) for c in seen] == [("owl:0.1", 0.7, "sparsegpt")]
        assert [c.pruner for c in found.cells] == pruners
        found = compared(copied, "uniform", 0.6, 0.7, report=seen.append)
        assert runs.count == 3  # one pass that scores, one cell
        assert [c.sparsity for c in found.cells] == [0.6, 0.7]
        assert len(json.loads((copied / "results.json").read_text())["cells"]) == 6

    def test_what_another_plan_made_is_measured_anew(
        self, compared: Callable[..., Comparison], copied: Path
    ) -> None:
        """A plan that an earlier version kept under another name is made, and its cell with it."""
        path = copied / "results.json"
        content = json.loads(path.read_text())
        del content["plans"]["owl:0.1"]["0.7"]
        for cell in content["cells"]:
            cell["perplexity"] = 1.0
        path.write_text(json.dumps(content))
        found = compared(copied, "uniform,owl:0.1", 0.5, 0.7)
        anew = [(c.method, c.target) for c in found.cells if c.perplexity != 1]
        assert anew == [("owl:0.1", "0.7")]

    def test_a_comparison_broken_off_goes_on(
        self,
        compared: Callable[..., Comparison],
        finished: tuple[Path, Comparison],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        counted(monkeypatch, broken_at=3)  # scoring, the first cell, and no further
        with pytest.raises(KeyboardInterrupt, match="broken off"):
            compared(tmp_path, "uniform,owl:0.1", 0.5)
        left = Comparison.model_validate_json((tmp_path / "results.json").read_text())
        assert [cell.method for cell in left.cells] == ["uniform"]
        runs = counted(monkeypatch)
        found = compared(tmp_path, "uniform,owl:0.1", 0.5)
        assert runs.count == 1
        assert figures(found.cells) == figures(finished[1].cells[:2])
        assert [file.name for file in tmp_path.iterdir()] == ["results.json"]

    def test_results_of_other_data_are_refused(
        self,
        compared: Callable[..., Comparison],
        copied: Path,
        calibration: dict[str, Any],
        windows: list[torch.Tensor],
    ) -> None:
        before = (copied / "results.json").read_text()
        fewer = {**calibration, "dataset": calibration["dataset"].select(range(7))}
        with pytest.raises(ValueError, match=r"differs in: calibration data; name another folder"):
            compared(copied, "dlp", 0.5, calibration=fewer)
        with pytest.raises(ValueError, match=rf"{copied} holds .* in: test data; .*delete"):
            compared(copied, "dlp", 0.5, windows=windows[1:])
        assert (copied / "results.json").read_text() == before

    def test_a_file_of_another_kind_is_refused(
        self, compared: Callable[..., Comparison], tmp_path: Path
    ) -> None:
        (tmp_path / "results.json").write_text("{}")
        with pytest.raises(ValueError, match=r"results.json does not hold a comparison"):
            compared(tmp_path, "dlp", 0.5)


class TestWhatIsWritten:
    def test_the_recipe_gives_the_same_model(
        self,
        source: Path,
        finished: tuple[Path, Comparison],
        calibration: dict[str, Any],
        windows: list[torch.Tensor],
        tmp_path: Path,
    ) -> None:
        _, found = finished
        file = tmp_path / "recipe.yaml"
        file.write_text(found.recipe())
        best = min(found.cells[2:], key=lambda cell: cell.perplexity)
        assert file.read_text().startswith(f"# {source}, {best.method} at 0.7, wanda: perplexity")
        model = apply_recipe(source, str(file), **calibration)
        assert perplexity(model, windows) == best.perplexity

    @pytest.mark.parametrize("pruner", STAGES)
    def test_a_recipe_holds_the_plan_to_the_last_digit(
        self, finished: tuple[Path, Comparison], pruner: str
    ) -> None:
        plan = finished[1].plans["owl:0.1"]["0.5"]
        (stage,) = yaml.safe_load(recipe_of(plan, pruner)).values()
        modifiers = stage["pruning_modifiers"]
        assert list(modifiers) == ["OWLModifier", STAGES[pruner].__name__]
        assert type(plan).load(modifiers["OWLModifier"]["from_plan"]) == plan

    def test_tables_show_every_figure_and_the_best(self, finished: tuple[Path, Comparison]) -> None:
        _, found = finished
        best = found.best("0.7")
        table = view.table(found)
        columns = [list(column.cells) for column in table.columns]
        assert columns[:2] == [["wanda", "wanda"], ["uniform", "owl:0.1"]]
        ratio = best.perplexity / found.dense
        assert f"[bold]{best.perplexity:.2f} ({ratio:.2f})[/]" in columns[3]
        assert sum("bold" in entry for entry in columns[2] + columns[3]) == 2
        lines = view.markdown(found).splitlines()
        assert len(lines) == 3 + len(found.cells)
        assert len({line.count("|") for line in lines}) == 1
        assert f"| **{best.perplexity:.4f}** | {ratio:.3f} | {best.achieved:.4f} |" in "".join(
            lines
        )

    def test_pictures(self, finished: tuple[Path, Comparison], tmp_path: Path) -> None:
        draw(finished[1], tmp_path)
        for name in ("perplexity.png", "sparsities.png"):
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    def test_pictures_need_matplotlib(
        self,
        finished: tuple[Path, Comparison],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match=r"dlp_plugin\[plot\]"):
            draw(finished[1], tmp_path)


def test_a_folder_that_cannot_be_written_is_told_before_any_work(
    compared: Callable[..., Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("dlp_plugin.comparison.run.load_to_prune")
    deny_writing(monkeypatch)
    with pytest.raises(PermissionError, match="cannot write .*results.json: no permission"):
        compared(tmp_path, "dlp", 0.5)


def test_pruners_and_sparsities_are_checked_before_any_work(
    compared: Callable[..., Comparison], tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"no pruner 'obs'; there are admm, magnitude, sparsegpt, wan"
    ):
        compared(tmp_path / "new", "dlp", 0.5, pruners=["obs"])
    with pytest.raises(ValueError, match="strictly between 0 and 1, got 50"):
        compared(tmp_path / "new", "dlp", 50)
    with pytest.raises(ValueError, match="mask_structure must be N:M.*got '4:4'"):
        compared(tmp_path / "new", "dlp", "4:4")
    with pytest.raises(ValueError, match="'half' is not a number; give e.g. 0.5, 0.7 or 4:8"):
        compared(tmp_path / "new", "dlp", "half")
    assert not (tmp_path / "new").exists()
