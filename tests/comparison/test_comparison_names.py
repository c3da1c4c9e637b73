"""Names of what is compared, and which of what was measured is the best."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import dlp_plugin
from dlp_plugin.comparison import view
from dlp_plugin.comparison.names import contender_named, pruner_named, target_of
from dlp_plugin.comparison.pictures import draw
from dlp_plugin.comparison.results import Cell, Comparison
from dlp_plugin.modifiers.feeding import offset_of
from dlp_plugin.planning.methods import DLP, OWL, AlphaPruning, LinearSparsity
from dlp_plugin.planning.plan import Plan, SearchStep


@pytest.mark.parametrize(
    "repair", ["", "-polished", "-reconstructed", "-distilled", "-polished-reconstructed-distilled"]
)
@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "admm", "magnitude"])
def test_plans_for_a_pruner_are_searched_where_its_stage_has_them_searched(
    name: str, repair: str
) -> None:
    pruner = pruner_named(name + repair)
    stage = getattr(dlp_plugin, pruner.modifier)(sparsity=0.5, **pruner.fields)
    assert pruner.way.offset == offset_of(stage)


class TestMethodNames:
    @pytest.mark.parametrize(
        ("text", "name", "kind", "strength"),
        [
            ("uniform", "uniform", DLP, 0.0),
            ("dlp", "dlp:0.15", DLP, 0.15),
            (" dlp:0.1 ", "dlp:0.1", DLP, 0.1),
            ("dlp-auto", "dlp:auto", DLP, "auto"),
            ("owl:auto", "owl:auto", OWL, "auto"),
            ("alpha-pruning:0.2", "alpha-pruning:0.2", AlphaPruning, 0.2),
            ("alpha_pruning:auto", "alpha-pruning:auto", AlphaPruning, "auto"),
            ("linear", "linear:auto", LinearSparsity, "auto"),
            ("dlp-auto-refined", "dlp:auto refined 5", DLP, "auto"),
            ("owl-refined:0.1", "owl:0.1 refined 5", OWL, 0.1),
            ("uniform-evolved", "uniform evolved 9", DLP, 0.0),
        ],
    )
    def test_a_name_with_and_without_a_strength(
        self, text: str, name: str, kind: type, strength: float | str
    ) -> None:
        found = contender_named(text, 5, 9)
        assert (found.name, type(found.method), found.method.strength) == (name, kind, strength)
        searched = {"refined": (5, "gradient"), "evolved": (9, "evolution")}
        expected = next((searched[way] for way in searched if way in text), (0, "gradient"))
        assert (found.refine, found.search) == expected
        assert found.judges == (expected[0] > 0 or strength == "auto")

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("dpl", "there is no 'dpl'"),
            ("", "there is no ''"),
            ("dlp:much", "could not convert"),
            ("dlp:-1", "alpha must be finite and at least 0"),
            ("uniform:0.1", "uniform has no strength"),
            ("alpha-pruning:1.5", "epsilon must be at most 1"),
            ("uniform-refined:0.1", "uniform has no strength"),
        ],
    )
    def test_a_bad_one_is_named_with_what_there_is(self, text: str, problem: str) -> None:
        with pytest.raises(ValueError, match=rf"method '{text}': .*{problem}.* owl, alpha-pruning"):
            contender_named(text)


def cell(method: str, sparsity: float, pruner: str, value: float) -> Cell:
    return Cell(
        method=method, target=str(sparsity), pruner=pruner, perplexity=value, achieved=0, seconds=0
    )


class TestTheBest:
    found = Comparison(
        subject={"model": "m"},
        dense=2.0,
        cells=[
            cell("a", 0.5, "wanda", 4.0),
            cell("b", 0.5, "wanda", 3.0),
            cell("a", 0.7, "wanda", 8.0),
            cell("b", 0.7, "wanda", float("nan")),
            cell("a", 0.7, "sparsegpt", 9.0),
            cell("b", 0.7, "sparsegpt", 7.0),
        ],
    )

    def test_it_is_over_pruners_at_the_highest_sparsity_or_the_given(self) -> None:
        assert self.found.best() == self.found.cells[5]
        assert self.found.best("0.5") == self.found.cells[1]
        assert self.found.best(pruner="wanda") == self.found.cells[2]
        with pytest.raises(ValueError, match=r"measured at 0.6; there are 0.5, 0.7"):
            self.found.best("0.6")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_it_is_none_where_none_is_finite(self, value: float) -> None:
        cells = [cell("a", 0.5, "wanda", value), cell("b", 0.5, "wanda", value)]
        found = self.found.model_copy(update={"cells": cells})
        with pytest.raises(ValueError, match=r"no perplexity at 0.5 is finite, .*: prune less"):
            found.best()
        shown = [list(column.cells) for column in view.table(found).columns]
        assert shown[2] == [f"{value} ({value})"] * 2  # none in bold

    def test_an_undefined_perplexity_survives_the_file(self, tmp_path: Path) -> None:
        self.found.save(tmp_path / "r.json")
        text = (tmp_path / "r.json").read_text()
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert math.isnan(Comparison.model_validate_json(text).cells[3].perplexity)
        assert str(Comparison.model_validate_json(text)) == str(self.found)


def test_a_plan_has_one_color_in_all_panels_and_one_place_in_the_legend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(target: str, *divergences: float) -> Plan:
        sparsity, structure = target_of(target)
        made = Plan.make(
            [("a", 8, 1.0), ("b", 8, 2.0)],
            model="m",
            method=DLP(alpha=0.0),
            target=sparsity,
            mask_structure=structure,
        )
        steps = [
            SearchStep(step=place, evaluations=1, tokens=9 * place, divergence=value)
            for place, value in enumerate(divergences)
        ]
        return made.model_copy(update={"search": tuple(steps)})

    method, easier = "uniform refined 1", "uniform refined 1, 0.2 easier"
    pruners = ["wanda", "admm"]
    found = Comparison(
        subject={},
        dense=2.0,
        plans={
            method: {"4:8": plan("4:8", 0.2, 0.1), "0.7": plan("0.7", 0.9, 0.8)},
            easier: {"0.7": plan("0.7", 0.4, 0.3)},
            "owl": {"4:8": plan("4:8"), "0.7": plan("0.7")},
        },
        cells=[
            Cell(method=m, target=t, pruner=p, perplexity=3.0, achieved=0, seconds=0)
            for m, t, p in product([method, "owl"], ["4:8", "0.7"], pruners)
        ],
    )
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    monkeypatch.setattr("dlp_plugin.comparison.pictures.replacing", nullcontext)
    draw(found, tmp_path)
    search, _, sparsities = figures
    for figure, shown in ((search, {method, easier}), (sparsities, {method, easier, "owl"})):
        (legend,) = figure.legends
        assert {text.get_text() for text in legend.get_texts()} == shown
        lines = [line for axes in figure.axes for line in axes.get_lines()]
        colors = {(line.get_label(), line.get_color()) for line in lines}
        assert len([name for name, _ in colors if name in shown]) == len(shown)
    for axes in search.axes:
        assert axes.get_ylim()[0] <= 0
        assert axes.get_ylim()[1] > 0.9
