"""Finds the blocks of a model and the Linears inside them, by full name."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.utils import match_named_modules

__all__ = ["Block", "check_columns", "find_blocks", "group_by_block", "outer_block"]


@dataclass(frozen=True)
class Block:
    """A decoder or encoder layer, with the Linears of it that are to be pruned.

    :param name: full name in the model, e.g. ``model.layers.3``
    :param linears: full name to Linear, in the model's order
    """

    name: str
    linears: Mapping[str, torch.nn.Linear]

    @property
    def weights(self) -> int:
        """Number of weights of all its Linears."""
        return sum(self.sizes.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Full name of every Linear to its number of weights, ``out * in``."""
        return {name: lin.out_features * lin.in_features for name, lin in self.linears.items()}

    def without(self, names: Collection[str]) -> Block:
        """Return the block without some of its Linears.

        :param names: full names of the Linears to leave out; others are ignored
        """
        kept = {name: lin for name, lin in self.linears.items() if name not in names}
        return Block(self.name, kept)


def find_blocks(model: torch.nn.Module, sequential_targets: str | Iterable[str]) -> list[str]:
    """Find the model's blocks.

    :param model: any module
    :param sequential_targets: class names, full names or ``re:`` patterns, as llm-compressor infers
        them; if a match lies inside another, the outer one is the block
    :return: full names in the model's order
    """
    if isinstance(sequential_targets, str):
        sequential_targets = [sequential_targets]
    names: list[str] = []
    for name, _ in match_named_modules(model, sequential_targets):
        if outer_block(name, names) is None:
            names.append(name)
    return names


def outer_block(name: str, blocks: Iterable[str]) -> str | None:
    """Return the block that a module is or lies in.

    :param name: full name of the module
    :param blocks: full names of blocks
    :return: full name of the block; None if the module is outside all blocks
    """
    parents = name.split(".")
    prefixes = {".".join(parents[: end + 1]) for end in range(len(parents))}
    return next((block for block in blocks if block in prefixes), None)


def group_by_block(
    linears: Mapping[str, torch.nn.Linear], blocks: Iterable[str]
) -> tuple[list[Block], list[str]]:
    """Sort Linears into their blocks.

    :param linears: full name to Linear
    :param blocks: full names of the blocks, in the model's order
    :return: the blocks that hold at least one of the Linears, and the full names of the Linears
        outside all blocks
    """
    members: dict[str, dict[str, torch.nn.Linear]] = {name: {} for name in blocks}
    outside: list[str] = []
    for name, linear in linears.items():
        block = outer_block(name, members)
        if block is None:
            outside.append(name)
        else:
            members[block][name] = linear
    return [Block(name, held) for name, held in members.items() if held], outside


def check_columns(modules: Mapping[str, torch.nn.Module], m: int, remedy: str) -> None:
    """Check that every row divides into groups of M consecutive weights.

    :param modules: full name to module with a weight ``[out, ...]``
    :param m: M of the N:M pattern
    :param remedy: what the error advises
    :raises ValueError: naming the first module whose rows do not divide
    """
    with disable_onloading():  # only shapes are needed, not the weights
        for name, module in modules.items():
            columns = math.prod(module.get_parameter("weight").shape[1:])
            if columns % m:
                raise ValueError(
                    f"{name} has {columns} columns, which is not a multiple of {m}: {remedy}"
                )
