"""Which Linears of a model route tokens to experts, by full name."""

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
    """Routers that a class in ``targets`` takes in with all other Linears, and no entry names.

    They hold few weights, decide what every other one is used for, and engines build them dense.
    One lies beside the experts, is called a gate or router, and has an output for each expert or
    a single one (Qwen3-Next's ``shared_expert_gate``).

    :param targets: class names, names or ``re:`` patterns
    """
    return {
        name: linear
        for name, linear in _routers(model)
        if not any(match_name(name, target) for target in targets)
    }


def left_routers(
    model: torch.nn.Module, who: str, targets: Collection[str], found: Collection[str]
) -> list[str]:
    """Full names of the routers that are to be left dense; tells of them, and of others.

    :param who: the modifier that leaves them
    :param targets: its entries that select modules
    :param found: full names of what they match
    :raises ValueError: if an entry names nothing but routers that are no Linears
    """
    _check_targets(model, who, targets)
    unnamed = unnamed_routers(model, targets)
    names = [name for name in unnamed if name in found]
    named = [name for name, _ in _routers(model) if name in found and name not in unnamed]
    if names:
        logger.info(
            "{} leaves routers dense: {}; to have them too, add '{}' to its targets",
            who,
            _first(names),
            router_pattern(names[0]),
        )
    if named:
        logger.warning(
            "{} has routers among its targets, which decide what experts are used for: {}; to "
            "leave them dense, add '{}' to its ignore",
            who,
            _first(named),
            router_pattern(named[0]),
        )
    return names


def _check_targets(model: torch.nn.Module, who: str, targets: Collection[str]) -> None:
    """Refuse an entry that names routers in vain: most are no Linears."""
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
    """An entry of ``targets`` that names a router, and those of other blocks."""
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
    """How many experts a module holds: in a list, or stacked in its parameters; 0 for none."""
    if "expert" not in f"{name} {type(module).__name__}".lower():
        return 0
    if isinstance(module, torch.nn.ModuleList):
        return sum(part.isdecimal() for part, _ in module.named_children())
    with disable_onloading():  # shapes are known without reading weights
        stacked = [len(each) for each in module.parameters(recurse=False) if each.ndim == 3]
    return max(stacked, default=0)
