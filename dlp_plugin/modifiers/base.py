"""``DLPModifier`` and what its peers share: hooks in, plan out, pruning stages fed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from compressed_tensors.distributed import is_distributed, is_source_process
from compressed_tensors.offload import disable_onloading
from compressed_tensors.utils import align_module_device, match_named_modules
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import Field, PrivateAttr, ValidationInfo, field_validator

from dlp_plugin import host
from dlp_plugin.evaluation.causal import check_causal
from dlp_plugin.files import check_writable
from dlp_plugin.planning.allocation import (
    Method,
    Statistic,
    check_alpha,
    check_sparsity,
    check_target,
    split_structure,
)
from dlp_plugin.planning.plan import Plan
from dlp_plugin.pruning.stages import Stage
from dlp_plugin.scoring.blocks import Block, check_columns, group_by_block, outer_block
from dlp_plugin.scoring.calibration import scoring_batches, split
from dlp_plugin.scoring.scores import ChannelNorms, Part, block_score
from dlp_plugin.search.judge import Trial
from dlp_plugin.search.refine import choose_strength, forget, refine

__all__ = ["AllocationModifier", "DLPModifier", "Strength", "checked_strength", "last_plans"]


class AllocationModifier(Modifier):
    """Give every block its own sparsity before SparseGPT, Wanda or magnitude prunes it.

    What DLP and its peers share: each of them is told apart by how it scores a block. It
    feeds every pruning stage that follows, up to the next modifier of this kind; together
    they are one plan with one target. Where their structure is N:M, every block gets an N of
    its own, N on average. After the run the recipe reads as it was written, and holds the
    plan: run again, it prunes from that plan without scoring.

    Lifecycle:

    - on_initialize: check everything; with ``from_plan``, feed the stages
    - on_calibration_start: hooks on every Linear that the stages will prune, and one
      forward pass, block by block, of the calibration samples without their padding; then
      allocate, choose the strength and refine if asked to, write the plan, feed the stages
    - on_sequential_epoch_end, during that pass: score the blocks that are through
    - on_finalize: give the stages back the sparsity they were written with

    :param sparsity: target over all weights that the stages prune, in (0, 1); left
        out, the stages' own, or that of their N:M
    :param mask_structure: ``N:M`` for a plan that no stage follows, to be pruned from later;
        otherwise the stages' own
    :param num_samples: use the first so many calibration samples; None for all
    :param plan_path: JSON file to write the plan to
    :param from_plan: a plan file (or its content) to prune from without scoring, at
        the same or another target and strength
    :param refine: generations of a search that improves the plan at the same total, first
        over blocks, then over single Linears; 0 for none. With a ``plan_path``, a search
        that was interrupted goes on where it was
    :param seed: of the search
    """

    sparsity: float | None = None
    mask_structure: str | None = None
    num_samples: int | None = Field(default=None, ge=1)
    plan_path: str | None = None
    from_plan: str | dict[str, Any] | None = None
    refine: int = Field(default=0, ge=0)
    seed: int = 0

    # The epoch that the host gives it runs no data: it runs them itself, once.
    requires_calibration_data: bool = False

    method: ClassVar[Method]
    strength_field: ClassVar[str]
    scores_activations: ClassVar[bool] = True

    _plan: Plan | None = PrivateAttr(default=None)
    _target: float = PrivateAttr(default=0.0)
    _structure: str = PrivateAttr(default="0:0")
    _stages: list[_FedStage] = PrivateAttr(default_factory=list)
    _blocks: list[Block] = PrivateAttr(default_factory=list)
    _norms: ChannelNorms = PrivateAttr(default_factory=ChannelNorms)
    _scored: dict[str, tuple[int, float]] = PrivateAttr(default_factory=dict)
    _unseen: dict[str, list[str]] = PrivateAttr(default_factory=dict)
    _judging: list[dict[str, Any]] = PrivateAttr(default_factory=list)
    _passing: bool = PrivateAttr(default=False)

    @field_validator("*", mode="before")
    @classmethod
    def _check_no_bool(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's true and yes, which pydantic takes for 1."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and kind is not bool:
            raise ValueError(f"{value} is no number, nor a name")
        return value

    @field_validator("sparsity")
    @classmethod
    def _check_sparsity(cls, value: float | None) -> float | None:
        return value if value is None else check_sparsity(value)

    def score(self, depth: int, parts: Mapping[str, Part]) -> float:
        """Score one block.

        :param depth: the block's place, from 0
        :param parts: full name to a Linear's weight ``[out, in]`` and the l2 norms of its
            input channels, ``[in]`` (empty if the method needs no activations)
        """
        raise NotImplementedError

    @property
    def statistic_name(self) -> str:
        """What a block's score is, in words, for the plan."""
        raise NotImplementedError

    @property
    def strength(self) -> float | Literal["auto"]:
        """The method's own strength, whatever its name."""
        value: float | Literal["auto"] = getattr(self, self.strength_field)
        return value

    @property
    def _judges(self) -> bool:
        return self.strength == "auto" or self.refine > 0

    @property
    def _runs_data(self) -> bool:
        return self.scores_activations or self._judges

    @property
    def plan(self) -> Plan | None:
        """The plan; None until it is made."""
        return self._plan

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check the recipe against the model; with ``from_plan``, feed the stages.

        :raises ValueError: naming the field or module, if anything is amiss
        """
        host.keep_all_modifiers_when_saved()
        host.save_under_source_names(state.model)
        stages = host.stages_after(self, AllocationModifier)
        for stage in stages:
            _check_stage(stage, type(self).__name__)
        if not stages and self.plan_path is None:
            raise ValueError(
                f"no SparseGPTModifier, WandaPruningModifier or OneShotMagnitudeModifier follows "
                f"{type(self).__name__} in the recipe: add one, or set plan_path to only write "
                "the plan"
            )
        if self.plan_path is not None:
            try:
                check_writable(self.plan_path)
            except OSError as error:
                raise ValueError(f"plan_path: {error}") from error

        for name in host.reviving_modifiers(self, AllocationModifier):
            logger.warning(
                "{} does not keep pruned weights at zero: part of the sparsity will be "
                "lost. Write MaskedGPTQModifier instead",
                name,
            )

        plan = None if self.from_plan is None else Plan.load(self.from_plan)
        self._structure = self._common_structure(stages, plan)
        self._target = self._choose_target(stages, plan)
        self._match(state.model, stages, kwargs.get("sequential_targets"))
        if plan is not None:
            self._adopt(self._fitted(plan))
            return True
        if self._runs_data and not state.data.calib:
            raise ValueError(
                f"{type(self).__name__} scores blocks on activations and got no calibration "
                "data: pass dataset=... to oneshot(), with input_ids or a text column, or "
                "from_plan to prune from a plan"
            )
        if self._judges:
            check_causal(state.model, f"{self.strength_field}: auto and refine judge by loss")
        if self.refine:
            for fed in self._stages:
                fed.check_single_linears()
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Score on one run of the calibration samples, and decide."""
        if self._plan is not None or self._passing:
            return
        if len(host.current_modifiers()) > 1:
            raise ValueError(
                f"{type(self).__name__} must be through before the stages it feeds begin, but "
                "this pipeline runs all modifiers in one epoch: call oneshot() with "
                "pipeline='independent', its default"
            )
        if self._runs_data:
            main_input = getattr(state.model, "main_input_name", "input_ids")
            batches = scoring_batches(state.data.calib or (), self.num_samples, main_input)
            if self._judges:
                batches, self._judging = split(batches)
            for block in self._blocks:
                for name, linear in block.linears.items():
                    self.register_hook(linear, partial(self._record, name), "forward_pre")
            logger.info("Scoring {} blocks on {} batches", len(self._blocks), len(batches))
            self._passing = True
            host.run_once(state.model, batches)
            self.remove_hooks()
        self._decide(state.model)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[torch.nn.Module], **kwargs: Any
    ) -> None:
        """Score the blocks that lie in the part of the model that is through.

        A block that the model applies several times is through as often, and scored
        anew on all its inputs so far.
        """
        if self._plan is None:
            through = set(modules)
            for block in self._blocks:
                if through.issuperset(block.linears.values()):
                    self._score(block)

    def _decide(self, model: torch.nn.Module) -> None:
        """Allocate, choose and refine as asked to, write the plan and feed the stages."""
        for block in self._blocks:
            if block.name not in self._scored:
                self._score(block)
        if len({score for _, score in self._scored.values()}) == 1 < len(self._blocks):
            logger.warning(
                "All blocks have the same score ({}), so they get the same sparsity; on "
                "a model more than half pruned DLP's median is 0: try statistic: mean",
                self.statistic_name,
            )
        names = [block.name for block in self._blocks]
        make = partial(
            Plan.make,
            [(name, *self._scored[name]) for name in names],
            method=self.method,
            model=getattr(model, "name_or_path", "") or type(model).__name__,
            statistic=self.statistic_name,
            target=self._target,
            unseen=[linear for name in names for linear in self._unseen[name]],
            mask_structure=self._structure,
        )
        blocks = [block.without(self._unseen[block.name]) for block in self._blocks]
        strength = self.strength
        if strength != "auto" and not self.refine:
            self._adopt(make(alpha=strength))
            return
        trial = self._trial(model, blocks)
        plan = choose_strength(trial, make, blocks) if strength == "auto" else make(alpha=strength)
        if self.refine:
            plan = refine(
                trial,
                plan,
                blocks,
                generations=self.refine,
                seed=self.seed,
                progress_path=None if self.plan_path is None else _search_path(self.plan_path),
            )
        self._adopt(plan)

    def _trial(self, model: torch.nn.Module, blocks: Sequence[Block]) -> Trial:
        linears: dict[str, torch.nn.Linear] = {}
        for block in blocks:
            linears |= block.linears
        norms = self._norms.of(linears)
        return Trial(
            model, linears, {n: x for n, x in norms.items() if x is not None}, self._judging
        )

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Give the stages back what they were written with; keep the plan."""
        self.remove_hooks()
        for fed in self._stages:
            fed.restore()
        if self._plan is not None:
            self._read_as(self._plan)
            self.from_plan = self._plan.model_dump(mode="json")
            self.plan_path = None  # is written, and need not be where the recipe runs again
            self.refine = 0
        return True

    def _read_as(self, plan: Plan) -> None:
        """Have the settings say what the plan was made with."""
        setattr(self, self.strength_field, plan.alpha)

    def _match(
        self,
        model: torch.nn.Module,
        stages: list[host.PruningStage],
        sequential_targets: list[str] | None,
    ) -> None:
        """Find the blocks, and in them the Linears that the stages will prune."""
        names = host.block_names(model, sequential_targets)
        if not stages:
            found = dict(match_named_modules(model, ["Linear"]))
        else:
            found = {}
            for stage in stages:
                fed = _FedStage(stage, host.stage_targets(model, stage), names)
                if not isinstance(stage, Stage):  # which does so itself
                    host.heed_ignore(model, stage)
                self._stages.append(fed)
                found.update(fed.inside)
        linears = {name: module for name, module in model.named_modules() if name in found}
        for name, module in linears.items():
            if outer_block(name, names) and not isinstance(module, torch.nn.Linear):
                raise ValueError(
                    f"{name} is a {type(module).__name__}, and DLP scores Linears only: "
                    "add it to the stage's ignore"
                )
        self._blocks, _ = group_by_block(linears, names)
        if not self._blocks:
            raise ValueError(
                f"no Linear in any block of {type(model).__name__} (the first is {names[0]}): "
                "DLP scores Linears only, and has nothing to plan for this architecture"
            )
        self._refuse_shared_weights()
        if not stages and (m := split_structure(self._structure)[1]):  # which check their own
            for block in self._blocks:
                check_columns(block.linears, m, "take another mask_structure")

    def _refuse_shared_weights(self) -> None:
        """Two modules with one weight would be counted twice, and pruned twice."""
        owners: dict[int, str] = {}
        with disable_onloading():  # what is stored stays the same object
            for block in self._blocks:
                for name, linear in block.linears.items():
                    other = owners.setdefault(id(linear.weight), name)
                    if other != name:
                        raise ValueError(
                            f"{other} and {name} share one weight, which would be counted and "
                            f"pruned twice: add re:{name} to the stage's ignore"
                        )

    def _common_structure(self, stages: list[host.PruningStage], plan: Plan | None) -> str:
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
            return next(iter(stated))
        return "0:0" if plan is None else plan.mask_structure

    def _choose_target(self, stages: list[host.PruningStage], plan: Plan | None) -> float:
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
        n, m = split_structure(self._structure)
        if m:
            for kind, value in stated:
                check_target(value, self._structure, f"{kind}.sparsity")
            return n / m
        if stated:
            return stated[0][1]
        if plan is not None:
            return plan.target
        raise ValueError(f"no sparsity is stated: set it in the pruning stage or in {own}")

    def _record(self, name: str, _module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._norms.add(name, args[0])

    def _score(self, block: Block) -> None:
        norms = self._norms_of(block)
        unseen = [name for name, norm in norms.items() if norm is None]
        if len(unseen) == len(norms):
            raise ValueError(
                f"no Linear of block {block.name} saw calibration data: the samples "
                "never reach it, or llm-compressor could not trace the model (it then warns "
                "of fewer subgraphs than expected); leave it out with the stage's ignore"
            )
        if unseen:
            logger.warning(
                "{} Linears of {} saw no calibration token; they are not scored and stay dense: {}",
                len(unseen),
                block.name,
                unseen,
            )
        depth = next(i for i, other in enumerate(self._blocks) if other is block)
        with ExitStack() as onloaded, torch.no_grad():
            parts = {}
            for name, linear in block.linears.items():
                norm = norms[name]
                if norm is not None:
                    onloaded.enter_context(align_module_device(linear))
                    parts[name] = (linear.weight.detach(), norm)
            score = self.score(depth, parts)
        self._scored[block.name] = (block.without(unseen).weights, score)
        logger.info("scored block {} of {}: {}", depth + 1, len(self._blocks), block.name)
        self._unseen[block.name] = unseen

    def _norms_of(self, block: Block) -> dict[str, torch.Tensor | None]:
        if self._runs_data:
            return self._norms.of(block.linears)
        return dict.fromkeys(block.linears, torch.empty(0))

    def _fitted(self, plan: Plan) -> Plan:
        """A given plan at the wanted target and strength, once it is sure to be ours."""
        if plan.method != self.method:
            raise ValueError(
                f"from_plan holds a plan of method {plan.method}, and {type(self).__name__} "
                f"makes {self.method}: use the modifier it was made with"
            )
        self._check_settings(plan)
        if plan.mask_structure != self._structure:
            known = {"0:0": "unstructured pruning"}
            remedy = (
                "search again"
                if plan.search
                else "make it fit, `dlp-plugin show plan.json --mask-structure "
                f"{self._structure} --output fitting.json`"
            )
            raise ValueError(
                f"the plan (of {plan.model}) is for "
                f"{known.get(plan.mask_structure, plan.mask_structure)}, and the stages' "
                f"mask_structure is {self._structure}: {remedy}, or state the plan's"
            )
        ours = {block.name: set(block.without(plan.unseen).linears) for block in self._blocks}
        for row in plan.blocks:
            if row.linears is not None and set(row.linears) != ours.get(row.name, set()):
                raise ValueError(
                    f"the refined plan (of {plan.model}) names other Linears in block {row.name} "
                    "than this model and its stages have: search again with the same stages"
                )
        planned = {block.name: block.weights for block in plan.blocks}
        wanted = {block.name: block.without(plan.unseen).weights for block in self._blocks}
        for name in planned | wanted:
            if planned.get(name) != wanted.get(name):
                raise ValueError(
                    f"the plan (of {plan.model}) does not match the model and stages: "
                    f"block {name} has {planned.get(name, 'no')} weights to prune in "
                    f"the plan and {wanted.get(name, 'none')} here; score this model "
                    "again with the same stages: plan_path instead of from_plan"
                )
        if any(block.linears for block in plan.blocks):
            for fed in self._stages:
                fed.check_single_linears()
            plan.check_linears(
                {name: numel for block in self._blocks for name, numel in block.sizes.items()}
            )
        given = self.strength_field in self.model_fields_set
        if self.refine or (given and self.strength == "auto"):
            raise ValueError(
                f"from_plan prunes without calibration samples, and {self.strength_field}: auto "
                "and refine judge by them: leave out the one or the other"
            )
        alpha = float(self.strength) if given else None
        return plan.at(target=self._target, alpha=alpha)

    def _check_settings(self, plan: Plan) -> None:
        """Refuse a plan whose scores were made with other settings than these."""

    def _adopt(self, plan: Plan) -> None:
        self._plan = plan
        logger.debug("The blocks' sparsities:\n{}", plan)
        if lost := [block.name for block in plan.blocks if block.sparsity == 1]:
            logger.warning(
                "These blocks will be pruned to nothing; lower {} or sparsity: {}",
                self.strength_field,
                lost,
            )
        if self.plan_path is not None and is_source_process():
            plan.save(self.plan_path)
            if self.refine:
                forget(_search_path(self.plan_path))
        for fed in self._stages:
            fed.feed(plan)


def _search_path(plan_path: str) -> str:
    return f"{plan_path}.search"


Strength = float | Literal["auto"]


def checked_strength(value: float | str, field: str) -> float | str:
    """Return ``value`` if it is a usable strength, or ``auto``.

    :raises ValueError: if it is negative or not finite (names the field)
    """
    return value if isinstance(value, str) else check_alpha(value, field)


class DLPModifier(AllocationModifier):
    """Give every block its own sparsity before SparseGPT, Wanda or magnitude prunes it.

    Dynamic Layerwise Pruning (arXiv 2505.23807): the blocks whose weights matter less
    on the calibration data are pruned harder, with the same total. Put it in front of
    the stock stages in a recipe:

    ```yaml
    pruning_stage:
      pruning_modifiers:
        DLPModifier:
          alpha: 0.15
        WandaPruningModifier:
          sparsity: 0.7
          targets: [Linear]
          ignore: ["re:.*lm_head"]
    ```

    The fields that it shares with its peers are :class:`AllocationModifier`'s.

    :param alpha: half the range of the blocks' sparsities, at least 0 (uniform); left
        out with ``from_plan``, the plan's; ``auto`` chooses by the loss of the pruned model
        on a quarter of the samples, which is then not scored on
    :param statistic: what of a block's weight scores is its unimportance: ``median``
        (the paper) or ``mean`` (the authors' released code)
    """

    alpha: Strength = 0.15
    statistic: Statistic = "median"

    method: ClassVar[Method] = "dlp"
    strength_field: ClassVar[str] = "alpha"

    @field_validator("alpha")
    @classmethod
    def _check_alpha(cls, value: float | str) -> float | str:
        return checked_strength(value, "alpha")

    @property
    def statistic_name(self) -> str:
        """The statistic of ``|W| * norm``."""
        return self.statistic

    def score(self, depth: int, parts: Mapping[str, Part]) -> float:
        """Unimportance ``U_b`` of a block."""
        return block_score(parts, self.statistic)

    def _check_settings(self, plan: Plan) -> None:
        if "statistic" in self.model_fields_set and self.statistic != plan.statistic:
            raise ValueError(
                f"statistic is {self.statistic}, but the plan's scores are a "
                f"{plan.statistic}: leave statistic out, or from_plan to score again"
            )

    def _read_as(self, plan: Plan) -> None:
        super()._read_as(plan)
        self.statistic = "mean" if plan.statistic == "mean" else "median"


def last_plans() -> list[Plan]:
    """Plans of the last ``oneshot()`` run in this process, in recipe order."""
    modifiers = host.current_modifiers()
    plans = [m.plan for m in modifiers if isinstance(m, AllocationModifier)]
    return [plan for plan in plans if plan is not None]


class _FedStage:
    """A pruning stage, what it will prune, and how it was written."""

    def __init__(
        self,
        stage: host.PruningStage,
        targets: dict[str, dict[str, torch.nn.Module]],
        block_names: list[str],
    ) -> None:
        """Find each target's block.

        :raises ValueError: if the stage prunes nothing in any block, or a target
            holds Linears of several blocks
        """
        self.stage = stage
        self.inside: dict[str, torch.nn.Module] = {}
        self._outside: list[str] = []
        self._blocks: list[str | None] = []
        self._written = (stage.sparsity, stage.ignore)
        self._targets = targets
        kind = type(stage).__name__
        for target, modules in targets.items():
            homes = {name: outer_block(name, block_names) for name in modules}
            self._outside += [name for name, home in homes.items() if home is None]
            self.inside |= {n: m for n, m in modules.items() if homes[n] is not None}
            held = sorted({home for home in homes.values() if home is not None})
            if len(held) > 1:
                raise ValueError(
                    f"{kind}.targets matches {target or 'the whole model'}, which holds "
                    f"{len(held)} blocks, and the stage takes one sparsity per match: "
                    "use targets: [Linear]"
                )
            self._blocks.append(held[0] if held else None)
        if not self.inside:
            raise ValueError(
                f"{kind} prunes no Linear in any block: its targets are "
                f"{stage.targets} (a list of class names, names or re: patterns), its "
                f"ignore {stage.ignore}, the first block is {block_names[0]}"
            )

    def check_single_linears(self) -> None:
        """Refuse targets that hold several Linears, which a refined plan tells apart.

        :raises ValueError: naming the target
        """
        for target, modules in self._targets.items():
            if len(modules) > 1:
                raise ValueError(
                    f"refine gives every Linear its own sparsity, but "
                    f"{type(self.stage).__name__}.targets matches {target or 'the whole model'}, "
                    f"which holds {len(modules)}: use targets: [Linear]"
                )

    def feed(self, plan: Plan) -> None:
        """Hand the stage one sparsity per target."""
        sparsities = {block.name: block.sparsity for block in plan.blocks}
        own = {n: s for block in plan.blocks for n, s in (block.linears or {}).items()}
        if self._outside:
            logger.warning(
                "Outside every block and left dense by {}: {}",
                type(self.stage).__name__,
                self._outside,
            )
        host.leave_dense(self.stage, self._outside + [n for n in plan.unseen if n in self.inside])
        host.set_sparsities(
            self.stage,
            [
                0.0 if block is None else own.get(next(iter(modules), ""), sparsities[block])
                for block, modules in zip(self._blocks, self._targets.values(), strict=True)
            ],
        )

    def restore(self) -> None:
        """Make the stage read as it was written."""
        self.stage.sparsity, self.stage.ignore = self._written


def _check_stage(stage: host.PruningStage, decider: str) -> None:
    """Reject what a list of sparsities cannot steer.

    :param decider: the modifier that would

    :raises ValueError: naming the stage, the field and the remedy
    """
    kind = type(stage).__name__
    structured = split_structure(stage.mask_structure) != (0, 0)
    if not isinstance(stage, Stage) and (structured or is_distributed()):
        lack = "has one N for the whole model" if structured else "does not agree over processes"
        raise ValueError(
            f"{kind} is llm-compressor's own class, which {lack}: import it from dlp_plugin, or "
            "write it in a YAML recipe"
        )
    if stage.sparsity_profile is not None:
        raise ValueError(
            f"{kind}.sparsity_profile is {stage.sparsity_profile!r}, but {decider} "
            "decides the sparsities: remove one of the two"
        )
    if isinstance(stage.sparsity, list):
        raise ValueError(
            f"{kind}.sparsity is a list, but {decider} decides the sparsities: state "
            f"the target as one number, or remove {decider}"
        )
