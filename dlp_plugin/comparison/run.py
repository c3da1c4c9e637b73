"""Methods, sparsities and pruners compared on one model, in one run that can be resumed.

Calibration runs once for all methods: every block is scored by each of them on the same
norms. Where a method judges pruned models (``auto``, ``-refined``), the samples go through in
two portions: the three quarters that such a method scores on, then the quarter it judges by;
a method of fixed strength scores on both. So every plan is the one that a recipe with its
modifier makes, whatever it is compared with, and a pruner prunes on all samples. One thing
only is different: experts that saw no token count for no method, not even for those that
look at weights alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from compressed_tensors.offload import remove_dispatch
from llmcompressor.core import Event, State
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from rich.markup import escape
from rich.table import Table

from dlp_plugin import host
from dlp_plugin.checkpoints.loading import apply_recipe, compute_device, load_config, load_model
from dlp_plugin.evaluation.causal import check_causal
from dlp_plugin.evaluation.perplexity import perplexity
from dlp_plugin.files import replacing
from dlp_plugin.modifiers.base import AllocationModifier, DLPModifier
from dlp_plugin.modifiers.peers import AlphaPruningModifier, LinearSparsityModifier, OWLModifier
from dlp_plugin.planning.allocation import check_sparsity, split_structure
from dlp_plugin.planning.plan import Plan, package_versions
from dlp_plugin.precision import is_native
from dlp_plugin.scoring.blocks import check_columns, outer_block
from dlp_plugin.scoring.calibration import Batch, scoring_batches, split
from dlp_plugin.scoring.scores import Part
from dlp_plugin.search.refine import choose_strength, forget, refine

__all__ = [
    "METHODS",
    "PRUNERS",
    "Cell",
    "Comparison",
    "compare",
    "method_named",
    "recipe_of",
    "target_named",
]

METHODS: dict[str, type[AllocationModifier]] = {
    "uniform": DLPModifier,
    "dlp": DLPModifier,
    "owl": OWLModifier,
    "alpha-pruning": AlphaPruningModifier,
    "linear": LinearSparsityModifier,
}
PRUNERS = {
    "wanda": "WandaPruningModifier",
    "sparsegpt": "SparseGPTModifier",
    "magnitude": "OneShotMagnitudeModifier",
}

_MODIFIERS = {kind.method: kind.__name__ for kind in METHODS.values()}


def method_named(text: str, generations: int = 0) -> tuple[str, AllocationModifier]:
    """A method as it is written, ``name[-refined][:strength]``, e.g. ``dlp:0.1``.

    ``dlp`` has its modifier's strength, ``dlp:auto`` (or ``dlp-auto``) one that is chosen;
    ``dlp-refined`` is improved by a search.

    :param generations: of the search, where one is asked for
    :return: its full name, with the strength, and the modifier that does it
    :raises ValueError: naming ``text`` and what there is
    """
    name, _, strength = text.strip().partition(":")
    refined = name.endswith("-refined")
    name = name.removesuffix("-refined")
    if name.endswith("-auto") and not strength:
        name, strength = name.removesuffix("-auto"), "auto"
    try:
        if name not in METHODS:
            raise ValueError(f"there is no {name!r}")
        if name == "uniform" and strength:
            raise ValueError("uniform has no strength")
        if refined and generations < 1:
            raise ValueError("say by how many generations it is refined, e.g. --refine 20")
        kind = METHODS[name]
        fields: dict[str, Any] = {"refine": generations if refined else 0}
        if strength or name == "uniform":
            fields[kind.strength_field] = strength if strength == "auto" else float(strength or 0)
        modifier = kind(**fields)
    except ValueError as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise ValueError(
            f"method {text!r}: {problem}. Methods are {', '.join(METHODS)}; all but uniform take "
            "a strength (dlp:0.1), all but uniform and alpha-pruning choose one (dlp:auto), and "
            "all can be refined (dlp-refined:0.1)"
        ) from None
    if name != "uniform":
        value = modifier.strength
        name += f":{value if value == 'auto' else format(value, 'g')}"
    return name + (f" refined {generations}" if refined else ""), modifier


def target_named(target: float | str) -> str:
    """A target as it is written: a sparsity, or N:M for N of every M weights on average.

    :raises ValueError: if it is neither
    """
    if isinstance(target, str) and ":" in target:
        n, m = split_structure(target.strip())
        check_sparsity(n / m if m else 0, "sparsities")
        return f"{n}:{m}"
    try:
        value = float(target)
    except ValueError:
        raise ValueError(
            f"sparsities: {target!r} is no number; give e.g. 0.5, 0.7 or 4:8"
        ) from None
    return str(check_sparsity(value, "sparsities"))


def _sparsity_and_structure(target: str) -> tuple[float, str]:
    n, m = split_structure(target) if ":" in target else (0, 0)
    return (n / m, target) if m else (float(target), "0:0")


def recipe_of(plan: Plan, pruner: str) -> str:
    """The YAML recipe that prunes by a plan, which it holds.

    :param pruner: ``wanda``, ``sparsegpt`` or ``magnitude``
    """
    stage = {"sparsity": plan.target, "targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    if plan.group:
        stage["mask_structure"] = plan.mask_structure
    given = {"from_plan": plan.model_dump(mode="json", exclude_none=True)}
    modifiers = {_MODIFIERS[plan.method]: given, PRUNERS[pruner]: stage}
    recipe = {"pruning_stage": {"pruning_modifiers": modifiers}}
    return str(yaml.safe_dump(recipe, sort_keys=False, width=100))


class Cell(BaseModel):
    """One method at one target with one pruner, measured.

    :param method: full name, as :func:`method_named` gives it
    :param target: a sparsity or N:M, as :func:`target_named` writes it
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
        return _sparsity_and_structure(self.target)[0]


