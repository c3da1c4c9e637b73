"""Beyond the heuristic: strengths and sparsities judged on the model itself.

``choose_strength`` tries a method at several strengths. ``refine`` improves a plan by
mutation at constant total and selection by divergence from the dense model, on the ground
of EvoPress (arXiv 2410.14649) and with two changes: masks follow from stored norms, so no
database of pruned weights is needed, and mutations are drawn by what the measurements so far
say about each block, not blindly.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from compressed_tensors.distributed import get_source_rank, is_distributed, is_source_process
from loguru import logger
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from torch import distributed as dist

from dlp_plugin.files import replacing
from dlp_plugin.planning.plan import BlockPlan, Candidate, Plan, SearchStep
from dlp_plugin.scoring.blocks import Block
from dlp_plugin.search.judge import Trial

__all__ = ["choose_strength", "forget", "refine"]

# Half ranges of the sparsities to try. Seven forward passes over the judging samples.
HALF_RANGES = (0.0, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3)

# A generation: so many offspring are measured on so many tokens, the best on all.
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


def sparsities_of(plan: Plan, blocks: Sequence[Block]) -> dict[str, float]:
    """Sparsity of every Linear by a plan.

    :param blocks: the plan's blocks, in its order, with the Linears that it prunes
    """
    return {
        name: (row.linears or {}).get(name, row.sparsity)
        for row, block in zip(plan.blocks, blocks, strict=True)
        for name in block.linears
    }


def choose_strength(trial: Trial, make: Callable[..., Plan], blocks: Sequence[Block]) -> Plan:
    """Make the plan with the strength whose pruned model has the least loss.

    Of equal losses the smaller strength wins; uniform sparsity is among them.

    :param make: :meth:`Plan.make` with all but ``alpha`` given
    :param blocks: the plan's blocks, with the Linears that it prunes
    :return: the plan, with all candidates and their losses
    """
    unit = 2 / (len(blocks) - 1) if len(blocks) > 1 else 1.0
    plans = [make(alpha=half) for half in HALF_RANGES]
    if plans[0].method == "linear":  # its strength is the step from block to block
        plans = [make(alpha=half * unit) for half in HALF_RANGES]
    logger.info("Trying {} strengths, each on {} tokens", len(plans), trial.tokens)
    losses: list[float] = []
    measured: dict[tuple[float, ...], float] = {}  # whole N make one plan of several strengths
    for plan in plans:
        sparsities = sparsities_of(plan, blocks)
        key = tuple(sparsities.values())
        if key not in measured:
            measured[key] = trial.loss(sparsities, group=plan.group)
        losses.append(measured[key])
        logger.info("alpha {:g}: loss {:.4f} of the pruned model", plan.alpha, losses[-1])
    if not any(math.isfinite(loss) for loss in losses):
        raise ValueError(
            "the loss of the pruned model is not finite at any strength: check the "
            "calibration data, or lower the sparsity"
        )
    best = min(range(len(plans)), key=lambda i: (not math.isfinite(losses[i]), losses[i]))
    candidates = tuple(
        Candidate(alpha=plan.alpha, loss=loss)
        for plan, loss in zip(plans, losses, strict=True)
        if math.isfinite(loss)
    )
    return plans[best].model_copy(update={"candidates": candidates})


class _Units:
    """What the search gives sparsities to: blocks, or single Linears."""

    def __init__(
        self, members: Mapping[str, list[str]], weights: Mapping[str, int], group: int
    ) -> None:
        """Take each unit's Linears, the number of weights of each Linear, and M of N:M or 0."""
        self.members = members
        self.group = group
        self.weights = {
            unit: sum(weights[name] for name in names) for unit, names in members.items()
        }
        self.costs = dict.fromkeys(members, 0.0)  # per weight moved, estimated

    @property
    def can_switch(self) -> bool:
        """Whether weights can be moved: whole N only between units of a size."""
        sizes = list(self.weights.values())
        return not self.group or len(set(sizes)) < len(sizes)

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
        if self.group:
            return math.lcm(up, down) / self.group
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
        if self.group:
            new = {name: round(value * self.group) / self.group for name, value in new.items()}
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


