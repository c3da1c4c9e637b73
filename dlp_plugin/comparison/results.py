"""The results of a comparison, which are read from and written to JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field

from dlp_plugin.comparison.names import (
    EVERY,
    FEWEST,
    Scope,
    Way,
    plan_name,
    pruner_named,
    target_of,
)
from dlp_plugin.files import replacing
from dlp_plugin.planning.methods import METHODS
from dlp_plugin.planning.plan import Plan

__all__ = ["Cell", "Comparison", "Plain", "best_of", "quantizing", "recipe_of"]


_HEAD = ["re:.*lm_head"]  # neither pruned nor quantized


def recipe_of(
    plan: Plan, pruner: str, bits: int = 16, group_size: int = 128, scope: Scope = EVERY
) -> str:
    """Write the recipe that prunes by a plan, and quantizes if ``bits`` is below 16.

    With a pruner that is distilled the quantized model is distilled too.

    :param plan: becomes a part of the recipe
    :param pruner: as :func:`~dlp_plugin.comparison.names.pruner_named` takes it
    :param bits: as :func:`~dlp_plugin.comparison.names.bits_named` returns them
    :param group_size: columns that share a scale when weights are quantized
    :param scope: which modules are pruned
    :return: YAML
    """
    chosen = pruner_named(pruner)
    stage: dict[str, Any] = {
        "sparsity": plan.target,
        "targets": list(scope.targets),
        "ignore": [*_HEAD, *scope.ignore],
        **chosen.fields,
    }
    if plan.mask_structure:
        stage["mask_structure"] = str(plan.mask_structure)
    given = {"from_plan": plan.model_dump(mode="json", exclude_none=True)}
    modifiers = {METHODS[plan.method].modifier: given, chosen.modifier: stage}
    stages = {"pruning_modifiers": modifiers}
    if bits < 16:
        distill = chosen.fields.get("distill", 0)
        stages["quantization_modifiers"] = _quantizers(bits, group_size, scope, distill)
    return _yaml({"pruning_stage": stages})


def quantizing(bits: int, group_size: int, scope: Scope = EVERY, distill: int = 0) -> str:
    """Write the recipe that quantizes the dense model.

    Below 4 bits weights have groups of 32, zero points, and scales with the least squared error.

    :param bits: as in :func:`recipe_of`
    :param group_size: as in :func:`recipe_of`
    :param scope: as in :func:`recipe_of`
    :param distill: epochs of distillation
    :return: YAML
    """
    modifiers = _quantizers(bits, group_size, scope, distill)
    return _yaml({"quantization_stage": {"quantization_modifiers": modifiers}})


def _quantizers(bits: int, group_size: int, scope: Scope, distill: int) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": bits, "strategy": "group", "group_size": group_size}
    if bits < FEWEST:  # a model does not survive 2 or 3 bits with the settings of 4
        weights |= {"group_size": 32, "symmetric": False, "observer": "mse"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    preset = {"scheme": f"W{bits}A16", "targets": ["Linear"]}
    chosen = preset if group_size == 128 and bits >= FEWEST else {"config_groups": groups}
    fields = {**chosen, "ignore": [*_HEAD, *scope.ignore]}
    return {"MaskedGPTQModifier": {**fields, "distill": distill} if distill else fields}


def _yaml(recipe: dict[str, Any]) -> str:
    return str(yaml.safe_dump(recipe, sort_keys=False, width=100))


class Plain(BaseModel):
    """Results of the dense model, quantized or not.

    :param perplexity: on the test text
    :param bytes: size of the weights on disk
    :param accuracy: task to the fraction of its questions that were answered correctly
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    perplexity: float
    bytes: int
    accuracy: dict[str, float] = Field(default_factory=dict)


class Cell(BaseModel):
    """Results of one method at one target with one pruner.

    :param method: full name, as :func:`~dlp_plugin.comparison.names.contender_named` returns it
    :param target: a sparsity or N:M, as :func:`~dlp_plugin.comparison.names.target_named`
        writes it
    :param pruner: as :func:`~dlp_plugin.comparison.names.pruner_named` takes it
    :param perplexity: infinite or NaN if the pruned model has collapsed
    :param achieved: measured sparsity of the pruned Linears, including weights that quantization
        rounded to zero
    :param seconds: to load, prune, quantize, store and measure, without making the plan
    :param bits: per weight; 16 for weights as in the checkpoint
    :param bytes: size of the weights on disk, packed by :mod:`dlp_plugin.checkpoints.packing` if
        that is smaller; None if it was not measured
    :param memory: peak memory in bytes, as :func:`~dlp_plugin.comparison.memory.peak` returns it;
        None if it is not known
    :param accuracy: task to the fraction of its questions that were answered correctly
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    method: str
    target: str
    pruner: str
    perplexity: float
    achieved: float
    seconds: float
    bits: int = 16
    bytes: int | None = None
    memory: int | None = None
    accuracy: dict[str, float] = Field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Target sparsity."""
        return target_of(self.target)[0]


def best_of(cells: Iterable[Cell]) -> Cell | None:
    """Return the cell with the least perplexity.

    :param cells: to choose from
    :return: the first of equal cells; None if no perplexity is finite
    """
    finite = (cell for cell in cells if math.isfinite(cell.perplexity))
    return min(finite, key=lambda cell: cell.perplexity, default=None)


