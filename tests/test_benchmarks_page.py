"""The benchmarks' pages against what was measured: no figure on it is typed by hand."""

from __future__ import annotations

import json
import shlex
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from helpers import ROOT

from dlp_plugin.comparison.names import contender_named, target_named

BENCHMARKS = ROOT / "tests" / "benchmarks"
DEFAULT_STEPS = {"refine": 16, "evolve": 40}
ANEW = "run .venv/bin/python tests/benchmarks/page.py"


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import page

    return page


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import record

    return record


def test_the_page_is_what_was_measured(page: ModuleType) -> None:
    parts = page.Parts(BENCHMARKS / "results")
    for path, text in page.pages(parts).items():
        assert path.read_text() == text, ANEW


def test_so_are_the_tables_of_other_pages(page: ModuleType) -> None:
    parts = page.Parts(BENCHMARKS / "results")
    for path, text in page.with_tables(parts).items():
        assert path.read_text() == text, ANEW
        assert page.TABLES[path](parts).strip() in text, ANEW


def test_every_part_says_what_it_holds_for(page: ModuleType) -> None:
    for name, part in page.Parts(BENCHMARKS / "results").items():
        assert part["processor"], name
        assert part["commit"], name
        assert part["date"], name
        assert part["results"], name
        if not part.get("transcribed"):
            for key in ("command", "instruction_sets", "cores", "threads", "versions"):
                assert part[key], f"{name}: {key}"


def test_a_command_on_the_page_runs_as_it_was_run(page: ModuleType) -> None:
    parts = page.Parts(BENCHMARKS / "results")
    for name, part in parts.items():
        if command := part["command"]:
            shown = parts.whence(name).split("```")[1].removeprefix("bash")
            assert shlex.split(shown.replace("\\\n", "")) == shlex.split(command)


def test_what_is_measured_and_not_shown_is_an_error(page: ModuleType) -> None:
    parts = page.Parts(BENCHMARKS / "results")
    parts["another"] = parts["samples"]
    with pytest.raises(ValueError, match="on no page: another, from another"):
        page.pages(parts)


def test_a_part_in_two_files_is_an_error(page: ModuleType, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"training": {}}))
    with pytest.raises(ValueError, match=r"training stands in two\.json and in another"):
        page.Parts(tmp_path)