class Comparison(BaseModel):
    """What was measured.

    :param subject: what the figures hold for: model, data, device, package versions
    :param dense: perplexity of the dense model
    :param plans: full name of a method to target to plan
    :param cells: one per method, target and pruner
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    subject: dict[str, str]
    dense: float | None = None
    plans: dict[str, dict[str, Plan]] = Field(default_factory=dict)
    cells: list[Cell] = Field(default_factory=list)

    def cell(self, method: str, target: str, pruner: str) -> Cell | None:
        """One cell; None if it was not measured."""
        wanted = (method, target, pruner)
        return next((c for c in self.cells if (c.method, c.target, c.pruner) == wanted), None)

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
                f"{', '.join(self._values('target'))}"
            )
        return min(cells, key=lambda c: (math.isnan(c.perplexity), c.perplexity))

    def recipe(self, target: str | None = None) -> str:
        """The recipe of the best cell over methods and pruners, with its figures on top.

        :param target: as in :meth:`best`
        """
        cell = self.best(target)
        figures = f"perplexity {cell.perplexity:.4f}, {self._ratio(cell):.3f} x dense"
        title = f"{cell.method} at {cell.target}, {cell.pruner}: {figures}"
        plan = self.plans[cell.method][cell.target]
        return f"# {self.subject['model']}, {title}\n{recipe_of(plan, cell.pruner)}"

    def table(self) -> Table:
        """Perplexity and its ratio to dense for the terminal (rich), the best in bold."""
        model = escape(self.subject["model"])
        caption = f"in brackets: times the dense model's, {self.dense:.4f}"
        table = Table(title=f"Perplexity of {model}", caption=caption)
        targets = self._values("target")
        for column in ("pruner", "method", *targets):
            table.add_column(column, justify="right" if len(table.columns) > 1 else "left")
        for pruner in self._values("pruner"):
            table.add_section()
            for method in self._values("method"):
                cells = [self.cell(method, target, pruner) for target in targets]
                table.add_row(pruner, method, *(self._entry(cell) for cell in cells))
        return table

    def _entry(self, cell: Cell | None) -> str:
        if cell is None:
            return ""
        text = f"{cell.perplexity:.2f} ({self._ratio(cell):.2f})"
        return f"[bold]{text}[/]" if cell == self.best(cell.target, cell.pruner) else text

    def markdown(self) -> str:
        """All figures as a table in Markdown, the best at each sparsity in bold."""
        lines = [
            ["pruner", "target", "method", "strength", "perplexity", "ratio", "zeros", "seconds"],
            ["---"] * 3 + ["---:"] * 5,
            ["", "0", "dense", "", f"{self.dense:.4f}", "1", "", ""],
        ]
        for cell in self.cells:
            value = f"{cell.perplexity:.4f}"
            if cell == self.best(cell.target, cell.pruner):
                value = f"**{value}**"
            strength = f"{self.plans[cell.method][cell.target].alpha:g}"
            row = [cell.pruner, cell.target, cell.method, strength, value]
            row += [f"{self._ratio(cell):.3f}", f"{cell.achieved:.4f}", f"{cell.seconds:.1f}"]
            lines.append(row)
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def draw(self, folder: str | Path) -> None:
        """Draw ``perplexity.png``, ``sparsities.png`` and, if plans were refined, ``search.png``.

        :raises ImportError: if matplotlib is not installed
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError(
                "drawing a comparison needs matplotlib: pip install 'dlp_plugin[plot]'"
            ) from None
        methods = self._values("method")

        def panels(
            file: str, label: str, fields: list[Any], draw: Callable[[Any, Any], Any]
        ) -> None:
            figure = Figure(figsize=(2 + 4 * len(fields), 4.5), layout="constrained")
            grid = figure.subplots(1, len(fields), sharey=True, squeeze=False)[0]
            for axes, field in zip(grid, fields, strict=True):
                draw(axes, field)
            grid[0].set_ylabel(label)
            figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right center")
            with replacing(Path(folder) / file) as beside:
                figure.savefig(beside, dpi=150)

        def perplexities(axes: Any, pruner: str) -> None:
            for method in methods:
                cells = [c for c in self.cells if (c.method, c.pruner) == (method, pruner)]
                axes.plot(
                    [cell.target for cell in cells],
                    [cell.perplexity for cell in cells],
                    marker="o",
                    label=method,
                )
            axes.axhline(self.dense, color="black", linestyle="--", label="dense")
            axes.set(title=pruner, xlabel="sparsity", yscale="log")

        def sparsities(axes: Any, target: str) -> None:
            for method in methods:
                blocks = self.plans[method][target].blocks
                axes.plot([block.sparsity for block in blocks], marker=".", label=method)
            axes.set(title=f"target {target}", xlabel="block", ylim=(0, 1))

        def searches(axes: Any, target: str) -> None:
            for method in refined:
                path = self.plans[method][target].search
                axes.plot(
                    [step.evaluations for step in path],
                    [step.divergence for step in path],
                    label=method,
                )
            axes.set(title=f"target {target}", xlabel="pruned models measured", ylim=(0, None))

        refined = [m for m in methods if any(plan.search for plan in self.plans[m].values())]
        if refined:
            label = "divergence from dense (nats per token)"
            panels("search.png", label, self._values("target"), searches)
        panels("perplexity.png", "perplexity", self._values("pruner"), perplexities)
        panels("sparsities.png", "sparsity", self._values("target"), sparsities)

    def _ratio(self, cell: Cell) -> float:
        return cell.perplexity / (self.dense or math.nan)

    def _values(self, field: str) -> list[Any]:
        return list(dict.fromkeys(getattr(cell, field) for cell in self.cells))

    def save(self, path: str | Path) -> None:
        """Write all as JSON; the file appears whole or not at all."""
        with replacing(path) as beside:
            beside.write_text(self.model_dump_json(indent=1) + "\n")


