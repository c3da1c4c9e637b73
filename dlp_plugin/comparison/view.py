"""A comparison as a table, as Markdown and in pictures."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from dlp_plugin.comparison.results import Cell, Comparison
from dlp_plugin.files import replacing
from dlp_plugin.planning.plan import Plan

__all__ = ["draw", "markdown", "table"]


def table(found: Comparison) -> Table:
    """Perplexity and its ratio to dense for the terminal (rich), the best in bold."""
    model = escape(found.subject["model"])
    caption = f"in brackets: times the dense model's, {found.dense:.4f}"
    table = Table(title=f"Perplexity of {model}", caption=caption)
    targets = found.values("target")
    for column in ("pruner", "method", *targets):
        table.add_column(column, justify="right" if len(table.columns) > 1 else "left")
    for pruner in found.values("pruner"):
        table.add_section()
        for method in found.values("method"):
            cells = [found.cell(method, target, pruner) for target in targets]
            table.add_row(pruner, method, *(_entry(found, cell) for cell in cells))
    return table


def _entry(found: Comparison, cell: Cell | None) -> str:
    if cell is None:
        return ""
    text = f"{cell.perplexity:.2f} ({found.ratio(cell):.2f})"
    return f"[bold]{text}[/]" if cell == found.best(cell.target, cell.pruner) else text


def markdown(found: Comparison) -> str:
    """All figures as a table in Markdown, the best at each sparsity in bold."""
    lines = [
        [
            "pruner",
            "target",
            "method",
            "strength",
            "perplexity",
            "ratio",
            "zeros",
            "to decide",
            "seconds",
        ],
        ["---"] * 3 + ["---:"] * 6,
        ["", "0", "dense", "", f"{found.dense:.4f}", "1", "", "", ""],
    ]
    for cell in found.cells:
        value = f"{cell.perplexity:.4f}"
        if cell == found.best(cell.target, cell.pruner):
            value = f"**{value}**"
        strength = f"{found.plan(cell.method, cell.target, cell.pruner).strength:g}"
        row = [cell.pruner, cell.target, cell.method, strength, value]
        row += [f"{found.ratio(cell):.3f}", f"{cell.achieved:.4f}"]
        name = found.plan_name(cell.method, cell.pruner)
        decided = found.decided.get(name, {}).get(cell.target)
        row += ["" if decided is None else f"{decided:.1f}", f"{cell.seconds:.1f}"]
        lines.append(row)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(found: Comparison, folder: str | Path) -> None:
    """Draw ``perplexity.png``, ``sparsities.png`` and, if plans were refined, ``search.png``.

    :raises ImportError: if matplotlib is not installed
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "drawing a comparison needs matplotlib: pip install 'dlp_plugin[plot]'"
        ) from None
    methods = found.values("method")

    def panels(file: str, label: str, fields: list[Any], draw: Callable[[Any, Any], Any]) -> None:
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
            cells = [c for c in found.cells if (c.method, c.pruner) == (method, pruner)]
            axes.plot(
                [cell.target for cell in cells],
                [cell.perplexity for cell in cells],
                marker="o",
                label=method,
            )
        axes.axhline(found.dense, color="black", linestyle="--", label="dense")
        axes.set(title=pruner, xlabel="sparsity", yscale="log")

    def sparsities(axes: Any, target: str) -> None:
        for name, plan in plans_at(target).items():
            axes.plot([block.sparsity for block in plan.blocks], marker=".", label=name)
        axes.set(title=f"target {target}", xlabel="block", ylim=(0, 1))

    def searches(axes: Any, target: str) -> None:
        for name, plan in plans_at(target).items():
            if plan.search:
                axes.plot(
                    [step.tokens for step in plan.search],
                    [step.divergence for step in plan.search],
                    label=name,
                )
        axes.set(title=f"target {target}", xlabel="tokens run", ylim=(0, None))

    def plans_at(target: str) -> dict[str, Plan]:
        shown = product(methods, found.values("pruner"))
        names = dict.fromkeys(found.plan_name(*pair) for pair in shown)
        return {name: found.plans[name][target] for name in names if target in found.plans[name]}

    if any(plan.search for target in found.values("target") for plan in plans_at(target).values()):
        label = "divergence from dense (nats per token)"
        panels("search.png", label, found.values("target"), searches)
    panels("perplexity.png", "perplexity", found.values("pruner"), perplexities)
    panels("sparsities.png", "sparsity", found.values("target"), sparsities)
