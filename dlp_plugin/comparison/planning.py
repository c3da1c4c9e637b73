"""Makes the plans of all contenders in one calibration pass over the dense model."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from pydantic import PrivateAttr

from dlp_plugin.comparison.names import Contender, Scope, Way, plan_name, target_of
from dlp_plugin.host import check_patterns
from dlp_plugin.modifiers.feeding import all_blocks
from dlp_plugin.modifiers.scoring_pass import ScoringPass
from dlp_plugin.planning.plan import Plan
from dlp_plugin.scoring.blocks import Block, check_columns
from dlp_plugin.scoring.calibration import Batch, scoring_batches, split
from dlp_plugin.search.decide import decide
from dlp_plugin.search.judge import Judge
from dlp_plugin.search.progress import forget
from dlp_plugin.search.slopes import Slopes

__all__ = ["PlanningModifier"]

Wanted = list[tuple[Contender, str, Way]]


class PlanningModifier(Modifier):
    """Makes the plans of several contenders at several targets, without pruning.

    Contenders that select on held-out samples score blocks on the other samples. All other
    contenders score on all samples. So the samples are run in two portions. Every plan equals the
    plan that a recipe with the method's own modifier makes.

    :param wanted: for every plan the contender, the name of the target, and how plans are judged
    :param keep: called with the plan's name (:func:`plan_name`), the target, the plan, and the
        seconds that it took, without scoring
    :param progress_path: file that an interrupted search continues from
    :param scope: which modules are pruned
    """

    requires_calibration_data: bool = False  # as in the modifiers of the methods

    _wanted: Wanted = PrivateAttr()
    _keep: Callable[[str, str, Plan, float], None] = PrivateAttr()
    _progress_path: Path = PrivateAttr()
    _scope: Scope = PrivateAttr()
    _blocks: list[Block] = PrivateAttr(default_factory=list)
    _pass: ScoringPass = PrivateAttr()

    def __init__(
        self,
        wanted: Wanted,
        keep: Callable[[str, str, Plan, float], None],
        progress_path: Path,
        scope: Scope,
    ) -> None:
        super().__init__()
        self._wanted, self._keep, self._progress_path = wanted, keep, progress_path
        self._scope = scope

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Find the blocks and the Linears in them that are pruned.

        :param state: the host's
        :param kwargs: the host's
        :return: True, as the host expects
        :raises ValueError: naming a module whose rows a pattern N:M does not fit
        """
        targets, ignore = self._scope
        check_patterns(self, targets=targets, ignore=ignore)
        self._blocks = all_blocks(state.model, kwargs.get("sequential_targets"), targets, ignore)
        for target in {target for _, target, _ in self._wanted}:
            _, structure = target_of(target)
            for block in self._blocks if structure else ():
                remedy = f"leave {structure} out of the sparsities"
                check_columns(block.linears, structure.m, remedy)
        self._pass = ScoringPass(self._blocks)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Score and plan: first for contenders that select on held-out samples, then the others."""
        if self._pass.running:
            return
        batches = scoring_batches(state.data.calib or ())
        judging: list[Batch] = []
        if wanted := [each for each in self._wanted if each[0].judges]:
            batches, judging = split(batches)
            self._plan(state.model, batches, wanted, judging)
            batches = judging  # their norms are added to those of the first portion
        if fixed := [each for each in self._wanted if not each[0].judges]:
            self._plan(state.model, batches, fixed, judging)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[torch.nn.Module], **kwargs: Any
    ) -> None:
        """Score the blocks in the part of the model that has just been run."""
        if self._pass.running:
            self._pass.through(modules)

    def _plan(
        self, model: torch.nn.Module, batches: list[Batch], wanted: Wanted, judging: list[Batch]
    ) -> None:
        """Run batches, score blocks on all batches run so far, and make the plans."""
        self._pass.run(self, model, batches, [contender.method for contender, _, _ in wanted])
        blocks = self._pass.blocks
        every = [name for block in blocks for name in block.linears]
        ways = {way.by_magnitude for contender, _, way in wanted if contender.judges}
        masks = {each: self._pass.masks(every if each else ()) for each in sorted(ways)}
        judges = {each: Judge(model, masks[each], judging) for each in masks}
        slopes = {each: Slopes(model, blocks, masks[each], batches) for each in masks}
        for contender, target, way in wanted:
            sparsity, structure = target_of(target)
            started = time.perf_counter()
            plan = decide(
                contender.method,
                blocks,
                self._pass.scores(contender.method),
                judges[way.by_magnitude] if contender.judges else None,
                slopes[way.by_magnitude] if contender.judges else None,
                model=getattr(model, "name_or_path", "") or type(model).__name__,
                target=sparsity,
                structure=structure,
                unseen=self._pass.unseen,
                refine=contender.refine,
                offset=way.offset,
                search=contender.search,
                progress_path=self._progress_path,
            )
            self._keep(plan_name(contender.name, way), target, plan, time.perf_counter() - started)
            forget(self._progress_path)