def compare(
    model: str,
    calibration: Mapping[str, Any],
    windows: Sequence[torch.Tensor],
    folder: str | Path,
    *,
    methods: Sequence[str],
    sparsities: Sequence[float | str],
    pruners: Sequence[str] = ("wanda",),
    generations: int = 0,
    report: Callable[[Cell], Any] = lambda _: None,
) -> Comparison:
    """Prune a model by every method, at every sparsity, with every pruner, and measure it.

    ``results.json`` in ``folder`` is written anew after every plan and cell; what it holds
    already is not made or measured again, and a search goes on where it was.

    :param model: a causal language model, as ``oneshot()`` takes it: a folder or an id on the hub
    :param calibration: ``oneshot()``'s arguments that say what to calibrate on, with a
        ``dataset`` of token ids
    :param windows: test text, int64 ``[tokens]`` each, as
        :func:`dlp_plugin.evaluation.text.token_windows` cuts it
    :param methods: as :func:`method_named` takes them
    :param sparsities: targets as :func:`target_named` takes them
    :param generations: of the search, for the methods that are refined
    :param report: called with every cell that is measured now
    :return: what was asked for, of all that ``results.json`` holds
    :raises ValueError: if an argument is amiss, or the folder holds results of another model
        or other data
    """
    asked = dict(method_named(text, generations) for text in methods)
    targets = sorted({target_named(one) for one in sparsities}, key=_sparsity_and_structure)
    if unknown := [pruner for pruner in pruners if pruner not in PRUNERS]:
        raise ValueError(f"there is no pruner {unknown[0]!r}; there are {', '.join(PRUNERS)}")
    path = Path(folder) / "results.json"
    found = _loaded(path, _subject(model, calibration, windows))
    path.parent.mkdir(parents=True, exist_ok=True)
    if found.dense is None:
        dense = load_model(model)
        check_causal(dense, "compare measures perplexity")
        found.dense, _ = _measured(dense, windows)
        found.save(path)

    def keep(method: str, target: str, plan: Plan) -> None:
        found.plans.setdefault(method, {})[target] = plan
        found.save(path)

    planned = {(method, target) for method, plans in found.plans.items() for target in plans}
    missing = [pair for pair in product(asked, targets) if pair not in planned]
    if missing:
        scoring = _Scoring()
        scoring._wanted = [(method, asked[method], target) for method, target in missing]
        scoring._keep, scoring._search = keep, path.with_name("search.json")
        _let_go(apply_recipe(model, scoring, **calibration))

    for pruner, target, method in product(dict.fromkeys(pruners), targets, asked):
        if found.cell(method, target, pruner) is None:
            plan = found.plans[method][target]
            started = time.perf_counter()
            pruned = apply_recipe(model, recipe_of(plan, pruner), **calibration)
            value, achieved = _measured(pruned, windows, plan)
            cell = Cell(
                method=method,
                target=target,
                pruner=pruner,
                perplexity=value,
                achieved=achieved,
                seconds=time.perf_counter() - started,
            )
            found.cells.append(cell)
            found.save(path)
            report(cell)
    return found.only(asked, targets, dict.fromkeys(pruners))