def refine(
    trial: Trial,
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

    :param blocks: the plan's blocks, in its order, with the Linears that it prunes
    :param generations: at least 1
    :param progress_path: file that holds how far the search is; a search that was
        interrupted goes on from it. It stays until :func:`forget`, to be called once the plan
        is written
    :return: a plan that holds the Linears' sparsities and the path of the search
    """
    weights = {name: size for block in blocks for name, size in block.sizes.items()}
    levels = [
        _Units({block.name: list(block.linears) for block in blocks}, weights, plan.group),
        _Units({name: [name] for block in blocks for name in block.linears}, weights, plan.group),
    ]
    fingerprint = _digest([plan.model_dump(mode="json"), generations, seed, trial.fingerprint])
    state = _load(progress_path, fingerprint, levels, list(weights))
    portions = trial.portions(SIFTING_TOKENS)
    known = {} if state is None else state.known  # so that nothing is measured twice
    evaluations = tokens = 0

    def measured(sparsities: Mapping[str, float], place: int | None = None) -> float:
        """Divergence on one of the portions, or on all samples."""
        nonlocal evaluations, tokens
        portion = None if place is None else portions[place]
        key = _digest([place, list(sparsities.values())])[:16]
        if key not in known:
            evaluations += 1
            tokens += trial.tokens if portion is None else trial.tokens_in(portion)
            known[key] = trial.divergence(sparsities, portion, group=plan.group)
        return known[key]

    logger.info(
        "Refining: {} generations of {} changes, each on {} tokens, the best {} on {}",
        generations,
        OFFSPRING,
        trial.tokens_in(portions[0]),
        SURVIVORS,
        trial.tokens,
    )
    if state is None:
        best = sparsities_of(plan, blocks)
        divergence = measured(best)
        if not math.isfinite(divergence):
            raise ValueError(
                "the divergence of the plan to refine is not finite: load the model in a wider "
                "dtype, lower the sparsity, or leave out refine"
            )
        steps = [_step(0, evaluations, tokens, divergence)]
    else:
        best, steps = state.sparsities, state.steps
        last = steps[-1]
        divergence, evaluations, tokens = last.divergence, last.evaluations, last.tokens
        for units, costs in zip(levels, state.costs, strict=True):
            units.costs = costs
        logger.info("The search goes on from generation {}", steps[-1].generation)

    for generation in range(len(steps), generations + 1):
        units = levels[generation > generations // 3 or not levels[0].can_switch]
        chance = random.Random(f"{seed} {generation}")
        place = generation % len(portions) if len(portions) > 1 else None
        here = measured(best, place)
        sifted: list[tuple[float, dict[str, float]]] = []
        for _ in range(OFFSPRING):
            offspring, moved = units.switched(best, chance)
            if not any(moved.values()):
                continue
            found = measured(offspring, place)
            if not math.isfinite(found):
                continue
            units.learn(moved, found - here)
            if (found, offspring) not in sifted:
                sifted.append((found, offspring))
        sifted.sort(key=lambda pair: pair[0])
        for _, offspring in sifted[:SURVIVORS]:
            found = measured(offspring)
            if found < divergence:
                best, divergence = offspring, found
        steps.append(_step(generation, evaluations, tokens, divergence))
        logger.info(
            "generation {} of {}: divergence {:.4f} after {} evaluations",
            generation,
            generations,
            divergence,
            evaluations,
        )
        if progress_path is not None and is_source_process():
            progress = _Progress(
                fingerprint=fingerprint,
                sparsities=best,
                steps=steps,
                costs=[units.costs for units in levels],
                known=known,
            )
            with replacing(progress_path) as beside:
                beside.write_text(progress.model_dump_json())

    return plan.model_copy(
        update={"blocks": _rows(plan, blocks, best, weights), "search": tuple(steps)}
    )


def forget(progress_path: str | Path) -> None:
    """Remove what a search has written of its progress, once its plan is safe."""
    if is_source_process():
        Path(progress_path).unlink(missing_ok=True)


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _step(generation: int, evaluations: int, tokens: int, divergence: float) -> SearchStep:
    return SearchStep(
        generation=generation, evaluations=evaluations, tokens=tokens, divergence=divergence
    )


def _rows(
    plan: Plan, blocks: Sequence[Block], best: Mapping[str, float], weights: Mapping[str, int]
) -> tuple[BlockPlan, ...]:
    rows = []
    for row, block in zip(plan.blocks, blocks, strict=True):
        linears = {name: best[name] for name in block.linears}
        pruned = math.fsum(weights[name] * sparsity for name, sparsity in linears.items())
        sparsity = min(max(pruned / row.weights, 0.0), 1.0)
        rows.append(row.model_copy(update={"linears": linears, "sparsity": sparsity}))
    return tuple(rows)


class _Progress(BaseModel):
    """How far a search is.

    :param fingerprint: of its start, samples and settings
    :param costs: of each level's units
    :param known: every divergence measured, by a digest of what it was measured for
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    fingerprint: str
    sparsities: dict[str, Annotated[float, Field(ge=0, le=1)]]
    steps: list[SearchStep] = Field(min_length=1)
    costs: list[dict[str, FiniteFloat]]
    known: dict[str, float]


def _load(
    path: str | Path | None, fingerprint: str, levels: Sequence[_Units], linears: list[str]
) -> _Progress | None:
    """What an interrupted search of the very same start, samples and settings left.

    The first process of several writes it, and reads it for all.
    """
    state: _Progress | None = None
    if path is not None and is_source_process() and Path(path).is_file():
        try:
            state = _Progress.model_validate_json(Path(path).read_bytes())
            members = [list(state.sparsities), *map(list, state.costs)]
            if state.fingerprint != fingerprint:
                logger.warning("{} is of another search; this one begins anew", path)
                state = None
            elif members != [linears, *(list(units.members) for units in levels)]:
                raise ValueError("it names other Linears")
        except (ValueError, OSError) as error:
            reason = str(error).splitlines()[0]
            logger.warning(
                "{} is damaged, or of another version ({}); the search begins anew", path, reason
            )
            state = None
    if is_distributed():
        shared = [state]
        dist.broadcast_object_list(shared, src=get_source_rank())
        state = shared[0]
    return state
