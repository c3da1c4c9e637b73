"""What a comparison found, as data; JSON in and out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field

from dlp_plugin.comparison.names import pruner_named, target_of
from dlp_plugin.files import replacing
from dlp_plugin.planning.methods import METHODS
from dlp_plugin.planning.plan import Plan

__all__ = ["Cell", "Comparison", "recipe_of"]


def recipe_of(plan: Plan, pruner: str) -> str:
    """The YAML recipe that prunes by a plan, which it holds.

    :param pruner: as :func:`~dlp_plugin.comparison.names.pruner_named` takes it
    """
    chosen = pruner_named(pruner)
    stage: dict[str, Any] = {
        "sparsity": plan.target,
        "targets": ["Linear"],
        "ignore": ["re:.*lm_head"],
        **chosen.fields,
    }
    if plan.mask_structure:
        stage["mask_structure"] = str(plan.mask_structure)
    given = {"from_plan": plan.model_dump(mode="json", exclude_none=True)}
    modifiers = {METHODS[plan.method].modifier: given, chosen.modifier: stage}
    recipe = {"pruning_stage": {"pruning_modifiers": modifiers}}
    return str(yaml.safe_dump(recipe, sort_keys=False, width=100))


class Cell(BaseModel):
    """One method at one target with one pruner, measured.

    :param method: full name, as :func:`~dlp_plugin.comparison.names.contender_named` gives it
    :param target: a sparsity or N:M, as :func:`~dlp_plugin.comparison.names.target_named`
        writes it
    :param achieved: zeros among the weights of the pruned Linears
    :param seconds: to load, prune and measure; making the plan is not in it
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    method: str
    target: str
    pruner: str
    perplexity: float
    achieved: float
    seconds: float

    @property
    def sparsity(self) -> float:
        """Sparsity that was aimed at."""
        return target_of(self.target)[0]


class Comparison(BaseModel):
    """What was measured.

    :param subject: what the figures hold for: model, data, device, package versions
    :param dense: perplexity of the dense model
    :param plans: full name of a method (of one that judges by magnitude's masks another, see
        :meth:`plan_name`) to target to plan
    :param decided: likewise to the seconds that the plan took, once the blocks were scored
    :param cells: one per method, target and pruner
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    subject: dict[str, str]
    dense: float | None = None
    plans: dict[str, dict[str, Plan]] = Field(default_factory=dict)
    decided: dict[str, dict[str, float]] = Field(default_factory=dict)
    cells: list[Cell] = Field(default_factory=list)

    def cell(self, method: str, target: str, pruner: str) -> Cell | None:
        """One cell; None if it was not measured."""
        wanted = (method, target, pruner)
        return next((c for c in self.cells if (c.method, c.target, c.pruner) == wanted), None)

    def plan(self, method: str, target: str, pruner: str) -> Plan:
        """The plan that a method prunes by.

        :raises KeyError: if there is none
        """
        return self.plans[self.plan_name(method, pruner)][target]

    def plan_name(self, method: str, pruner: str) -> str:
        """What it is kept under: of those that were judged, magnitude's is one of its own."""
        own = f"{method}, by magnitude"
        return own if pruner_named(pruner).by_magnitude and own in self.plans else method

    def only(
        self, methods: Iterable[str], targets: Iterable[str], pruners: Iterable[str]
    ) -> Comparison:
        """Some of the cells, in the order of the arguments."""
        asked = [self.cell(m, t, p) for p, t, m in product(pruners, targets, methods)]
        return self.model_copy(update={"cells": [cell for cell in asked if cell is not None]})

    def best(self, target: str | None = None, pruner: str | None = None) -> Cell:
        """The cell with the least perplexity; of equal ones the first.

        :param target: at this one; by default at the highest sparsity, whatever its structure
        :param pruner: with this one; any by default
        :raises ValueError: if there is no such cell
        """
        highest = max((cell.sparsity for cell in self.cells), default=math.nan)
        cells = [
            c
            for c in self.cells
            if (c.target == target or (target is None and c.sparsity == highest))
            and pruner in (None, c.pruner)
        ]
        if not cells:
            raise ValueError(
                f"nothing was measured at {target or 'any sparsity'}; there are "
                f"{', '.join(self.values('target'))}"
            )
        return min(cells, key=lambda c: (math.isnan(c.perplexity), c.perplexity))

    def recipe(self, target: str | None = None) -> str:
        """The recipe of the best cell over methods and pruners, with its figures on top.

        :param target: as in :meth:`best`
        """
        cell = self.best(target)
        figures = f"perplexity {cell.perplexity:.4f}, {self.ratio(cell):.3f} x dense"
        title = f"{cell.method} at {cell.target}, {cell.pruner}: {figures}"
        plan = self.plan(cell.method, cell.target, cell.pruner)
        return f"# {self.subject['model']}, {title}\n{recipe_of(plan, cell.pruner)}"

    def ratio(self, cell: Cell) -> float:
        """A cell's perplexity to the dense model's."""
        return cell.perplexity / (self.dense or math.nan)

    def values(self, field: str) -> list[Any]:
        """What the cells hold in a field, each once, in their order."""
        return list(dict.fromkeys(getattr(cell, field) for cell in self.cells))

    def save(self, path: str | Path) -> None:
        """Write all as JSON; the file appears whole or not at all."""
        with replacing(path) as beside:
            beside.write_text(self.model_dump_json(indent=1) + "\n")
