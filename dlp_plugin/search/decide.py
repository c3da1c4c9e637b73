"""From scores to a plan: with a given or selected strength, refined if asked to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from dlp_plugin.planning.methods import Method
from dlp_plugin.planning.plan import Plan
from dlp_plugin.planning.structure import MaskStructure
from dlp_plugin.scoring.blocks import Block
from dlp_plugin.search.evolution import evolve
from dlp_plugin.search.gradient import descend
from dlp_plugin.search.judge import Judge
from dlp_plugin.search.linears import MOST, shifted
from dlp_plugin.search.slopes import Slopes
from dlp_plugin.search.strength import choose_strength

__all__ = ["Search", "decide", "search_offset", "where_to_search"]

Search = Literal["gradient", "evolution"]
"""How a plan is refined: by backward passes of the pruned model, or by random changes."""

# How much lower than the target the sparsity is while a plan is refined, for stages that update the
# remaining weights while they prune, and for stages that repair them afterwards. The search sees
# masks without these updates. At the target such a model is damaged far more than the real one, and
# the search would protect other Linears. Up to the least sparsity masks do little damage.
COMPENSATED, REPAIRED = 0.1, 0.2
LOWEST = 0.5


def search_offset(compensates: bool, repairs: bool) -> float:
    """How much lower than the target the sparsity is while a plan is refined.

    :param compensates: whether the stage updates the remaining weights while it prunes
    :param repairs: whether they are refitted or reconstructed afterwards
    """
    return REPAIRED if repairs else COMPENSATED if compensates else 0.0


def decide(
    method: Method,
    blocks: Sequence[Block],
    scores: Sequence[float],
    judge: Judge | None,
    slopes: Slopes | None,
    *,
    model: str,
    target: float,
    structure: MaskStructure,
    unseen: Sequence[str] = (),
    refine: int = 0,
    offset: float = 0.0,
    search: Search = "gradient",
    seed: int = 0,
    progress_path: str | Path | None = None,
) -> Plan:
    """Make a plan from a method's scores.

    :param method: with its strength and settings
    :param blocks: with the Linears to prune
    :param scores: one per block
    :param judge: measures plans on held-out samples; needed for strength ``auto`` and to refine
    :param slopes: needed to refine by gradient
    :param model: the model's name
    :param target: sparsity over all blocks together
    :param structure: of the masks
    :param unseen: Linears that received no token
    :param refine: steps of the gradient search, or generations of the evolution; 0 for none
    :param offset: how much lower than ``target`` the sparsity is while the plan is refined
    :param search: by gradient or by evolution
    :param seed: of the evolution
    :param progress_path: file to continue an interrupted search from
    :return: the plan at ``target``
    """
    make = partial(
        Plan.make,
        [(b.name, b.weights, score) for b, score in zip(blocks, scores, strict=True)],
        model=model,
        method=method,
        target=target,
        mask_structure=structure,
        unseen=unseen,
    )
    if judge is None:
        return make()
    with judge.loaded():
        plan = choose_strength(judge, make, method, blocks) if method.strength == "auto" else make()
        if not refine:
            return plan
        searched_at = where_to_search(target, structure, offset)
        if searched_at != target:
            plan = shifted(plan, blocks, searched_at)
        if search == "gradient":
            assert slopes is not None
            plan = descend(judge, slopes, plan, blocks, steps=refine, progress_path=progress_path)
        else:
            plan = evolve(
                judge, plan, blocks, generations=refine, seed=seed, progress_path=progress_path
            )
    if searched_at == target:
        return plan
    plan = shifted(plan, blocks, target)
    return plan.model_copy(update={"searched_at": searched_at})


def where_to_search(target: float, structure: MaskStructure, offset: float) -> float:
    """The sparsity at which a plan is refined; with N:M it is the target.

    :param target: sparsity over all blocks together
    :param structure: of the masks
    :param offset: how much lower than ``target`` it is, where that is above the least
    """
    if not offset or structure or not LOWEST < target < MOST:
        return target
    return round(max(target - offset, LOWEST), 6)
