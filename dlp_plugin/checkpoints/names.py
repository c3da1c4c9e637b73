"""What transformers calls the tensors of a checkpoint's files.

It may know them by other names than the files, or make one weight of several, as of experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)

from dlp_plugin.checkpoints.files import check_alike
from dlp_plugin.checkpoints.inspect import block_of

if TYPE_CHECKING:  # transformers may import this module before that class is made
    from transformers import PreTrainedModel

__all__ = ["SourceNames", "check_experts", "linears_of_blocks", "only_stacks"]

_EXPERT = re.compile(r"(?<=experts\.)\d+(?=\.)")
# How transformers stacks experts: operation and dimension; the second where of several kinds
_STACKED = [(MergeModulelist, 0), (Concatenate, 1)]
Shape = Sequence[int]


class SourceNames:
    """Names in the files to names in a model.

    :param model: on the meta device or with weights
    """

    def __init__(self, model: PreTrainedModel) -> None:
        transforms = get_model_conversion_mapping(model)
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._prefix = model.base_model_prefix
        self._state: dict[str, Any] = model.state_dict()
        self._modules = {name for name, _ in model.named_modules()}

    def weight(self, key: str) -> str | None:
        """Full name in the model of a tensor that is one of its weights; None of another.

        :param key: its name in the files
        """
        full, pattern = self._renamed(key)
        return full if pattern is None and full in self._state else None

    def experts(self, key: str) -> str | None:
        """Full name in the model of a layer's experts' weights ``[experts, ...]``.

        :param key: name in the files of a weight of one of them, or of them all; None of another
        """
        full, pattern = self._renamed(key)
        parts = full.split(".")
        known = "experts" in parts and (pattern is None or "experts" in pattern)
        return full if known and full in self._state and self._state[full].ndim == 3 else None

    def is_stacked(self, key: str) -> bool:
        """Whether the weight that an expert's is part of is a stack of such, and no more."""
        _, pattern = self._renamed(key)
        for each in self._converters:
            if pattern in each.source_patterns:
                return only_stacks(each)
        return False

    def shape(self, full: str) -> Shape:
        """The shape of a weight in the model.

        :param full: its full name there
        """
        return tuple(self._state[full].shape)

    def has_place(self, key: str) -> bool:
        """Whether the model has a module for a tensor of the files, quantized or not."""
        module = key.rpartition(".")[0]
        full, pattern = self._renamed(f"{module}.weight" if module else key)
        known = pattern is not None or full.rpartition(".")[0] in self._modules
        return known or self._renamed(key)[1] is not None

    def _renamed(self, key: str) -> tuple[str, str | None]:
        """A name in the model, and of one made of several the pattern that tells."""
        found: tuple[str, str | None] = rename_source_key(
            key, self._renamings, self._converters, self._prefix, self._state
        )
        return found


def only_stacks(transform: WeightTransform | None) -> TypeGuard[WeightConverter]:
    """Whether transformers makes a weight by stacking those of experts, and by nothing more.

    Of several kinds of them, such as gate and up, they lie one behind the other.
    """
    if not isinstance(transform, WeightConverter):
        return False
    steps = [(type(step), getattr(step, "dim", None)) for step in transform.operations]
    return steps == _STACKED[: len(transform.source_patterns)]


def linears_of_blocks(model: PreTrainedModel, keys: Iterable[str]) -> set[str]:
    """Full names of the Linears of blocks, by the names that their weights have in the files.

    Experts of which transformers makes one weight are none: see :meth:`SourceNames.experts`.

    :param model: on the meta device or with weights
    :param keys: names of the files' tensors
    """
    names = SourceNames(model)
    linears = set()
    for key in keys:
        name, _, local = key.rpartition(".")
        if local not in ("weight", "weight_packed") or block_of(name) is None:
            continue
        full = names.weight(f"{name}.weight")
        if full is not None:
            module = model.get_submodule(full.removesuffix(".weight"))
            if isinstance(module, torch.nn.Linear):
                linears.add(name)
    return linears


def check_experts(names: SourceNames, shapes: Mapping[str, Shape], where: str) -> None:
    """Make sure that the experts of every layer are all there, of one shape.

    :param names: of the model
    :param shapes: name in the files of every expert's weight, or of fused ones, to its shape
    :param where: the folder they are from, for errors
    :raises ValueError: naming the weight that is missing, or is unlike the others
    """
    layers: dict[str, dict[str, dict[str, Shape]]] = {}
    for key, shape in shapes.items():
        layer = layers.setdefault(names.experts(key) or "", {})
        layer.setdefault(_EXPERT.sub("{}", key), {})[key] = tuple(shape)
    layers.pop("", None)
    for full, kinds in layers.items():
        wanted = names.shape(full)
        count = wanted[0]
        for kind, held in kinds.items():
            check_alike(kind, held, count if "{}" in kind else 1, where)
        sizes = [prod(shape) for held in kinds.values() for shape in held.values()]
        if sum(sizes) != prod(wanted):
            raise ValueError(
                f"the files of {where} hold {sum(sizes):,} weights of {full}, and the model has "
                f"{list(wanted)}: config.json is that of another model, or a file is missing"
            )
