"""Sparsities of single Linears, read from a plan and written into one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dlp_plugin.planning.plan import Plan, SearchStep
from dlp_plugin.scoring.blocks import Block

__all__ = ["project", "refined", "shifted", "sparsities_of"]

# Bounds of a Linear's sparsity: none is left dense, and none loses all weights.
LEAST, MOST = 0.05, 0.98


def sparsities_of(plan: Plan, blocks: Sequence[Block]) -> dict[str, float]:
    """Sparsity of every Linear by a plan.

    :param plan: with or without sparsities of Linears
    :param blocks: the plan's blocks, in its order, with the Linears that it prunes
    """
    return {
        name: (row.linears or {}).get(name, row.sparsity)
        for row, block in zip(plan.blocks, blocks, strict=True)
        for name in block.linears
    }


def refined(
    plan: Plan,
    blocks: Sequence[Block],
    sparsities: Mapping[str, float],
    path: Sequence[SearchStep],
) -> Plan:
    """A plan with other sparsities, and the path of the search that found them.

    :param plan: that was searched from
    :param blocks: the plan's blocks, in its order, with the Linears that it prunes
    :param sparsities: full name to sparsity of every Linear, with the same total
    :param path: of the search
    """
    rows = []
    for row, block in zip(plan.blocks, blocks, strict=True):
        linears = {name: sparsities[name] for name in block.linears}
        pruned = math.fsum(block.sizes[name] * sparsity for name, sparsity in linears.items())
        sparsity = min(max(pruned / row.weights, 0.0), 1.0)
        rows.append(row.model_copy(update={"linears": linears, "sparsity": sparsity}))
    return plan.model_copy(update={"blocks": tuple(rows), "search": tuple(path)})


def shifted(plan: Plan, blocks: Sequence[Block], target: float) -> Plan:
    """A plan at another target, with all sparsities shifted alike.

    :param plan: with sparsities of Linears
    :param blocks: the plan's blocks, in its order, with the Linears that it prunes
    :param target: the new sparsity over all blocks together
    """
    sizes = {name: size for block in blocks for name, size in block.sizes.items()}
    sparsities = project(sparsities_of(plan, blocks), sizes, target)
    moved = plan.model_copy(update={"target": target})
    return refined(moved, blocks, sparsities, plan.search)


def project(
    sparsities: Mapping[str, float], weights: Mapping[str, int], target: float
) -> dict[str, float]:
    """Shift all sparsities alike, within bounds, so that their weighted mean is the target.

    Bounds that exclude the target are widened to it.

    :param sparsities: full name to sparsity of every Linear
    :param weights: full name to number of weights of every Linear
    :param target: weighted mean of the sparsities
    :return: full name to sparsity of every Linear
    """
    least, most = min(LEAST, target), max(MOST, target)
    total = sum(weights.values())

    def shifted(shift: float) -> dict[str, float]:
        return {name: min(max(s + shift, least), most) for name, s in sparsities.items()}

    low, high = least - max(sparsities.values()), most - min(sparsities.values())
    for _ in range(100):
        middle = (low + high) / 2
        found = shifted(middle)
        if math.fsum(weights[n] * s for n, s in found.items()) / total < target:
            low = middle
        else:
            high = middle
    return shifted(high)
