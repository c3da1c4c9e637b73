"""Shows the results of a comparison: as a table for the terminal, as Markdown, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

from rich.markup import escape
from rich.table import Table

from dlp_plugin.comparison.results import Cell, Comparison, Plain, best_of

__all__ = ["markdown", "table", "verdicts"]


def table(found: Comparison) -> Table:
    """Make a table of perplexities and their ratios to the dense model's, the best ones in bold.

    If accuracies were measured, the table shows their mean too.

    :param found: the results
    :return: a table for the terminal (rich)
    """
    model = escape(found.subject["model"])
    caption = [f"in brackets: ratio to the dense model's, {found.dense:.4f}", *verdicts(found)]
    if found.accuracy:
        caption.insert(1, f"acc: mean accuracy; the dense model's is {_mean(found.accuracy)}")
    table = Table(title=f"Perplexity of {model}", caption="\n".join(caption))
    targets = found.values("target")
    hidden = _hidden(found)
    for column in ("pruner", "bits", "method", *targets):
        if column not in hidden:
            table.add_column(column, justify="right" if column in targets else "left")
        if column in targets:
            for more in [each for each in ("acc", "MB") if each not in hidden]:
                table.add_column(more, justify="right")
    for pruner, bits in product(found.values("pruner"), found.values("bits")):
        table.add_section()
        for method in found.values("method"):
            row = [pruner, method] if "bits" in hidden else [pruner, str(bits), method]
            for target in targets:
                cell = found.cell(method, target, pruner, bits)
                row += [_entry(found, cell)]
                row += [] if "acc" in hidden else [_mean(cell.accuracy if cell else {})]
                row += [] if "MB" in hidden else [_megabytes(cell)]
            table.add_row(*row)
    return table


def _entry(found: Comparison, cell: Cell | None) -> str:
    if cell is None:
        return ""
    text = f"{cell.perplexity:.2f} ({found.ratio(cell):.2f})"
    return f"[bold]{text}[/]" if _is_best(found, cell) else text


def _is_best(found: Comparison, cell: Cell) -> bool:
    key = (cell.target, cell.pruner, cell.bits)
    return cell == best_of(c for c in found.cells if (c.target, c.pruner, c.bits) == key)


def _hidden(found: Comparison) -> list[str]:
    """Return the columns to leave out: those without values, and bits if they are always 16."""
    hidden = ["bits"] if found.values("bits") == [16] else []
    hidden += ["MB"] if found.values("bytes") == [None] else []
    return hidden + ([] if found.accuracy else ["acc"])


def _mean(accuracy: Mapping[str, float]) -> str:
    return f"{sum(accuracy.values()) / len(accuracy):.3f}" if accuracy else ""


def _accuracies(found: Comparison, accuracy: Mapping[str, float]) -> dict[str, str]:
    """Return the columns of the tasks and of their mean."""
    if not accuracy:
        return {}
    tasks = {task: accuracy[task] for task in found.accuracy if task in accuracy}
    return {task: f"{value:.3f}" for task, value in tasks.items()} | {"acc": _mean(tasks)}


def _megabytes(measured: Cell | Plain | None) -> str:
    size = None if measured is None else measured.bytes
    return "" if size is None else f"{size / 1e6:.2f}"


def markdown(found: Comparison) -> str:
    """Write all results as a Markdown table; the best of each target, pruner and bits is bold.

    :param found: the results
    :return: Markdown
    """
    names = ["pruner", "target", "bits", "method"]
    figures = ["strength", "perplexity", "ratio", *found.accuracy, "acc", "MB", "zeros"]
    figures += ["seconds to plan", "seconds", "peak MB"]
    whole = {"perplexity": f"{found.dense:.4f}", "ratio": "1"}
    whole |= _accuracies(found, found.accuracy)
    rows = [whole | {"MB": _megabytes(found.plain.get(16))}]
    rows += [
        {
            "bits": str(bits),
            "method": name,
            "perplexity": f"{plain.perplexity:.4f}",
            "ratio": f"{found.ratio(plain):.3f}",
            "MB": _megabytes(plain),
            **_accuracies(found, plain.accuracy),
        }
        for name, bits, plain in found.unpruned
        if bits < 16
    ]
    rows = [{"target": "0", "bits": "16", "method": "dense"} | row for row in rows]
    for cell in found.cells:
        value = f"{cell.perplexity:.4f}"
        name = found.plan_name(cell.method, cell.target, cell.pruner)
        decided = found.decided.get(name, {}).get(cell.target)
        row = {
            "pruner": cell.pruner,
            "target": cell.target,
            "bits": str(cell.bits),
            "method": cell.method,
            "strength": f"{found.plan(cell.method, cell.target, cell.pruner).strength:g}",
            "perplexity": f"**{value}**" if _is_best(found, cell) else value,
            "ratio": f"{found.ratio(cell):.3f}",
            **_accuracies(found, cell.accuracy),
            "MB": _megabytes(cell),
            "zeros": f"{cell.achieved:.4f}",
            "seconds to plan": "" if decided is None else f"{decided:.1f}",
            "seconds": f"{cell.seconds:.1f}",
            "peak MB": "" if cell.memory is None else f"{cell.memory / 1e6:.0f}",
        }
        rows.append(row)
    shown = [column for column in (*names, *figures) if column not in _hidden(found)]
    rule = ["---" if column in names else "---:" for column in shown]
    lines = [shown, rule, *([row.get(column, "") for column in shown] for row in rows)]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text + "".join(f"\n{sentence}\n" for sentence in verdicts(found))


def verdicts(found: Comparison) -> list[str]:
    """Compare pruned models with the quantized dense models by size and perplexity.

    :param found: the results
    :return: a few sentences for every quantized dense model
    """
    cells = [cell for cell in found.cells if cell.bytes is not None]
    sentences = []
    for name, bits, plain in found.unpruned:
        if bits == 16 or not cells:
            continue
        fits = [cell for cell in cells if (cell.bytes or 0) <= plain.bytes]
        worse = [c for c in cells if c not in fits and not c.perplexity < plain.perplexity]
        text = f"Plain {bits} bits{name.removeprefix('dense')}: {_figures(plain)}. "
        if best := best_of(fits):
            share = best.perplexity / plain.perplexity
            text += (
                f"The best pruned model that is no larger has {_figures(best)}, {share:.3f} times "
                f"the perplexity ({best.method} at {best.target}, {best.pruner}, {best.bits} "
                "bits). "
            )
        else:
            text += f"No pruned model {'of finite perplexity ' if fits else ''}is as small. "
        sentences.append(
            f"{text}Of {len(cells)} pruned models {len(worse)} are larger and not better."
        )
    return sentences


def _figures(measured: Cell | Plain) -> str:
    return f"{measured.perplexity:.4f} in {_megabytes(measured)} MB"
