"""The cells of ``dlp-plugin compare`` as tables, and what they say. Standard library only."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from layout import number, percent, span, table

METHODS = {"uniform": "uniform", "dlp": "DLP", "owl": "OWL", "linear": "linear"} | {
    "alpha-pruning": "AlphaPruning"
}
STRENGTHS = {"dlp": "alpha", "owl": "lambda", "linear": "beta", "alpha-pruning": "epsilon"}
PRUNERS = {"wanda": "Wanda", "sparsegpt": "SparseGPT", "admm": "ADMM", "magnitude": "Magnitude"}


def method_name(method: str) -> str:
    name, *search = method.split(" ")
    name, _, strength = name.partition(":")
    words = METHODS[name] + (f", {STRENGTHS[name]} {strength}" if strength else "")
    return words + (f", {' '.join(search)}" if search else "")


def pruner_name(pruner: str) -> str:
    name, *repairs = pruner.split("-")
    return ", ".join([PRUNERS[name], *repairs])


def best_in_bold(value: float | None, column: Sequence[float]) -> str:
    shown = "" if value is None else number(value)
    return f"**{shown}**" if value == min(column) else shown


class Cells:
    """The cells of a comparison."""

    def __init__(self, results: dict[str, Any]) -> None:
        """Take what ``record.slimmed`` makes."""
        self.dense, self.strengths = results["dense"], results["strengths"]
        self.decided = results.get("decided", {})
        cells = results["cells"]
        self.values = {(c["pruner"], c["target"], c["method"]): c["perplexity"] for c in cells}
        self.zeros = {
            (c["pruner"], c["target"], c["method"]): c["achieved"] for c in cells if "achieved" in c
        }
        self.costs = {
            pruner: [
                [c[cost] for c in cells if c["pruner"] == pruner and c.get(cost) is not None]
                for cost in ("seconds", "memory")
            ]
            for pruner in dict.fromkeys(c["pruner"] for c in cells)
        }
        self.columns = list(dict.fromkeys((c["pruner"], c["target"]) for c in cells))
        self.methods = list(dict.fromkeys(c["method"] for c in cells))
        self.refined = [method for method in self.methods if " " in method]  # by a search

    def tables(self) -> str:
        """A table per pruner of more than two methods, the best of every column in bold."""
        found = []
        for pruner in dict.fromkeys(pruner for pruner, _ in self.columns):
            targets = [target for one, target in self.columns if one == pruner]
            rows = []
            for method in self.methods:
                if not any((pruner, target, method) in self.values for target in targets):
                    continue
                row = [method_name(method)]
                for target in targets:
                    value = self.values.get((pruner, target, method))
                    column = [
                        v for (p, t, _), v in self.values.items() if (p, t) == (pruner, target)
                    ]
                    row.append(best_in_bold(value, column))
                rows.append(row)
            if len(rows) > 2:
                found.append(table([pruner_name(pruner), *map(percent, targets)], rows))
        return "\n\n".join(found)

    def by_pruner(self, methods: Sequence[str]) -> str:
        """One table, a row per pruner and a column per target and method; the best in bold.

        Behind them what a cell took, over all cells: the median of the seconds, and the least
        memory, as a process that has searched for a plan still holds what that took.
        """
        targets = dict.fromkeys(sorted(target for _, target in self.columns))
        columns = [(target, method) for target in targets for method in methods]
        rows = []
        for pruner, (seconds, memory) in self.costs.items():
            row = [pruner_name(pruner)]
            for target, method in columns:
                value = self.values.get((pruner, target, method))
                column = [v for (_, t, m), v in self.values.items() if (t, m) == (target, method)]
                row.append(best_in_bold(value, column))
            megabytes = f"{min(memory) / 1e6:.0f}" if memory else ""
            rows.append([*row, f"{median(seconds):.0f}", megabytes])
        names = [f"{percent(target)}, {method_name(method)}" for target, method in columns]
        return table(["", *names, "seconds", "peak MB"], rows)

    def ratios(self, method: str, others: Sequence[str], target: str | None = None) -> list[float]:
        """A method's perplexity to the best of others, in every cell or those of a target."""
        ratios = []
        for pruner, one in self.columns:
            value = self.values.get((pruner, one, method))
            found = [self.values[key] for o in others if (key := (pruner, one, o)) in self.values]
            if value is not None and found and target in (None, one):
                ratios.append(value / min(found))
        return ratios

    def times(self) -> str:
        """Seconds to decide, beyond scoring, of what judges pruned models."""
        targets = list(dict.fromkeys(target for _, target in self.columns))
        rows = [
            [method_name(method), *(f"{of[t]:.0f}" if t in of else "" for t in targets)]
            for method in self.methods
            if max((of := self.decided.get(method, {})).values(), default=0) >= 1
        ]
        return table(["seconds to decide", *map(percent, targets)], rows)

    def remarks(self) -> list[str]:
        """What the tables say, counted."""
        lines = []
        for method in self.refined:
            others = [other for other in self.methods if other not in self.refined]
            to_best, to_uniform = self.ratios(method, others), self.ratios(method, ["uniform"])
            lines.append(
                f"{method_name(method)}: better than all that are not searched for in "
                f"{sum(r < 1 for r in to_best)} of {len(to_best)} cells; {span(to_best)} of the "
                f"perplexity of the best of these, {span(to_uniform)} of uniform's."
            )
        if "dlp:auto" in self.methods:
            ratios = self.ratios("dlp:auto", ["uniform"])
            lines.append(
                f"{method_name('dlp:auto')}: no worse than uniform in "
                f"{sum(r <= 1 for r in ratios)} of {len(ratios)} cells on this text; it is never "
                "worse on the samples that it judges by."
            )
        chosen = []
        for method, found in self.strengths.items():
            if method.endswith(":auto"):
                values = [f"{value:.3g} at {percent(target)}" for target, value in found.items()]
                chosen.append(f"{method_name(method)}: {', '.join(values)}")
        if chosen:
            lines.append(f"Chosen were {'; '.join(chosen)}.")
        if self.zeros:
            widest = max(
                max(found) - min(found)
                for column in self.columns
                for found in [[z for key, z in self.zeros.items() if key[:2] == column]]
            )
            lines.append(
                f"Zeros really there differ within a column by at most {100 * widest:.2f} points."
            )
        return lines