class Comparison(BaseModel):
    """All results of a comparison.

    :param subject: model, data, device and package versions that the results depend on
    :param dense: perplexity of the dense model
    :param accuracy: task to the dense model's accuracy
    :param questions: number of questions per task, counted from the first; None for all
    :param plans: name of a plan (see :meth:`plan_name`) to target to plan
    :param decided: name of a plan to target to the seconds it took, without scoring the blocks
    :param cells: one per method, target, pruner and bits
    :param plain: bits to the results of the dense model
    :param distilled: bits to the results of the dense model that is quantized and distilled;
        measured where a pruner is distilled
    :param group_size: columns that share a scale when weights are quantized
    :param scope: which modules are pruned
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    subject: dict[str, str]
    dense: float | None = None
    accuracy: dict[str, float] = Field(default_factory=dict)
    questions: int | None = None
    plans: dict[str, dict[str, Plan]] = Field(default_factory=dict)
    decided: dict[str, dict[str, float]] = Field(default_factory=dict)
    cells: list[Cell] = Field(default_factory=list)
    plain: dict[int, Plain] = Field(default_factory=dict)
    distilled: dict[int, Plain] = Field(default_factory=dict)
    group_size: int = 128
    scope: Scope = EVERY

    def cell(self, method: str, target: str, pruner: str, bits: int = 16) -> Cell | None:
        """Return one cell; None if it was not measured."""
        wanted = (method, target, pruner, bits)
        keys = ((cell.method, cell.target, cell.pruner, cell.bits) for cell in self.cells)
        return next((c for c, key in zip(self.cells, keys, strict=True) if key == wanted), None)

    def plan(self, method: str, target: str, pruner: str) -> Plan:
        """Return the plan by which a method was pruned.

        :raises KeyError: if there is no such plan
        """
        return self.plans[self.plan_name(method, target, pruner)][target]

    def plan_name(self, method: str, target: str, pruner: str) -> str:
        """Return the plan's key in ``plans``; it includes how the plan was judged, if it was."""
        way = pruner_named(pruner).way
        ways = way, Way(by_magnitude=way.by_magnitude), Way()
        names = [plan_name(method, each) for each in ways]
        return next((name for name in names if target in self.plans.get(name, {})), method)

    def only(
        self,
        methods: Iterable[str],
        targets: Iterable[str],
        pruners: Iterable[str],
        bits: Iterable[int] = (16,),
    ) -> Comparison:
        """Return the results with only these cells, in the order of the arguments."""
        bits = list(bits)
        asked = [self.cell(m, t, p, b) for p, b, t, m in product(pruners, bits, targets, methods)]
        plain = {each: self.plain[each] for each in bits if each in self.plain}
        distilled = {each: self.distilled[each] for each in bits if each in self.distilled}
        cells = [cell for cell in asked if cell is not None]
        update = {"cells": cells, "plain": plain, "distilled": distilled}
        return self.model_copy(update=update)

    @property
    def unpruned(self) -> list[tuple[str, int, Plain]]:
        """Name, bits and results of the models that are not pruned."""
        named = ("dense", self.plain), ("dense, distilled", self.distilled)
        return [(name, bits, one) for name, found in named for bits, one in found.items()]

    def best(
        self, target: str | None = None, pruner: str | None = None, bits: int | None = None
    ) -> Cell:
        """Return the cell with the least perplexity; of equal ones the first.

        :param target: of the cell; by default the highest sparsity, with or without a structure
        :param pruner: of the cell; any by default
        :param bits: of the cell; any by default
        :return: the cell
        :raises ValueError: if there is no such cell, or none has a finite perplexity
        """
        highest = max((cell.sparsity for cell in self.cells), default=math.nan)
        cells = [
            c
            for c in self.cells
            if (c.target == target or (target is None and c.sparsity == highest))
            and pruner in (None, c.pruner)
            and bits in (None, c.bits)
        ]
        if not cells:
            raise ValueError(
                f"nothing was measured at {target or 'any sparsity'}; there are "
                f"{', '.join(self.values('target'))}"
            )
        if (best := best_of(cells)) is None:
            raise ValueError(
                f"no perplexity at {cells[0].target} is finite, so none is the best: prune less, "
                "or with another pruner"
            )
        return best

    def frontier(self) -> list[tuple[int, float]]:
        """Return bytes and perplexity of the models on the Pareto front, sorted by bytes."""
        sized: list[Cell | Plain] = [*self.cells, *(one for _, _, one in self.unpruned)]
        points = [(one.bytes, one.perplexity) for one in sized if one.bytes is not None]
        best: list[tuple[int, float]] = []
        for size, value in sorted(points):
            if math.isfinite(value) and (not best or value < best[-1][1]):
                best.append((size, value))
        return best

    def recipe(self, target: str | None = None) -> str:
        """Write the recipe of the best cell, with its results as a comment at the top.

        :param target: as in :meth:`best`
        :return: YAML
        """
        cell = self.best(target)
        figures = f"perplexity {cell.perplexity:.4f}, {self.ratio(cell):.3f} x dense"
        quantized = f", {cell.bits} bits" if cell.bits < 16 else ""
        title = f"{cell.method} at {cell.target}, {cell.pruner}{quantized}: {figures}"
        plan = self.plan(cell.method, cell.target, cell.pruner)
        recipe = recipe_of(plan, cell.pruner, cell.bits, self.group_size, self.scope)
        return f"# {self.subject['model']}, {title}\n{recipe}"

    def ratio(self, cell: Cell | Plain) -> float:
        """Return the ratio of a perplexity to the dense model's."""
        return cell.perplexity / (self.dense or math.nan)

    def values(self, field: str) -> list[Any]:
        """Return the different values of a field in the cells, in order."""
        return list(dict.fromkeys(getattr(cell, field) for cell in self.cells))

    def save(self, path: str | Path) -> None:
        """Write the results as JSON; the file appears complete or not at all."""
        with replacing(path) as beside:
            beside.write_text(self.model_dump_json(indent=1) + "\n")
