"""From scores to a plan: the strength as given or chosen, refined if asked to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dlp_plugin.planning.methods import Method
from dlp_plugin.planning.plan import Plan
from dlp_plugin.planning.structure import MaskStructure
from dlp_plugin.scoring.blocks import Block
from dlp_plugin.search.judge import Judge
from dlp_plugin.search.refine import refine
from dlp_plugin.search.strength import choose_strength

__all__ = ["decide"]


def decide(
    method: Method,
    blocks: Sequence[Block],
    scores: Sequence[float],
    judge: Judge | None,
    *,
    model: str,
    target: float,
    structure: MaskStructure,
    unseen: Sequence[str] = (),
    generations: int = 0,
    seed: int = 0,
    progress_path: str | Path | None = None,
) -> Plan:
    """Make the plan that a method's scores ask for.

    :param blocks: with the Linears that are to be pruned
    :param scores: one per block
    :param judge: needed where the strength is ``auto`` or ``generations`` are asked for
    :param model: the model's name
    :param target: sparsity over all blocks together
    :param unseen: Linears that saw no token
    :param generations: of the search that refines; 0 for none
    :param progress_path: as :func:`dlp_plugin.search.refine.refine` takes it
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
    plan = choose_strength(judge, make, method, blocks) if method.strength == "auto" else make()
    if not generations:
        return plan
    return refine(
        judge,
        plan,
        blocks,
        generations=generations,
        seed=seed,
        progress_path=progress_path,
    )
