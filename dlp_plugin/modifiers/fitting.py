"""Checks that a given plan fits the model, its pruning stages and the modifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dlp_plugin.modifiers.feeding import FedStage
from dlp_plugin.planning.methods import METHODS
from dlp_plugin.planning.plan import Plan
from dlp_plugin.planning.structure import MaskStructure
from dlp_plugin.scoring.blocks import Block, outer_block
from dlp_plugin.scoring.routers import router_pattern

if TYPE_CHECKING:
    import torch

__all__ = ["check_fits"]


def check_fits(
    plan: Plan,
    method: str,
    settings: Mapping[str, object],
    structure: MaskStructure,
    blocks: Sequence[Block],
    stages: Sequence[FedStage],
) -> None:
    """Check that a plan fits the model, its pruning stages and the modifier.

    :param plan: to check
    :param method: name of the modifier's method
    :param settings: the method's settings that the user has stated
    :param structure: mask structure of the stages
    :param blocks: the model's blocks with the Linears that the stages prune
    :param stages: that will prune by the plan
    :raises ValueError: naming the part that does not fit, and the remedy
    """
    _check_method(plan, method, settings)
    _check_structure(plan, structure)
    _check_routers(plan, blocks, stages)
    _check_blocks(plan, blocks)
    if any(block.linears for block in plan.blocks):
        for fed in stages:
            fed.check_single_linears()
        plan.check_linears({name: numel for block in blocks for name, numel in block.sizes.items()})


def _check_method(plan: Plan, method: str, settings: Mapping[str, object]) -> None:
    if plan.method != method:
        raise ValueError(
            f"from_plan holds a plan of method {plan.method}, but {METHODS[method].modifier} "
            f"makes plans of {method}: use the modifier that made the plan"
        )
    planned = plan.scored_by.settings
    for name, value in settings.items():
        if value != planned[name]:
            raise ValueError(
                f"{name} is {value}, but the plan's scores were made with {planned[name]}: "
                f"leave {name} out, or from_plan to score again"
            )


def _check_structure(plan: Plan, structure: MaskStructure) -> None:
    if plan.mask_structure == structure:
        return
    remedy = (
        "search again"
        if plan.search
        else "make it fit, `dlp-plugin show plan.json --mask-structure "
        f"{structure} --output fitting.json`"
    )
    raise ValueError(
        f"the plan (of {plan.model}) is for "
        f"{plan.mask_structure or 'unstructured pruning'}, and the stages' "
        f"mask_structure is {structure}: {remedy}, or state the plan's"
    )


def _check_routers(plan: Plan, blocks: Sequence[Block], stages: Sequence[FedStage]) -> None:
    """Refuse a plan of an older version that counts routers, which stages now leave dense."""
    routers = {name: linear for fed in stages for name, linear in fed.routers.items()}
    ours = {block.name: block.without(plan.unseen) for block in blocks}
    counted: dict[str, torch.nn.Linear] = {}
    for row in plan.blocks:
        own = Block(row.name, {n: m for n, m in routers.items() if outer_block(n, [row.name])})
        if row.name not in ours or row.weights != ours[row.name].weights + own.weights:
            return  # _check_blocks refuses such a plan
        counted |= own.linears
    if counted:
        entries = sorted({router_pattern(name) for name in counted})
        raise ValueError(
            f"the plan (of {plan.model}) counts routers ({next(iter(counted))}), which stay dense "
            f"unless the stage's targets name them: add {', '.join(map(repr, entries))} to targets "
            "to prune them by it, or score again"
        )


def _check_blocks(plan: Plan, blocks: Sequence[Block]) -> None:
    ours = {block.name: block.without(plan.unseen) for block in blocks}
    for row in plan.blocks:
        linears = ours[row.name].linears if row.name in ours else {}
        if row.linears is not None and set(row.linears) != set(linears):
            raise ValueError(
                f"the refined plan (of {plan.model}) names other Linears in block {row.name} "
                "than this model and its stages have: search again with the same stages"
            )
    planned = {row.name: row.weights for row in plan.blocks}
    wanted = {name: block.weights for name, block in ours.items()}
    for name in planned | wanted:
        if planned.get(name) != wanted.get(name):
            raise ValueError(
                f"the plan (of {plan.model}) does not match the model and stages: "
                f"block {name} has {planned.get(name, 'no')} weights to prune in "
                f"the plan and {wanted.get(name, 'none')} here; score this model "
                "again with the same stages: plan_path instead of from_plan"
            )
