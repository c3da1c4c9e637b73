"""Sets the sparsities of pruning stages from a plan, and finds the blocks that they prune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.utils import match_named_modules
from llmcompressor.modifiers.pruning import SparseGPTModifier
from loguru import logger

from dlp_plugin.host import (
    StockStage,
    block_names,
    check_weights_are_own,
    heed_ignore,
    leave_dense,
    set_sparsities,
    stage_targets,
)
from dlp_plugin.planning.plan import Plan
from dlp_plugin.planning.structure import MaskStructure
from dlp_plugin.pruning.base import PruningStage
from dlp_plugin.scoring.blocks import Block, group_by_block, outer_block
from dlp_plugin.scoring.routers import unnamed_routers
from dlp_plugin.search.decide import search_offset

__all__ = ["FedStage", "all_blocks", "check_stage", "fed_blocks", "offset_of"]


def fed_blocks(
    model: torch.nn.Module,
    stages: Sequence[StockStage],
    sequential_targets: list[str] | None,
) -> tuple[list[Block], list[FedStage]]:
    """Find what stages will prune in the blocks of a model.

    :param model: to be pruned
    :param stages: that prune it
    :param sequential_targets: names or classes of the blocks, where the user states them
    :return: the blocks with the Linears to prune, and the stages
    :raises ValueError: naming the module or field
    """
    names = block_names(model, sequential_targets)
    fed = []
    for stage in stages:
        routers = unnamed_routers(model, stage.targets)
        fed.append(FedStage(stage, stage_targets(model, stage), names, routers))
        if not isinstance(stage, PruningStage):  # our own stages call it themselves
            heed_ignore(model, stage)
    found = {name: module for each in fed for name, module in each.inside.items()}
    return _blocks(model, found, names), fed


def all_blocks(
    model: torch.nn.Module,
    sequential_targets: list[str] | None,
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = (),
) -> list[Block]:
    """Find the blocks and the Linears to plan for if the recipe has no pruning stage.

    :param model: to be pruned
    :param sequential_targets: names or classes of the blocks, if the user states them
    :param targets: as in a stage; routers are included only if they are named
    :param ignore: as in a stage
    :return: the blocks
    :raises ValueError: as :func:`fed_blocks` does
    """
    names = block_names(model, sequential_targets)
    found = match_named_modules(model, targets, ignore)
    routers = unnamed_routers(model, targets)
    return _blocks(model, {n: m for n, m in found if n not in routers}, names)


def _blocks(
    model: torch.nn.Module, found: Mapping[str, torch.nn.Module], names: list[str]
) -> list[Block]:
    linears = {name: module for name, module in model.named_modules() if name in found}
    for name, module in linears.items():
        if outer_block(name, names) and not isinstance(module, torch.nn.Linear):
            raise ValueError(
                f"{name} is a {type(module).__name__}, and DLP scores Linears only: "
                "add it to the stage's ignore"
            )
    blocks, _ = group_by_block(linears, names)
    if not blocks:
        raise ValueError(
            f"no Linear in any block of {type(model).__name__} (the first is {names[0]}): "
            "DLP scores Linears only, and has nothing to plan for this architecture"
        )
    check_weights_are_own(model, {n: m for block in blocks for n, m in block.linears.items()})
    return blocks


class FedStage:
    """A pruning stage, its Linears, and its fields as they were written.

    :param stage: as the host runs it
    :param targets: as :func:`dlp_plugin.host.stage_targets` returns them
    :param block_names: full names of the model's blocks
    :param routers: full name to router that the stage leaves dense
    """

    def __init__(
        self,
        stage: StockStage,
        targets: dict[str, dict[str, torch.nn.Module]],
        block_names: list[str],
        routers: Mapping[str, torch.nn.Linear],
    ) -> None:
        """Find each target's block, and have the stage leave dense what lies outside all blocks.

        :param routers: the model's routers that the stage's targets do not name
        :raises ValueError: if the stage prunes nothing in any block, or a target
            holds Linears of several blocks
        """
        self.stage = stage
        self.routers = routers
        self.inside: dict[str, torch.nn.Module] = {}
        outside: list[str] = []
        self._blocks: list[str | None] = []
        self._written = (stage.sparsity, stage.ignore)
        self._targets = targets
        kind = type(stage).__name__
        for target, modules in targets.items():
            homes = {name: outer_block(name, block_names) for name in modules}
            outside += [name for name, home in homes.items() if home is None]
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
        if outside:
            logger.warning("Outside every block and left dense by {}: {}", kind, outside)
            leave_dense(stage, outside)

    @property
    def by_magnitude(self) -> bool:
        """Whether the stage ranks weights by magnitude; all others rank roughly as Wanda does."""
        return isinstance(self.stage, PruningStage) and self.stage.by_magnitude

    def check_single_linears(self) -> None:
        """Refuse targets with several Linears: a refined plan has a sparsity for each Linear.

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
        leave_dense(self.stage, [name for name in plan.unseen if name in self.inside])
        set_sparsities(
            self.stage,
            [
                0.0 if block is None else own.get(next(iter(modules), ""), sparsities[block])
                for block, modules in zip(self._blocks, self._targets.values(), strict=True)
            ],
        )

    def restore(self) -> None:
        """Restore the stage's fields as they were written."""
        self.stage.sparsity, self.stage.ignore = self._written


def offset_of(stage: StockStage) -> float:
    """Return how far below the target the sparsity is while a plan for a stage is refined.

    :param stage: that will prune by the plan
    :return: difference of the sparsities, at least 0
    """
    if isinstance(stage, PruningStage):
        return search_offset(stage.compensates, stage.repairs)
    return search_offset(isinstance(stage, SparseGPTModifier), False)


def check_stage(stage: StockStage, decider: str) -> None:
    """Refuse a stage whose sparsities a plan cannot set.

    :param stage: to check
    :param decider: name of the modifier that would set them
    :raises ValueError: naming the stage, the field and the remedy
    """
    kind = type(stage).__name__
    structured = bool(MaskStructure.parse(stage.mask_structure))
    if not isinstance(stage, PruningStage) and (structured or is_distributed()):
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