def _measured(
    model: Any, windows: Sequence[torch.Tensor], plan: Plan | None = None
) -> tuple[float, float]:
    """Perplexity, and sparsity of what a plan prunes, of a model that is used up."""
    # oneshot() leaves it to visit the GPU at every use
    model = remove_dispatch(model).to(compute_device())
    value = perplexity(model, windows)
    blocks = [] if plan is None else [block.name for block in plan.blocks]
    unseen = () if plan is None else plan.unseen
    pruned = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and outer_block(name, blocks) and name not in unseen
    ]
    zeros = sum(int((weight == 0).sum()) for weight in pruned)
    achieved = zeros / max(sum(weight.numel() for weight in pruned), 1)
    _let_go(model)
    return value, achieved


def _let_go(model: torch.nn.Module) -> None:
    """Free a model's weights: the host's tracing keeps every model alive."""
    remove_dispatch(model).to("meta")


def _subject(
    model: str, calibration: Mapping[str, Any], windows: Sequence[torch.Tensor]
) -> dict[str, str]:
    """All that a figure depends on but method, target and pruner."""

    def digest(content: object) -> str:
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    config = load_config(model)
    files = sorted(Path(model).glob("*.safetensors")) + sorted(Path(model).glob("*.bin"))
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    others = {k: repr(v) for k, v in calibration.items() if k not in ("tokenizer", "dataset")}
    device = compute_device()
    native = config.dtype is None or is_native(config.dtype, device)
    return {
        "model": model,
        "weights": digest([config.to_json_string(), getattr(config, "_commit_hash", ""), weights]),
        "calibration data": digest([calibration["dataset"].to_dict(), others]),
        "test data": digest([window.tolist() for window in windows]),
        "device": f"{device}" + ("" if native else ", in float32"),
        **package_versions(),
    }


