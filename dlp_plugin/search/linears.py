"""The sparsities of single Linears: read off a plan, and put into one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dlp_plugin.planning.plan import Plan, SearchStep
from dlp_plugin.scoring.blocks import Block

__all__ = ["refined", "sparsities_of"]


def sparsities_of(plan: Plan, blocks: Sequence[Block]) -> dict[str, float]:
    """Sparsity of every Linear by a plan.

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
    """A plan with other sparsities, and how a search came to them.

    :param sparsities: full name to sparsity of every Linear, of the same total
    """
    rows = []
    for row, block in zip(plan.blocks, blocks, strict=True):
        linears = {name: sparsities[name] for name in block.linears}
        pruned = math.fsum(block.sizes[name] * sparsity for name, sparsity in linears.items())
        sparsity = min(max(pruned / row.weights, 0.0), 1.0)
        rows.append(row.model_copy(update={"linears": linears, "sparsity": sparsity}))
    return plan.model_copy(update={"blocks": tuple(rows), "search": tuple(path)})
