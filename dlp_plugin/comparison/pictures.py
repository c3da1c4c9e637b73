"""Draws the results of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from dlp_plugin.comparison.results import Cell, Comparison
from dlp_plugin.files import replacing
from dlp_plugin.planning.plan import Plan
from dlp_plugin.planning.view import check_drawable

__all__ = ["draw"]

_LINES = {16: "-", 8: "--", 4: ":"}
_MARKS = {16: "*", 8: "s", 4: "D", 3: "^", 2: "v"}


def draw(found: Comparison, folder: str | Path) -> None:
    """Draw ``perplexity.png`` and ``sparsities.png``.

    Refined plans add ``search.png``, and recorded bytes add ``bytes.png``.

    :param found: the results
    :param folder: to write the pictures to
    :raises ImportError: if matplotlib is not installed
    """
    check_drawable("a comparison")
    from matplotlib.figure import Figure

    def panels(
        file: str, label: str, fields: list[Any], draw: Callable[[Comparison, Any, Any], None]
    ) -> None:
        figure = Figure(figsize=(2 + 4 * len(fields), 4.5), layout="constrained")
        grid = figure.subplots(1, len(fields), sharey=True, squeeze=False)[0]
        for axes, field in zip(grid, fields, strict=True):
            draw(found, axes, field)
        grid[0].set_ylabel(label)
        named: dict[str, Any] = {}
        for axes in grid:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                named.setdefault(label, handle)
        figure.legend(list(named.values()), list(named), loc="outside right center")
        with replacing(Path(folder) / file) as beside:
            figure.savefig(beside, dpi=150)

    pruners, targets = found.values("pruner"), found.values("target")
    if any(plan.search for target in targets for plan in _plans_at(found, target).values()):
        panels("search.png", "divergence from dense (nats per token)", targets, _searches)
    if any(cell.bytes for cell in found.cells):
        panels("bytes.png", "perplexity", pruners, _bytes)
    panels("perplexity.png", "perplexity", pruners, _perplexities)
    panels("sparsities.png", "sparsity", targets, _sparsities)


def _perplexities(found: Comparison, axes: Any, pruner: str) -> None:
    for cells, style in _lines(found, pruner):
        axes.plot([cell.target for cell in cells], [cell.perplexity for cell in cells], **style)
    axes.axhline(found.dense, color="black", linestyle="--", label="dense")
    axes.set(title=pruner, xlabel="sparsity", yscale="log")


def _bytes(found: Comparison, axes: Any, pruner: str) -> None:
    for cells, style in _lines(found, pruner):
        points = [((cell.bytes or 0) / 1e6, cell.perplexity) for cell in cells if cell.bytes]
        axes.plot([size for size, _ in points], [value for _, value in points], **style)
    for name, bits, plain in found.unpruned:
        color = "black" if name == "dense" else "gray"
        style = {"color": color, "linestyle": "", "marker": _MARKS[bits], "markersize": 9}
        label = _named(name, bits)
        axes.plot([plain.bytes / 1e6], [plain.perplexity], label=label, zorder=3, **style)
    best = [(size / 1e6, value) for size, value in found.frontier()]
    drawn = {"color": "lightgray", "linewidth": 6, "zorder": 0, "drawstyle": "steps-post"}
    axes.plot(*zip(*best, strict=True), label="best for the bytes", **drawn)
    axes.set(title=pruner, xlabel="megabytes", yscale="log")


def _lines(found: Comparison, pruner: str) -> Iterator[tuple[list[Cell], dict[str, Any]]]:
    """Yield each line of a picture: the cells of one method and bits, and the line's style."""
    for bits, (place, method) in product(found.values("bits"), enumerate(found.values("method"))):
        key = (method, pruner, bits)
        cells = [cell for cell in found.cells if (cell.method, cell.pruner, cell.bits) == key]
        style = {"color": f"C{place % 10}", "linestyle": _LINES[bits], "marker": "o"}
        yield cells, {"label": _named(method, bits), **style}


def _named(model: str, bits: int) -> str:
    return model if bits == 16 else f"{model}, {bits} bits"


def _sparsities(found: Comparison, axes: Any, target: str) -> None:
    colors = _colors(found)
    for name, plan in _plans_at(found, target).items():
        sparsities = [block.sparsity for block in plan.blocks]
        axes.plot(sparsities, marker=".", label=name, color=colors[name])
    axes.set(title=f"target {target}", xlabel="block", ylim=(0, 1))


def _searches(found: Comparison, axes: Any, target: str) -> None:
    colors = _colors(found)
    for name, plan in _plans_at(found, target).items():
        if plan.search:
            steps = plan.search
            losses = [step.divergence for step in steps]
            axes.plot([step.tokens for step in steps], losses, label=name, color=colors[name])
    axes.axhline(0, color="none")  # so that every panel's axis includes 0
    axes.set(title=f"target {target}", xlabel="tokens run")


def _colors(found: Comparison) -> dict[str, str]:
    """Assign each plan's name a color, the same in every panel."""
    names = [name for target in found.values("target") for name in _plans_at(found, target)]
    return {name: f"C{place % 10}" for place, name in enumerate(dict.fromkeys(names))}


def _plans_at(found: Comparison, target: str) -> dict[str, Plan]:
    shown = product(found.values("method"), [target], found.values("pruner"))
    names = dict.fromkeys(found.plan_name(*each) for each in shown)
    return {name: found.plans[name][target] for name in names if target in found.plans[name]}