def _loaded(path: Path, subject: dict[str, str]) -> Comparison:
    """What an earlier run left, if it is of the same subject."""
    if not path.exists():
        return Comparison(subject=subject)
    try:
        found = Comparison.model_validate_json(path.read_text())
    except ValueError:
        raise ValueError(
            f"{path} holds no comparison, or one of another version; name another folder"
        ) from None
    if differing := [key for key in subject if found.subject.get(key) != subject[key]]:
        raise ValueError(
            f"{path.parent} holds a comparison that differs in: {', '.join(differing)}; name "
            f"another folder, or delete {path} to measure all anew"
        )
    return found


class _Scoring(AllocationModifier):
    """One pass of the dense model for many methods; makes plans and prunes nothing."""

    _wanted: list[tuple[str, AllocationModifier, str]] = PrivateAttr(default_factory=list)
    _keep: Callable[[str, str, Plan], None] = PrivateAttr()
    _search: Path = PrivateAttr()
    _scorers: dict[str, AllocationModifier] = PrivateAttr(default_factory=dict)
    _values: dict[tuple[str, int], float] = PrivateAttr(default_factory=dict)

    @property
    def _runs_data(self) -> bool:
        return True

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Find the blocks, and in them the Linears that a stage on all Linears prunes."""
        self._match(state.model, [], kwargs.get("sequential_targets"))
        for structure in {target for _, _, target in self._wanted if ":" in target}:
            for block in self._blocks:
                remedy = f"leave {structure} out of the sparsities"
                check_columns(block.linears, split_structure(structure)[1], remedy)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Run the samples and plan, for methods that judge on a share of them first."""
        if self._passing:
            return
        self._passing = True
        batches = scoring_batches(state.data.calib or ())
        judging = [wanted for wanted in self._wanted if wanted[1]._judges]
        if judging:
            batches, self._judging = split(batches)
            self._pass(state.model, batches, judging)
            batches = self._judging  # the norms go on from what they are
        if fixed := [wanted for wanted in self._wanted if not wanted[1]._judges]:
            self._pass(state.model, batches, fixed)
        self._blocks = []  # the host's own epoch, which follows, has nothing to score

    def _pass(
        self,
        model: torch.nn.Module,
        batches: list[Batch],
        wanted: list[tuple[str, AllocationModifier, str]],
    ) -> None:
        """Run batches, score on all that ran so far, and make the plans."""
        self._scorers = {scorer.statistic_name: scorer for _, scorer, _ in wanted}
        self._scored.clear()
        for block in self._blocks:
            for name, linear in block.linears.items():
                self.register_hook(linear, partial(self._record, name), "forward_pre")
        host.run_once(model, batches)
        self.remove_hooks()
        for block in self._blocks:
            if block.name not in self._scored:
                self._score(block)

        blocks = [block.without(self._unseen[block.name]) for block in self._blocks]
        trial = self._trial(model, blocks)
        for method, scorer, target in wanted:
            statistic = scorer.statistic_name
            sparsity, structure = _sparsity_and_structure(target)
            make = partial(
                Plan.make,
                [(b.name, b.weights, self._values[statistic, i]) for i, b in enumerate(blocks)],
                method=scorer.method,
                model=getattr(model, "name_or_path", "") or type(model).__name__,
                statistic=statistic,
                target=sparsity,
                mask_structure=structure,
                unseen=[name for block in self._blocks for name in self._unseen[block.name]],
            )
            strength = scorer.strength
            if strength == "auto":
                plan = choose_strength(trial, make, blocks)
            else:
                plan = make(alpha=strength)
            if scorer.refine:
                plan = refine(
                    trial,
                    plan,
                    blocks,
                    generations=scorer.refine,
                    seed=scorer.seed,
                    progress_path=self._search,
                )
            self._keep(method, target, plan)
            forget(self._search)

    def score(self, depth: int, parts: Mapping[str, Part]) -> float:
        """Score a block by every method there is."""
        for statistic, scorer in self._scorers.items():
            self._values[statistic, depth] = scorer.score(depth, parts)
        return 0.0
