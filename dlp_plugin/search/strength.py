"""The strength of a method, selected by the pruned model's loss on held-out samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from loguru import logger

from dlp_plugin.planning.methods import Method
from dlp_plugin.planning.plan import Candidate, Plan
from dlp_plugin.scoring.blocks import Block
from dlp_plugin.search.judge import Judge
from dlp_plugin.search.linears import sparsities_of

__all__ = ["HALF_RANGES", "choose_strength"]

# Half ranges of the sparsities to try. Each is one forward pass over the held-out samples.
HALF_RANGES = (0.0, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3)


def choose_strength(
    judge: Judge, make: Callable[..., Plan], method: Method, blocks: Sequence[Block]
) -> Plan:
    """Select the strength whose pruned model has the least loss on held-out samples.

    Uniform sparsity is one of the candidates. Of equal losses the smaller strength wins.

    :param judge: measures on held-out samples
    :param make: :meth:`Plan.make` with all arguments but ``strength``
    :param method: converts half ranges into strengths
    :param blocks: the plan's blocks, with the Linears that it prunes
    :return: the plan, with all candidates and their losses
    :raises ValueError: if no loss is finite
    """
    uniform = make(strength=0.0)
    scores = [row.score for row in uniform.blocks]
    weights = [row.weights for row in uniform.blocks]
    strengths = [method.strength_of(half, scores, weights, uniform.target) for half in HALF_RANGES]
    plans = [make(strength=strength) for strength in dict.fromkeys(strengths)]
    logger.info("Trying {} strengths, each on {} held-out tokens", len(plans), judge.tokens)
    losses: list[float] = []
    measured: dict[tuple[float, ...], float] = {}  # with N:M several strengths may give one plan
    for plan in plans:
        sparsities = sparsities_of(plan, blocks)
        key = tuple(sparsities.values())
        if key not in measured:
            measured[key] = judge.loss(sparsities, plan.mask_structure)
        losses.append(measured[key])
        logger.info(
            "{} {:g}: loss {:.4f} of the pruned model",
            method.strength_field,
            plan.strength,
            losses[-1],
        )
    if not any(math.isfinite(loss) for loss in losses):
        raise ValueError(
            "the loss of the pruned model is not finite at any strength: check the "
            "calibration data, or lower the sparsity"
        )
    best = min(range(len(plans)), key=lambda i: (not math.isfinite(losses[i]), losses[i]))
    candidates = tuple(
        Candidate(strength=plan.strength, loss=loss)
        for plan, loss in zip(plans, losses, strict=True)
        if math.isfinite(loss)
    )
    return plans[best].model_copy(update={"candidates": candidates})
