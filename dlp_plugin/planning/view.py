"""A plan as a table, as text and as a picture."""

from __future__ import annotations

import re
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dlp_plugin.files import replacing
from dlp_plugin.planning.plan import BlockPlan, Plan

__all__ = ["check_drawable", "plot", "table", "text"]


_EXPERT = re.compile(r"(?P<layer>(.*\.)?experts)\.(?P<number>\d+)\.")
# Sparsity of an expert from which on next to nothing of it is left.
_EMPTY = 0.95


def table(plan: Plan) -> Table:
    """Make a table of a plan.

    For a refined plan it shows the range of each block's Linears instead of the scores.

    :param plan: to show
    :return: a table for the terminal (rich)
    """
    rows = Table(
        title=f"{plan.scored_by.title} plan for {escape(plan.model)}", caption=_caption(plan)
    )
    # A search moves sparsities away from what the scores asked for.
    why = ("sparsity of Linears",) if plan.search else ("score", "importance")
    for column in ("block", "weights", *why, "sparsity"):
        rows.add_column(column, justify="left" if column == "block" else "right")
    for block in plan.blocks:
        own = (f"{block.score:.4g}", f"{block.importance:.4f}")
        rows.add_row(
            block.name,
            f"{block.weights:,}",
            *((_spread(block),) if plan.search else own),
            f"{block.sparsity:.4f}{_pattern(plan, block)}",
        )
    rows.add_section()
    rows.add_row("all", f"{plan.weights:,}", *("" for _ in why), f"{plan.sparsity:.4f}")
    return rows


def _spread(block: BlockPlan) -> str:
    """The least and the greatest sparsity of a block's Linears."""
    sparsities = (block.linears or {block.name: block.sparsity}).values()
    return f"{min(sparsities):.2f} to {max(sparsities):.2f}"


def _pattern(plan: Plan, block: BlockPlan) -> str:
    """A block's N:M, where it has one."""
    structure = plan.mask_structure
    if not structure:
        return ""
    sparsities = (block.linears or {block.name: block.sparsity}).values()
    numbers = sorted({structure.number(sparsity) for sparsity in sparsities})
    if len(numbers) > 1:
        return f" ({numbers[0]} to {numbers[-1]}:{structure.m})"
    return f" ({numbers[0]}:{structure.m})"


def _caption(plan: Plan) -> str:
    text = f"target {plan.target:g}, {_strength(plan)}, {plan.scored_by.score_name}"
    if plan.mask_structure:
        text += f"; {plan.mask_structure} on average over all weights, off by {plan.deviation:+.4%}"
    if plan.candidates:
        tried = ", ".join(f"{c.strength:g}: {c.loss:.4f}" for c in plan.candidates)
        text += f"; chosen by loss ({tried})"
    if plan.search:
        first, last = plan.search[0], plan.search[-1]
        text += (
            f"; refined in {last.step} steps, divergence from the dense model "
            f"{first.divergence:.4f} -> {last.divergence:.4f}"
            + ("" if plan.searched_at is None else f" at {plan.searched_at:g}")
        )
    experts = _nearly_empty_experts(plan)
    return text if experts is None else f"{text}\n{experts}"


def _nearly_empty_experts(plan: Plan) -> str | None:
    """Which experts a refined plan leaves next to nothing of; None if it has no experts.

    All count alike: the experts of a model have one shape.
    """
    found: dict[str, dict[int, list[float]]] = {}
    for block in plan.blocks:
        for name, sparsity in (block.linears or {}).items():
            if expert := _EXPERT.match(name):
                layer = found.setdefault(expert["layer"], {})
                layer.setdefault(int(expert["number"]), []).append(sparsity)
    if not found:
        return None
    empty = {
        layer: [n for n, linears in sorted(experts.items()) if fmean(linears) > _EMPTY - 1e-9]
        for layer, experts in found.items()
    }
    some, every = (sum(map(len, each.values())) for each in (empty, found))
    text = f"whole experts at {_EMPTY:.0%} sparsity or more: {some} of {every}, "
    text += f"{some / every:.1%} of the experts' weights"
    where = [f"{layer}: {', '.join(map(str, n))}" for layer, n in empty.items() if n]
    return escape("; ".join([text, *where]))


def _strength(plan: Plan) -> str:
    return f"{plan.scored_by.strength_field} {plan.strength:g}"


def text(plan: Plan) -> str:
    """Write the table of a plan as plain text.

    :param plan: to show
    :return: the text
    """
    written = StringIO()
    Console(file=written, width=100).print(table(plan))
    return written.getvalue().rstrip()


def check_drawable(what: str) -> None:
    """Check that matplotlib is installed.

    :param what: to be drawn, for the error
    :raises ImportError: if matplotlib is not installed
    """
    if find_spec("matplotlib") is None:
        raise ImportError(f"drawing {what} needs matplotlib: pip install 'dlp_plugin[plot]'")


def plot(plan: Plan, path: str | Path) -> None:
    """Draw sparsity and score over depth.

    :param plan: to draw
    :param path: file to write; its suffix chooses the format, e.g. ``plan.png``
    :raises ValueError: if ``path`` has no suffix
    :raises ImportError: if matplotlib is not installed
    """
    if not Path(path).suffix:
        raise ValueError(f"{path} has no suffix to tell the format; name it {path}.png")
    check_drawable("a plan")
    from matplotlib.figure import Figure

    depth = range(len(plan.blocks))
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(depth, [b.sparsity for b in plan.blocks], color="#4c72b0")
    axes.axhline(plan.target, color="black", linewidth=1, linestyle="--")
    axes.set_xlabel("block")
    axes.set_ylabel("sparsity (bars; dashed: target)")
    axes.set_ylim(0, 1)
    axes.set_title(
        f"{plan.model}: {plan.scored_by.title}, target "
        f"{plan.mask_structure or format(plan.target, 'g')}, {_strength(plan)}"
    )
    scores = axes.twinx()
    scores.plot(depth, [b.score for b in plan.blocks], color="#c44e52", marker="o")
    scores.set_ylabel(f"score ({plan.scored_by.score_name}; line)")
    scores.set_ylim(bottom=0)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=150)
