"""Refine a plan by evolution: random changes, kept where the pruned model gets better.

Mutations keep the total sparsity, and those with less divergence from the dense model are
selected, as in EvoPress (arXiv 2410.14649). There are two differences: masks are computed from
stored norms, so no database of pruned weights is needed, and mutations are drawn by the measured
cost of each block, not uniformly.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from loguru import logger
from pydantic import FiniteFloat

from dlp_plugin.planning.plan import Plan, SearchStep
from dlp_plugin.planning.structure import MaskStructure
from dlp_plugin.scoring.blocks import Block
from dlp_plugin.search.judge import Judge
from dlp_plugin.search.linears import refined, sparsities_of
from dlp_plugin.search.progress import Progress, digest, write

__all__ = ["evolve"]

# A generation: so many offspring are measured on so many tokens, the best of them on all.
OFFSPRING = 8
SIFTING_TOKENS = 2048
SURVIVORS = 2
# A switch moves weights to be pruned from one unit to another, by these shares of the smaller.
STEPS = (0.02, 0.04, 0.08)
SWITCHES = 3
# How far a measurement moves the estimated cost of pruning a unit, and how many of the
# offspring are drawn blindly.
LEARNING = 0.5
BLIND = 0.25


class _Units:
    """What the search gives sparsities to: blocks, or single Linears."""

    def __init__(
        self,
        members: Mapping[str, list[str]],
        weights: Mapping[str, int],
        structure: MaskStructure,
    ) -> None:
        """Take each unit's Linears, the number of weights of each Linear, and the structure."""
        self.members = members
        self.structure = structure
        self.weights = {
            unit: sum(weights[name] for name in names) for unit, names in members.items()
        }
        self.costs = dict.fromkeys(members, 0.0)  # per weight moved, estimated

    @property
    def can_switch(self) -> bool:
        """Whether weights can be moved: whole N only between units of a size."""
        sizes = list(self.weights.values())
        return not self.structure or len(set(sizes)) < len(sizes)

    def switched(
        self, sparsities: Mapping[str, float], chance: random.Random
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Mutate: move weights to be pruned between units, the total staying the same.

        :return: the Linears' sparsities, and by how many weights each unit has changed
        """
        mutated, moved = dict(sparsities), dict.fromkeys(self.members, 0.0)
        blind = chance.random() < BLIND
        switches = min(chance.randint(1, SWITCHES), chance.randint(1, SWITCHES))
        done = 0
        for _ in range(20 * switches):
            up, down = self._draw(chance, 1, blind), self._draw(chance, -1, blind)
            weights = self._step(chance, self.weights[up], self.weights[down])
            if up != down and self._shift(mutated, up, weights):
                if self._shift(mutated, down, -weights):
                    moved[up] += weights
                    moved[down] -= weights
                    done += 1
                else:
                    self._shift(mutated, up, -weights)
            if done == switches:
                break
        return mutated, moved

    def _step(self, chance: random.Random, up: int, down: int) -> float:
        """Weights to move between two units: in N:M the least that is whole in both."""
        if self.structure:
            return math.lcm(up, down) / self.structure.m
        return chance.choice(STEPS) * min(up, down)

    def _draw(self, chance: random.Random, sign: int, blind: bool) -> str:
        """Draw a unit to prune more (1) or less (-1), cheap or dear ones more often."""
        units = list(self.members)
        if blind:
            return chance.choice(units)
        order = sorted(units, key=lambda unit: sign * self.costs[unit])
        odds = [math.exp(-4 * place / len(order)) for place in range(len(order))]
        return chance.choices(order, odds)[0]

    def _shift(self, sparsities: dict[str, float], unit: str, weights: float) -> bool:
        """Prune so many weights more in a unit, if none of its Linears goes out of range."""
        change = weights / self.weights[unit]
        new = {name: sparsities[name] + change for name in self.members[unit]}
        if m := self.structure.m:
            step = round(change * m)
            numbers = {n: self.structure.number(sparsities[n]) + step for n in new}
            new = {name: number / m for name, number in numbers.items()}
        if not all(0 <= value <= 1 for value in new.values()):
            return False
        sparsities.update(new)
        return True

    def learn(self, moved: Mapping[str, float], gain: float) -> None:
        """Correct the estimated costs by how much a mutation has changed the divergence."""
        norm = math.fsum(weights * weights for weights in moved.values())
        if norm == 0:
            return
        expected = math.fsum(self.costs[unit] * weights for unit, weights in moved.items())
        for unit, weights in moved.items():
            self.costs[unit] += LEARNING * (gain - expected) * weights / norm


def evolve(
    judge: Judge,
    plan: Plan,
    blocks: Sequence[Block],
    *,
    generations: int,
    seed: int = 0,
    progress_path: str | Path | None = None,
) -> Plan:
    """Improve a plan at constant total, in nats of divergence from the dense model.

    The first third of the generations moves whole blocks, the rest single Linears; with N:M
    and blocks all of different size, all move Linears. The same seed gives the same plan.

    :param judge: measures on held-out samples
    :param plan: to start from
    :param blocks: the plan's blocks, in its order, with the Linears that it prunes
    :param generations: at least 1
    :param seed: of the random changes
    :param progress_path: file of the search's state, from which an interrupted search continues;
        :func:`dlp_plugin.search.progress.forget` removes it once the plan is written
    :return: the plan with a sparsity for every Linear and the path of the search
    :raises ValueError: if the divergence of the given plan is not finite
    """
    search = _Search(judge, plan, blocks, [generations, seed])
    if not search.go_on(progress_path):
        search.begin()
    for generation in range(len(search.steps), generations + 1):
        of_blocks = generation <= generations // 3 and search.levels[0].can_switch
        chance = random.Random(f"{seed} {generation}")
        search.advance(generation, search.levels[0 if of_blocks else 1], chance)
        logger.info(
            "generation {} of {}: divergence {:.4f} after {} evaluations",
            generation,
            generations,
            search.divergence,
            search.evaluations,
        )
        write(progress_path, search.progress())
    return refined(plan, blocks, search.best, search.steps)


class _Search:
    """The best sparsities so far, and what has been measured on the way."""

    def __init__(
        self, judge: Judge, plan: Plan, blocks: Sequence[Block], settings: Sequence[int]
    ) -> None:
        """Take a plan to improve.

        :param settings: what else the path depends on
        """
        self._judge = judge
        self._plan = plan
        self._weights = {name: size for block in blocks for name, size in block.sizes.items()}
        single = {name: [name] for name in self._weights}
        whole = {block.name: list(block.linears) for block in blocks}
        self.levels = [
            _Units(members, self._weights, plan.mask_structure) for members in (whole, single)
        ]
        self._portions = judge.portions(SIFTING_TOKENS)
        self._fingerprint = digest([plan.model_dump(mode="json"), *settings, judge.fingerprint])
        self._known: dict[str, float] = {}  # so that nothing is measured twice
        self.best = sparsities_of(plan, blocks)
        self.evaluations = self._tokens = 0
        self.divergence = math.nan
        self.steps: list[SearchStep] = []
        logger.info(
            "Refining: {} generations of {} changes, each on {} tokens, the best {} on {}",
            settings[0],
            OFFSPRING,
            judge.tokens_in(self._portions[0]),
            SURVIVORS,
            judge.tokens,
        )

    def begin(self) -> None:
        """Measure the plan to refine.

        :raises ValueError: if it is not finite
        """
        self.divergence = self._measured(self.best)
        if not math.isfinite(self.divergence):
            raise ValueError(
                "the divergence of the plan to refine is not finite: load the model in a wider "
                "dtype, lower the sparsity, or leave out refine"
            )
        self._note(0)

    def go_on(self, progress_path: str | Path | None) -> bool:
        """Take up what an interrupted search of the very same start, samples and settings left."""
        names = [list(self._weights), *(list(units.members) for units in self.levels)]
        state = _Progress.load(progress_path, self._fingerprint, names)
        if state is None:
            return False
        self.best, self.steps, self._known = state.sparsities, state.steps, state.known
        last = self.steps[-1]
        self.divergence, self.evaluations = last.divergence, last.evaluations
        self._tokens = last.tokens
        for units, costs in zip(self.levels, state.costs, strict=True):
            units.costs = costs
        logger.info("The search continues from generation {}", last.step)
        return True

    def advance(self, generation: int, units: _Units, chance: random.Random) -> None:
        """Draw offspring of the best, measure them on a portion, and the best of them on all."""
        place = generation % len(self._portions) if len(self._portions) > 1 else None
        here = self._measured(self.best, place)
        sifted: list[tuple[float, dict[str, float]]] = []
        for _ in range(OFFSPRING):
            offspring, moved = units.switched(self.best, chance)
            if not any(moved.values()):
                continue
            found = self._measured(offspring, place)
            if not math.isfinite(found):
                continue
            units.learn(moved, found - here)
            if (found, offspring) not in sifted:
                sifted.append((found, offspring))
        sifted.sort(key=lambda pair: pair[0])
        for _, offspring in sifted[:SURVIVORS]:
            found = self._measured(offspring)
            if found < self.divergence:
                self.best, self.divergence = offspring, found
        self._note(generation)

    def _measured(self, sparsities: Mapping[str, float], place: int | None = None) -> float:
        """Divergence on one of the portions, or on all samples."""
        portion = None if place is None else self._portions[place]
        key = digest([place, list(sparsities.values())])[:16]
        if key not in self._known:
            self.evaluations += 1
            self._tokens += (
                self._judge.tokens if portion is None else self._judge.tokens_in(portion)
            )
            structure = self._plan.mask_structure
            self._known[key] = self._judge.divergence(sparsities, portion, structure)
        return self._known[key]

    def _note(self, generation: int) -> None:
        self.steps.append(
            SearchStep(
                step=generation,
                evaluations=self.evaluations,
                tokens=self._tokens,
                divergence=self.divergence,
            )
        )

    def progress(self) -> _Progress:
        """How far the search is, to go on from."""
        return _Progress(
            fingerprint=self._fingerprint,
            sparsities=self.best,
            steps=self.steps,
            costs=[units.costs for units in self.levels],
            known=self._known,
        )


class _Progress(Progress):
    """How far an evolution is.

    :param costs: of each level's units
    :param known: every divergence measured, by a digest of what it was measured for
    """

    costs: list[dict[str, FiniteFloat]]
    known: dict[str, float]

    def names(self) -> list[list[str]]:
        """Of the Linears, and of each level's units."""
        return [*super().names(), *map(list, self.costs)]
