"""A trained mixture of experts: what page.md says of it. Standard library only."""

from itertools import pairwise
from math import exp, log
from typing import Any

from cells import Cells, method_name, pruner_name
from layout import Parts, bullets, number, percent, table

PART = "trained mixture"
REFINED = "dlp:0.15 refined 16"


def trained_mixture(parts: Parts) -> dict[str, str]:
    found = parts.results(PART)
    whole, dense = found["whole"], found["whole"]["dense"]
    whole["cells"].sort(key=lambda cell: cell["target"])
    kept = _best(whole)
    rows, remarks = [], []
    for name, smaller in found.items():
        if not name.startswith("reap"):
            continue
        removed = percent(name.split()[1])
        plain = smaller["plain"]["16"]
        after = [{"method": None, **plain}, *smaller["cells"]]
        for cell in sorted(after, key=lambda cell: -cell["bytes"]):
            row = [f"REAP, {removed} of the experts", _then(cell), f"{cell['bytes'] / 1e6:.2f}"]
            beside = at_bytes(kept, cell["bytes"])
            ratio = cell["perplexity"] / beside
            row += [number(cell["perplexity"]), number(beside), f"{ratio:.2f}"]
            rows.append(row)
            remarks.append(ratio)
    columns = ["", "then", "MB", "perplexity", "without REAP", "ratio"]
    worse = sum(ratio > 1 for ratio in remarks)
    repaired = [
        f"{percent(cell['target'])} {method_name(cell['method'])} {number(cell['perplexity'])}"
        for cell in whole["cells"]
        if cell["pruner"] == "admm-reconstructed"
    ]
    said = (
        f"At equal bytes the plans that keep all experts have the lower perplexity in {worse} of "
        f"{len(remarks)} rows; REAP's is {min(remarks):.2f} to {max(remarks):.2f} times theirs."
    )
    return {
        "mixture dense": number(dense),
        "mixture megabytes": f"{whole['plain']['16']['bytes'] / 1e6:.2f}",
        "mixture tables": Cells(whole).tables(),
        "mixture reap": table(columns, rows),
        "mixture remarks": bullets([said, f"ADMM, reconstructed: {'; '.join(repaired)}."]),
    }


def _then(cell: dict[str, Any]) -> str:
    if cell["method"] is None:
        return ""
    return f"50 %, {pruner_name(cell['pruner'])}, {method_name(cell['method'])}"


def _best(found: dict[str, Any]) -> list[tuple[int, float]]:
    """Bytes and perplexity of the dense model and of what refined plans and ADMM make of it."""
    cells = [
        (cell["bytes"], cell["perplexity"])
        for cell in found["cells"]
        if (cell["pruner"], cell["method"]) == ("admm", REFINED)
    ]
    plain = found["plain"]["16"]
    return sorted([*cells, (plain["bytes"], plain["perplexity"])])


def at_bytes(points: list[tuple[int, float]], size: int) -> float:
    """Perplexity at a size: between two points the logarithm runs straight.

    :raises ValueError: if no two points lie on either side
    """
    for (less, higher), (more, lower) in pairwise(points):
        if less <= size <= more:
            share = (size - less) / (more - less)
            return exp((1 - share) * log(higher) + share * log(lower))
    raise ValueError(f"{size} bytes: measured are {points[0][0]} to {points[-1][0]}")
