"""Sparsities of single Linears by descent: every step one backward pass of the pruned model.

One backward pass gives the cost of pruning one more weight (:mod:`dlp_plugin.search.slopes`) for
all Linears. Sparsity falls where the cost is above the mean, and rises where it is below; one shift
for all keeps the total. The result is the plan that was best on held-out samples, the starting
plan included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated

from loguru import logger
from pydantic import Field, FiniteFloat

from dlp_plugin.planning.plan import Plan, SearchStep
from dlp_plugin.planning.structure import balanced, whole_numbers
from dlp_plugin.scoring.blocks import Block
from dlp_plugin.search.judge import Judge
from dlp_plugin.search.linears import project, refined, sparsities_of
from dlp_plugin.search.progress import Progress, digest, write
from dlp_plugin.search.slopes import Slopes

__all__ = ["descend", "stepped"]

# Tokens of a step, and how far the first moves a Linear of usual slope; later ones move less.
TOKENS = 1024
RATE = 0.04
MOMENTUM = 0.7
# A slope counts by its root, and at most so many times as much as the median one.
STEEPEST = 2.0
# How often the plan is measured on held-out samples.
MEASURED = 4


def descend(
    judge: Judge,
    slopes: Slopes,
    plan: Plan,
    blocks: Sequence[Block],
    *,
    steps: int,
    progress_path: str | Path | None = None,
) -> Plan:
    """Improve a plan at constant total, in nats of divergence from the dense model.

    :param judge: measures on held-out samples
    :param slopes: of the same model and masks, on the samples of the steps
    :param plan: to start from
    :param blocks: the plan's blocks, in its order, with the Linears that it prunes
    :param steps: at least 1
    :param progress_path: file of the search's state, from which an interrupted search continues;
        :func:`dlp_plugin.search.progress.forget` removes it once the plan is written
    :return: the plan with a sparsity for every Linear and the path of the search
    :raises ValueError: if the divergence of the given plan is not finite
    """
    descent = _Descent(judge, slopes, plan, blocks, steps)
    if not descent.go_on(progress_path):
        descent.begin()
    for step in range(descent.done + 1, steps + 1):
        descent.advance(step)
        write(progress_path, descent.progress)
    return refined(plan, blocks, descent.best, descent.path)


class _Descent:
    """A descent: its current sparsities, and the best that were measured so far."""

    def __init__(
        self, judge: Judge, slopes: Slopes, plan: Plan, blocks: Sequence[Block], steps: int
    ) -> None:
        self._judge = judge
        self._slopes = slopes
        self._plan = plan
        self._steps = steps
        self._measurements = min(MEASURED, steps)
        self._weights = {name: size for block in blocks for name, size in block.sizes.items()}
        self._latent = sparsities_of(plan, blocks)  # before rounding to whole N
        self._velocity = dict.fromkeys(self._latent, 0.0)
        self.best = dict(self._latent)
        self.path: list[SearchStep] = []
        self.done = 0
        self._tokens = 0
        self._fingerprint = digest([plan.model_dump(mode="json"), steps, judge.fingerprint])

    def begin(self) -> None:
        """Measure the plan to refine.

        :raises ValueError: if its divergence is not finite
        """
        logger.info(
            "Refining: {} steps of about {} tokens, measured {} times on {} held-out tokens",
            self._steps,
            TOKENS,
            self._measurements,
            self._judge.tokens,
        )
        if not math.isfinite(self._measured()):
            raise ValueError(
                "the divergence of the plan to refine is not finite: load the model in a wider "
                "dtype, lower the sparsity, or leave out refine"
            )

    def go_on(self, progress_path: str | Path | None) -> bool:
        """Continue an interrupted search with the same start, samples and steps; gives whether."""
        state = _Progress.load(progress_path, self._fingerprint, [list(self._weights)] * 3)
        if state is None:
            return False
        self._latent, self._velocity = state.sparsities, state.velocity
        self.best, self.path, self.done = state.best, state.steps, state.done
        self._tokens = state.tokens
        logger.info("The search continues from step {}", self.done)
        return True

    @property
    def progress(self) -> _Progress:
        """The state to continue from."""
        return _Progress(
            fingerprint=self._fingerprint,
            sparsities=self._latent,
            velocity=self._velocity,
            best=self.best,
            steps=self.path,
            done=self.done,
            tokens=self._tokens,
        )

    def advance(self, step: int) -> None:
        """Take one step, and measure every few of them."""
        portion = self._slopes.portion(step - 1, TOKENS)
        costs, tokens = self._slopes.at(self._rounded(), portion, self._plan.mask_structure)
        self._tokens += 4 * tokens  # dense, pruned, and a backward pass, which counts twice
        rate = RATE * (1 - (step - 1) / self._steps)
        for name, move in stepped(costs, self._weights).items():
            self._velocity[name] = MOMENTUM * self._velocity[name] + move
            self._latent[name] -= rate * self._velocity[name]
        self._latent = project(self._latent, self._weights, self._plan.target)
        self.done = step
        if step * self._measurements % self._steps < self._measurements:
            self._measured(step)
            logger.info(
                "step {} of {}: divergence {:.4f}, {} tokens run",
                step,
                self._steps,
                self.path[-1].divergence,
                self._tokens,
            )

    def _rounded(self) -> dict[str, float]:
        """The sparsities, as whole N where there is a structure."""
        structure = self._plan.mask_structure
        if not structure:
            return self._latent
        sizes = list(self._weights.values())
        numbers = whole_numbers(list(self._latent.values()), sizes, structure)
        numbers = balanced(numbers, sizes, structure)
        return {name: n / structure.m for name, n in zip(self._latent, numbers, strict=True)}

    def _measured(self, step: int = 0) -> float:
        """Measure the divergence on held-out samples; record it, and the best so far."""
        sparsities = self._rounded() if step else self._latent
        found = self._judge.divergence(sparsities, structure=self._plan.mask_structure)
        self._tokens += self._judge.tokens
        if not math.isfinite(found):
            return found
        if not self.path or found < self.path[-1].divergence:
            self.best = dict(sparsities)
        least = found if not self.path else min(found, self.path[-1].divergence)
        evaluations = self.path[-1].evaluations + 1 if self.path else 1
        self.path.append(
            SearchStep(step=step, evaluations=evaluations, tokens=self._tokens, divergence=least)
        )
        return found


class _Progress(Progress):
    """How far a descent is.

    :param velocity: of every Linear's sparsity
    :param best: the sparsities that were measured best
    :param done: steps taken
    :param tokens: tokens run
    """

    velocity: dict[str, FiniteFloat]
    best: dict[str, Annotated[float, Field(ge=0, le=1)]]
    done: int = Field(ge=0)
    tokens: int = Field(ge=0)

    def names(self) -> list[list[str]]:
        """Of the Linears, each time."""
        return [*super().names(), list(self.velocity), list(self.best)]


def stepped(costs: Mapping[str, float], weights: Mapping[str, int]) -> dict[str, float]:
    """How far each Linear's sparsity is lowered, in units of the median slope.

    ``sign(z) min(sqrt(|z| / median |z|), 2)`` of ``z = cost - mean cost``, the mean by numbers of
    weights: costs of 1, 3 and 11 in Linears of equal size have the mean 5, ``z`` is -4, -2 and 6,
    and the moves are -1, -0.71 and 1.22.

    :param costs: full name to slope of the loss over the sparsity of every Linear
    :param weights: full name to number of weights of every Linear
    """
    mean = math.fsum(weights[n] * cost for n, cost in costs.items()) / sum(weights.values())
    apart = {name: cost - mean for name, cost in costs.items()}
    usual = median(map(abs, apart.values()))
    if usual == 0:
        return dict.fromkeys(costs, 0.0)
    return {
        name: math.copysign(min(math.sqrt(abs(z) / usual), STEEPEST), z)
        for name, z in apart.items()
    }
