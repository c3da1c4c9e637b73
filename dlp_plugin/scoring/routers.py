"""Finds the routers of a model: Linears that choose experts for tokens, by full name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.utils.match import match_name
from loguru import logger

__all__ = ["left_routers", "router_pattern", "unnamed_routers"]

_ROUTES = re.compile(r"(.*_)?(gate|router)")


def unnamed_routers(model: torch.nn.Module, targets: Collection[str]) -> dict[str, torch.nn.Linear]:
    """Find the routers that no entry of ``targets`` names, though a class name may match them.

    Routers should stay dense: they have few weights, control the use of all experts, and engines
    build them dense. A router is a Linear beside the experts that is called ``gate`` or
    ``router``. It has one output per expert or a single output (``shared_expert_gate`` of
    Qwen3-Next).

    :param model: any module
    :param targets: class names, full names or ``re:`` patterns
    :return: full name to router
    """
    return {
        name: linear
        for name, linear in _routers(model)
        if not any(match_name(name, target) for target in targets)
    }


def left_routers(
    model: torch.nn.Module, who: str, targets: Collection[str], found: Collection[str]
) -> list[str]:
    """Find the routers that a modifier leaves dense; log these, and warn of those that it prunes.

    :param model: any module
    :param who: name of the modifier, for log and error
    :param targets: the modifier's entries that select modules
    :param found: full names of the modules that the entries match
    :return: full names of the routers left dense
    :raises ValueError: if an entry matches only routers that are not Linears
    """
    _check_targets(model, who, targets)
    unnamed = unnamed_routers(model, targets)
    names = [name for name in unnamed if name in found]
    named = [name for name, _ in _routers(model) if name in found and name not in unnamed]
    if names:
        logger.info(
            "{} leaves routers dense: {}; to prune them too, add '{}' to its targets",
            who,
            _first(names),
            router_pattern(names[0]),
        )
    if named:
        logger.warning(
            "{} prunes routers, which choose the experts for each token: {}; to leave them dense, "
            "add '{}' to its ignore",
            who,
            _first(named),
            router_pattern(named[0]),
        )
    return names


def _check_targets(model: torch.nn.Module, who: str, targets: Collection[str]) -> None:
    """Refuse an entry that matches only routers that are not Linears, as in most models."""
    for entry in targets:
        found = {n: m for n, m in model.named_modules() if match_name(n, entry)}
        name = next(iter(found), "")
        if found and all(
            _ROUTES.fullmatch(n.rpartition(".")[2])
            and not any(isinstance(each, torch.nn.Linear) for each in m.modules())
            for n, m in found.items()
        ):
            raise ValueError(
                f"{who}.targets holds {entry!r}, which matches {name}, a router of the class "
                f"{type(found[name]).__name__}; only Linears are pruned: remove it"
            )


def _first(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def router_pattern(name: str) -> str:
    """Return an entry for ``targets`` that matches a router and those of other blocks.

    :param name: full name of the router
    :return: a ``re:`` pattern
    """
    return rf"re:.*\.{re.escape(name.rpartition('.')[2])}$"


def _routers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear]]:
    for holder, module in model.named_modules():
        numbers = {_experts(name, child) for name, child in module.named_children()} - {0}
        for child_name, child in module.named_children() if numbers else ():
            if _ROUTES.fullmatch(child_name):
                for below, linear in child.named_modules(prefix=child_name):
                    if isinstance(linear, torch.nn.Linear) and linear.out_features in {1, *numbers}:
                        yield f"{holder}.{below}".strip("."), linear


def _experts(name: str, module: torch.nn.Module) -> int:
    """Count a module's experts, in a list or in fused parameters; 0 if it has none."""
    if "expert" not in f"{name} {type(module).__name__}".lower():
        return 0
    if isinstance(module, torch.nn.ModuleList):
        return sum(part.isdecimal() for part, _ in module.named_children())
    with disable_onloading():  # only shapes are needed, not the weights
        stacked = [len(each) for each in module.parameters(recurse=False) if each.ndim == 3]
    return max(stacked, default=0)