def test_a_part_is_added_beside_others_or_in_the_place_of_its_own(
    record: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    file, other = tmp_path / "run.json", tmp_path / "transcribed.json"
    record.add(other, {"training": {"results": 0}, "recovery": {"results": 4}})
    record.add(file, {"training": {"results": 1}})
    record.add(file, {"growth": {"results": 2}})
    record.add(file, {"training": {"results": 3}})
    assert json.loads(file.read_text()) == {"training": {"results": 3}, "growth": {"results": 2}}
    assert json.loads(other.read_text()) == {"recovery": {"results": 4}}


def test_a_comparison_is_slimmed(record: ModuleType) -> None:
    cells = [{"method": "dlp:0.15", "target": "0.5", "pruner": "wanda", "perplexity": 24.0}]
    path = [{"generation": 1, "tokens": 9, "evaluations": 1, "divergence": 0.5}]
    plans = {
        "dlp:0.15": {"0.5": {"strength": 0.15, "blocks": [1, 2], "search": []}},
        "dlp:0.1 refined 1": {"0.5": {"strength": 0.1, "blocks": [1, 2], "search": path}},
        "uniform": {},
    }
    kept = {
        "subject": {"model": "m"},
        "dense": 20.0,
        "cells": cells,
        "decided": {"dlp:0.1 refined 1": {"0.5": 7.0}},
    }
    assert record.slimmed({**kept, "plans": plans}) == {
        **kept,
        "strengths": {"dlp:0.15": {"0.5": 0.15}, "dlp:0.1 refined 1": {"0.5": 0.1}, "uniform": {}},
        "searches": {"dlp:0.1 refined 1": {"0.5": [[9, 0.5]]}},
    }


class TestSeveralComparisons:
    """Of one model and the same data, as one."""

    @staticmethod
    def one(pruner: str, perplexity: float, bits: str) -> dict:
        cell = {"method": "uniform", "target": "0.5", "pruner": pruner, "bits": 16}
        return {
            "subject": {"model": "m"},
            "dense": 20.0,
            "questions": 200,
            "accuracy": {f"task {bits}": 0.5},
            "plain": {bits: {"perplexity": perplexity}},
            "cells": [{**cell, "perplexity": perplexity}],
            "plans": {"uniform": {bits: {}}},
            "decided": {"uniform": {bits: 1.0}},
        }

    def test_all_are_kept_and_of_twins_the_first(self, record: ModuleType) -> None:
        parts = [self.one("wanda", 24.0, "16"), self.one("admm", 22.0, "4")]
        found = record.merged([*parts, self.one("wanda", 99.0, "16")])
        assert [cell["perplexity"] for cell in found["cells"]] == [24.0, 22.0]
        assert {bits: one["perplexity"] for bits, one in found["plain"].items()} == {
            "16": 24.0,
            "4": 22.0,
        }
        assert found["accuracy"].keys() == {"task 16", "task 4"}
        assert found["plans"]["uniform"].keys() == found["decided"]["uniform"].keys() == {"16", "4"}

    def test_another_model_is_refused(self, record: ModuleType) -> None:
        other = {**self.one("wanda", 24.0, "16"), "subject": {"model": "other"}}
        with pytest.raises(ValueError, match="comparisons of different subject"):
            record.merged([self.one("wanda", 24.0, "16"), other])


def test_where_it_is_measured_is_recorded(
    record: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = str(BENCHMARKS / "run.py")
    arguments = [script, "--json", "results.json", "--only", "training"]
    monkeypatch.setattr(record.sys, "argv", arguments)
    found = record.here()
    assert found["command"] == "python tests/benchmarks/run.py --only training"
    assert found["versions"]["torch"]
    assert found["cores"] >= 1
    assert record.here("other", threads=3)["command"] == "other"


def test_what_experts_cost_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage on a small block, by the real ``oneshot()``."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import mixtures

    monkeypatch.setattr(mixtures, "SIZES", {**mixtures.SIZES, "hidden_size": 64})
    monkeypatch.setattr(mixtures, "SAMPLES", 1)
    found = {stage: {"4": mixtures.measured(stage, 4)} for stage in mixtures.STAGES}
    for stage, one in found.items():
        assert one["4"].keys() == {"seconds", "peak megabytes"}, stage
        assert one["4"]["seconds"] > 0, stage
    assert mixtures.show(found).row_count == len(mixtures.STAGES)


def test_the_main_commands_output_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import main_command

    assert main_command.job().endswith("examples/prune_and_compare.py")
    rows = [f"│ {name} │ 0.6961 │ 35.168 │ 1.701 │ 9.5 │" for name in main_command.ROWS]
    sizes = [f"│ {name} │ 6.97 │ 2.86 │ 3.21 │" for name in main_command.SIZES]
    output = "\n".join([*rows, *sizes, "pruned weights that came back with 4 bits: 0"])
    found = main_command.results(output, output.replace("35.168", "35.300"), {"here": 9})
    assert found["rows"][3]["name"] == "DLP, alpha auto, refined"
    assert found["rows"][3]["perplexity"] == 35.168
    assert found["rows"][3]["float32"] == 35.3
    assert found["megabytes"]["at 4 bits"] == {"written": 6.97, "zstd": 2.86, "packed": 3.21}
    assert found["came back"] == 0


# Where the README speaks of the real model: what is better than what, at which sparsity.
UNIFORM, DLP, REFINED = "uniform", "dlp:0.15", "dlp:0.15 refined 16"


def test_what_the_readme_says_of_the_real_model_was_measured(page: ModuleType) -> None:
    found = page.Parts(BENCHMARKS / "results").results("yardsticks")
    cells = {(c["target"], c["pruner"], c["method"], c["bits"]): c for c in found["cells"]}

    def loss(target: str, pruner: str, method: str, bits: int = 16) -> float:
        return cells[target, pruner, method, bits]["perplexity"]

    for target in ("0.5", "0.6", "0.7"):  # DLP wins from 60 % on; the best is what is said to be
        wins = loss(target, "wanda", DLP) < loss(target, "wanda", UNIFORM)
        assert wins == (target != "0.5")
        others = [c["perplexity"] for c in found["cells"] if c["target"] == target]
        assert loss(target, "admm-reconstructed-distilled", REFINED) == min(others)
    plain = {bits: one["perplexity"] for bits, one in found["plain"].items()}
    assert plain["3"] < loss("0.5", "admm-reconstructed", REFINED, 4)
    assert loss("0.6", "admm-reconstructed", REFINED, 4) < plain["2"] / 2


def test_a_command_names_the_methods_pruners_and_sparsities_of_its_rows(page: ModuleType) -> None:
    for name, part in page.Parts(BENCHMARKS / "results").items():
        words = shlex.split(part["command"] or "")
        if words[:2] != ["dlp-plugin", "compare"] or "cells" not in part["results"]:
            continue
        given = {word: value for word, value in pairwise(words) if word.startswith("--")}
        steps = {key: int(given.get(f"--{key}", usual)) for key, usual in DEFAULT_STEPS.items()}
        asked = {
            "method": {contender_named(m, **steps).name for m in given["--methods"].split(",")},
            "target": {target_named(target) for target in given["--sparsities"].split(",")},
            "pruner": set(given["--pruners"].split(",")),
        }
        for cell in part["results"]["cells"]:
            for what, known in asked.items():
                assert cell[what] in known, f"{name}: {what} {cell[what]}"


def test_no_figure_is_of_a_tree_with_changes(page: ModuleType) -> None:
    for name, part in page.Parts(BENCHMARKS / "results").items():
        assert "changes" not in part["commit"], name
