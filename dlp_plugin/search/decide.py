"""From scores to a plan: the strength as given or chosen, refined if asked to."""

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

__all__ = ["Search", "decide", "where_judged", "where_to_search"]

Search = Literal["gradient", "evolution"]
"""How a plan is refined: by backward passes of the pruned model, or by trial and error."""

# How much less is pruned while a plan is refined, where what stays will make up for what goes, and
# where it will be repaired besides: a search at the target spares what a model needs that masks
# alone have wrecked, which these stages do not. Below the least sparsity nothing is wrecked.
COMPENSATED, REPAIRED = 0.1, 0.2
LOWEST = 0.5


def where_judged(compensates: bool, repairs: bool) -> float:
    """How much less is pruned while a plan is refined.

    :param compensates: whether what stays makes up for what goes, while it is pruned
    :param repairs: whether it is repaired afterwards
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
    easier: float = 0.0,
    search: Search = "gradient",
    seed: int = 0,
    progress_path: str | Path | None = None,
) -> Plan:
    """Make the plan that a method's scores ask for.

    :param blocks: with the Linears that are to be pruned
    :param scores: one per block
    :param judge: needed where the strength is ``auto`` or the plan is refined
    :param slopes: needed where the plan is refined by gradient
    :param model: the model's name
    :param target: sparsity over all blocks together
    :param unseen: Linears that saw no token
    :param refine: steps of the gradient, or generations of the evolution; 0 for none
    :param easier: how much less than ``target`` may be pruned while a plan is refined
    :param seed: of the evolution
    :param progress_path: file for how far the search is
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
        searched_at = where_to_search(target, structure, easier)
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


def where_to_search(target: float, structure: MaskStructure, easier: float) -> float:
    """The sparsity at which a plan is refined; in N:M it is the target.

    :param easier: how much less than ``target`` may be pruned meanwhile
    """
    if not easier or structure or not LOWEST < target < MOST:
        return target
    return round(max(target - easier, LOWEST), 6)
