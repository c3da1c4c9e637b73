"""What the allocation modifiers share: score blocks, make a plan, set the stages' sparsities."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from compressed_tensors.distributed import is_source_process
from compressed_tensors.utils import match_named_modules
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.utils.helpers import DisableQuantization
from loguru import logger
from pydantic import ConfigDict, Field, PrivateAttr, field_validator

from dlp_plugin import host
from dlp_plugin.evaluation.causal import check_causal
from dlp_plugin.evaluation.vocabulary import check_tokens
from dlp_plugin.experts import save_under_source_names
from dlp_plugin.files import check_writable, reserved
from dlp_plugin.generation import make_savable
from dlp_plugin.modifiers.feeding import FedStage, all_blocks, check_stage, fed_blocks, offset_of
from dlp_plugin.modifiers.fitting import check_fits
from dlp_plugin.modifiers.scoring_pass import ScoringPass
from dlp_plugin.planning.allocation import check_sparsity
from dlp_plugin.planning.methods import METHODS, Method
from dlp_plugin.planning.plan import Plan
from dlp_plugin.planning.structure import UNSTRUCTURED, MaskStructure
from dlp_plugin.planning.view import text
from dlp_plugin.scoring.blocks import Block, check_columns
from dlp_plugin.scoring.calibration import Batch, scoring_batches, split
from dlp_plugin.scoring.routers import left_routers
from dlp_plugin.search.decide import Search, decide
from dlp_plugin.search.judge import Judge
from dlp_plugin.search.progress import forget
from dlp_plugin.search.slopes import Slopes

__all__ = ["AllocationModifier", "last_plans"]


class AllocationModifier(Modifier, Method):
    """Give every block a separate sparsity before SparseGPT, Wanda, ADMM or magnitude prunes it.

    A method (:mod:`dlp_plugin.planning.methods`) as a modifier of llm-compressor. It sets the
    sparsities of every pruning stage that follows, up to the next allocation modifier. These
    stages share one plan with one target. With an N:M structure every block gets a separate N;
    their average is the N of the structure. After the run the recipe holds the plan: run again, it
    prunes by that plan without scoring.

    Lifecycle:

    - on_initialize: check everything; with ``from_plan``, set the stages' sparsities
    - on_calibration_start: one forward pass, block by block, of the calibration samples
      without their padding; then allocate, select the strength and refine if asked to,
      write the plan, set the stages' sparsities
    - on_sequential_epoch_end, during that pass: score the blocks that have run
    - on_finalize: restore the stages' sparsities as they were written

    :param sparsity: target over all weights that the stages prune, in (0, 1); by default the
        stages' own, or that of their N:M
    :param mask_structure: ``N:M`` of the plan, where no stage follows; otherwise the stages'
    :param targets: modules to plan for, where no stage follows; otherwise the stages'
    :param ignore: modules to leave dense, where no stage follows; otherwise the stages'
    :param num_samples: use the first so many calibration samples; None for all
    :param plan_path: JSON file to write the plan to
    :param from_plan: a plan file (or its content) to prune by without scoring, at the same or
        another target and strength
    :param refine: steps of a search that improves the plan, with a separate sparsity for every
        Linear and the same total; 0 for none. With a ``plan_path``, an interrupted search
        continues
    :param search: ``gradient``: each step is one backward pass of the pruned model;
        ``evolution``: each step is a generation of random changes, without a backward pass
    :param seed: of the evolution
    """

    model_config = ConfigDict(frozen=False)

    sparsity: float | None = None
    mask_structure: str | None = None
    targets: list[str] = Field(default_factory=lambda: ["Linear"])
    ignore: list[str] = Field(default_factory=list)
    num_samples: int | None = Field(default=None, ge=1)
    plan_path: str | None = None
    from_plan: str | dict[str, Any] | None = None
    refine: int = Field(default=0, ge=0)
    search: Search = "gradient"
    seed: int = 0

    # The host runs no data for it: the modifier runs the samples itself, once.
    requires_calibration_data: bool = False

    _plan: Plan | None = PrivateAttr(default=None)
    _target: float = PrivateAttr(default=0.0)
    _structure: MaskStructure = PrivateAttr(default=UNSTRUCTURED)
    _stages: list[FedStage] = PrivateAttr(default_factory=list)
    _blocks: list[Block] = PrivateAttr(default_factory=list)
    _pass: ScoringPass = PrivateAttr()

    @field_validator("sparsity")
    @classmethod
    def _check_sparsity(cls, value: float | None) -> float | None:
        return value if value is None else check_sparsity(value)

    @property
    def method(self) -> Method:
        """The method, with this modifier's strength and settings."""
        kind = METHODS[self.name]
        return kind(**{name: getattr(self, name) for name in kind.model_fields})

    @property
    def judges(self) -> bool:
        """Whether plans are selected on held-out samples, a quarter of all at most."""
        return self.strength == "auto" or self.refine > 0

    @property
    def plan(self) -> Plan | None:
        """The plan; None until it is made."""
        return self._plan

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check the recipe against the model; with ``from_plan``, set the stages' sparsities.

        :raises ValueError: naming the field or module, if anything is amiss
        """
        host.keep_all_modifiers_when_saved(state.model)
        host.warn_of_lost_zeros(state.model, host.current_modifiers(), self)
        save_under_source_names(state.model)
        make_savable(state.model)
        stages = host.stages_after(self, AllocationModifier)  # type: ignore[type-abstract]
        self._check_recipe(stages)
        plan = None if self.from_plan is None else Plan.load(self.from_plan)
        self._structure = self._common_structure(stages, plan)
        self._target = self._choose_target(stages, plan)
        targets = kwargs.get("sequential_targets")
        if stages:
            self._blocks, self._stages = fed_blocks(state.model, stages, targets)
        else:
            host.check_patterns(self, targets=self.targets, ignore=self.ignore)
            found = dict(match_named_modules(state.model, self.targets, self.ignore))
            left_routers(state.model, type(self).__name__, self.targets, found)
            self._blocks = all_blocks(state.model, targets, self.targets, self.ignore)
            if self._structure:  # stages check their own
                for block in self._blocks:
                    remedy = "take another mask_structure"
                    check_columns(block.linears, self._structure.m, remedy)
        self._pass = ScoringPass(self._blocks)
        if plan is None:
            self._check_data(state)
        else:
            self._adopt(self._fitted(plan))
        return True

    def _check_recipe(self, stages: list[host.StockStage]) -> None:
        """Check the recipe, before the model."""
        own = type(self).__name__
        for stage in stages:
            check_stage(stage, own)
        if not stages and self.plan_path is None:
            raise ValueError(
                f"no SparseGPTModifier, WandaPruningModifier, ADMMPruningModifier or "
                f"OneShotMagnitudeModifier follows {own} in the recipe: add one, or set plan_path "
                "to only write the plan"
            )
        if self.plan_path is not None:
            try:
                check_writable(self.plan_path)
            except OSError as error:
                raise ValueError(f"plan_path: {error}") from error

    def _check_data(self, state: State) -> None:
        """Check that there are the samples and the model that scores and losses need."""
        if self._runs_data and not state.data.calib:
            raise ValueError(
                f"{type(self).__name__} scores blocks on activations and got no calibration "
                "data: pass dataset=... to oneshot(), with input_ids or a text column, or "
                "from_plan to prune from a plan"
            )
        if self.judges:
            check_causal(state.model, f"{self.strength_field}: auto and refine judge by loss")
        if self.refine:
            for fed in self._stages:
                fed.check_single_linears()

    @property
    def _search_path(self) -> str | None:
        """File to continue an interrupted search from; None without a search or ``plan_path``."""
        return f"{self.plan_path}.search" if self.refine and self.plan_path else None

    @property
    def _runs_data(self) -> bool:
        return self.sees_activations or self.judges

    def _common_structure(self, stages: list[host.StockStage], plan: Plan | None) -> MaskStructure:
        own = type(self).__name__
        stated = {stage.mask_structure: type(stage).__name__ for stage in stages}
        if self.mask_structure is not None:
            stated.setdefault(self.mask_structure, own)
        if len(stated) > 1:
            raise ValueError(
                "mask_structure is "
                + ", ".join(f"{value} in {kind}" for value, kind in stated.items())
                + f": state the same, or give each stage a {own} of its own"
            )
        if stated:
            return MaskStructure.parse(next(iter(stated)))
        return UNSTRUCTURED if plan is None else plan.mask_structure

    def _choose_target(self, stages: list[host.StockStage], plan: Plan | None) -> float:
        own = type(self).__name__
        stated = [] if self.sparsity is None else [(own, self.sparsity)]
        for stage in stages:
            if isinstance(stage.sparsity, float):
                kind = type(stage).__name__
                stated.append((kind, check_sparsity(stage.sparsity, f"{kind}.sparsity")))
        if len({value for _, value in stated}) > 1:
            raise ValueError(
                "sparsity is stated as "
                + ", ".join(f"{value} by {kind}" for kind, value in stated)
                + f": state it once, or give each stage a {own} of its own"
            )
        if self._structure:
            for kind, value in stated:
                self._structure.exact_target(value, f"{kind}.sparsity")
            return self._structure.sparsity
        if stated:
            return stated[0][1]
        if plan is not None:
            return plan.target
        raise ValueError(f"no sparsity is stated: set it in the pruning stage or in {own}")

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Score on one run of the calibration samples, and make the plan."""
        if self._plan is not None or self._pass.running:
            return
        if len(host.current_modifiers()) > 1:
            raise ValueError(
                f"{type(self).__name__} must end before the stages that follow it begin, but this "
                "pipeline runs all modifiers at once: call oneshot() with "
                "pipeline='independent', its default"
            )
        path = self._search_path
        with nullcontext() if path is None else reserved(path, is_source_process()):
            self._run_and_decide(state)

    def _run_and_decide(self, state: State) -> None:
        batches: list[Batch] = []
        judging: list[Batch] = []
        if self._runs_data:
            main_input = getattr(state.model, "main_input_name", "input_ids")
            batches = scoring_batches(state.data.calib or (), self.num_samples, main_input)
            check_tokens(
                state.model, (each["input_ids"] for each in batches if "input_ids" in each)
            )
            if self.judges:
                batches, judging = split(batches)
            logger.info("Scoring {} blocks on {} batches", len(self._blocks), len(batches))
            self._pass.run(self, state.model, batches, [self.method])
        else:
            self._pass.score_weights([self.method])
        with DisableQuantization(state.model):  # a quantizer that follows has enabled it
            self._adopt(self._decided(state.model, batches, judging))

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[torch.nn.Module], **kwargs: Any
    ) -> None:
        """Score the blocks in the part of the model that has run."""
        if self._plan is None and self._pass.running:
            self._pass.through(modules)

    def _decided(self, model: torch.nn.Module, batches: list[Batch], judging: list[Batch]) -> Plan:
        """Allocate, select the strength and refine, as asked to.

        :param batches: samples that were scored on
        :param judging: held-out samples, where some are needed
        """
        scores = self._pass.scores(self.method)
        if len(set(scores)) == 1 < len(scores):
            logger.warning(
                "All blocks have the same score ({}), so they get the same sparsity; on "
                "a model more than half pruned DLP's median is 0: try statistic: mean",
                self.score_name,
            )
        blocks = self._pass.blocks
        judge = slopes = None
        if self.judges:
            magnitude = [name for fed in self._stages if fed.by_magnitude for name in fed.inside]
            masks = self._pass.masks(magnitude)
            judge = Judge(model, masks, judging)
            slopes = Slopes(model, blocks, masks, batches)
        return decide(
            self.method,
            blocks,
            scores,
            judge,
            slopes,
            model=getattr(model, "name_or_path", "") or type(model).__name__,
            target=self._target,
            structure=self._structure,
            unseen=self._pass.unseen,
            refine=self.refine,
            offset=min((offset_of(fed.stage) for fed in self._stages), default=0.0),
            search=self.search,
            seed=self.seed,
            progress_path=self._search_path,
        )

    def _fitted(self, plan: Plan) -> Plan:
        """A given plan, checked against the model, at the wanted target and strength."""
        stated = {n: v for n, v in self.method.settings.items() if n in self.model_fields_set}
        check_fits(plan, self.name, stated, self._structure, self._blocks, self._stages)
        given = self.strength_field in self.model_fields_set
        if self.refine or (given and self.strength == "auto"):
            raise ValueError(
                f"from_plan prunes without calibration samples, and {self.strength_field}: auto "
                "and refine need them: leave out the one or the other"
            )
        return plan.at(target=self._target, strength=float(self.strength) if given else None)

    def _adopt(self, plan: Plan) -> None:
        self._plan = plan
        logger.opt(lazy=True).debug("The blocks' sparsities:\n{}", lambda: text(plan))
        if lost := [block.name for block in plan.blocks if block.sparsity == 1]:
            logger.warning(
                "These blocks will be pruned to nothing; lower {} or sparsity: {}",
                self.strength_field,
                lost,
            )
        if self.plan_path is not None and is_source_process():
            plan.save(self.plan_path)
            if self._search_path is not None:
                forget(self._search_path)
        for fed in self._stages:
            fed.feed(plan)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Restore the stages as they were written; keep the plan."""
        self.remove_hooks()
        for fed in self._stages:
            fed.restore()
        if self._plan is not None:
            method = self._plan.scored_by
            for name in type(method).model_fields:
                setattr(self, name, getattr(method, name))
            self.from_plan = self._plan.model_dump(mode="json")
            self.plan_path = (
                None  # it is written, and the path may not exist where the recipe runs again
            )
            self.refine = 0
        return True


def last_plans() -> list[Plan]:
    """Plans of the last ``oneshot()`` run in this process, in recipe order.

    A modifier that was passed to ``oneshot()`` as an object has its plan as
    :attr:`AllocationModifier.plan`.
    """
    modifiers = host.current_modifiers()
    plans = [m.plan for m in modifiers if isinstance(m, AllocationModifier)]
    return [plan for plan in plans if plan is not None]
