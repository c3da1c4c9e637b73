"""Translates tensor names in a checkpoint's files to names in the transformers model.

transformers may rename tensors when it loads them, or merge several tensors into one weight, as it
does with experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from dlp_plugin.checkpoints.files import check_alike
from dlp_plugin.checkpoints.inspect import block_of
from dlp_plugin.stacking import only_stacks

if TYPE_CHECKING:  # transformers may import this module before it defines that class
    from transformers import PreTrainedModel

__all__ = ["SourceNames", "check_experts", "linears_of_blocks"]

_EXPERT = re.compile(r"(?<=experts\.)\d+(?=\.)")
Shape = Sequence[int]


class SourceNames:
    """Maps tensor names in the files to names in a model.

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
        """Find the model's weight that a tensor of the files is loaded into on its own.

        :param key: name of the tensor in the files
        :return: full name of the weight in the model; None if the tensor is merged with others, or
            the model has no such weight
        """
        full, pattern = self._renamed(key)
        return full if pattern is None and full in self._state else None

    def experts(self, key: str) -> str | None:
        """Find the model's fused weight ``[experts, ...]`` that a tensor of the files is part of.

        :param key: name in the files, of one expert's weight or of the fused weight
        :return: full name of the fused weight in the model; None if the tensor is not of experts
        """
        full, pattern = self._renamed(key)
        parts = full.split(".")
        known = "experts" in parts and (pattern is None or "experts" in pattern)
        return full if known and full in self._state and self._state[full].ndim == 3 else None

    def is_stacked(self, key: str) -> bool:
        """Whether transformers only stacks and concatenates the experts' weights when it loads.

        Weights of several kinds, such as gate and up, are concatenated along the rows.

        :param key: name in the files of one expert's weight
        """
        _, pattern = self._renamed(key)
        for each in self._converters:
            if pattern in each.source_patterns:
                return only_stacks(each)
        return False

    def shape(self, full: str) -> Shape:
        """Return the shape of a weight in the model.

        :param full: full name in the model
        """
        return tuple(self._state[full].shape)

    def has_place(self, key: str) -> bool:
        """Whether the model has a module for a tensor of the files, quantized or not.

        :param key: name of the tensor in the files
        """
        module = key.rpartition(".")[0]
        full, pattern = self._renamed(f"{module}.weight" if module else key)
        known = pattern is not None or full.rpartition(".")[0] in self._modules
        return known or self._renamed(key)[1] is not None

    def _renamed(self, key: str) -> tuple[str, str | None]:
        """Return the name in the model and, for a merged weight, the pattern that matched."""
        found: tuple[str, str | None] = rename_source_key(
            key, self._renamings, self._converters, self._prefix, self._state
        )
        return found


def linears_of_blocks(model: PreTrainedModel, keys: Iterable[str]) -> set[str]:
    """Find the Linears inside blocks among the tensors of a checkpoint.

    Experts that transformers merges are left out; :meth:`SourceNames.experts` finds them.

    :param model: on the meta device or with weights
    :param keys: names of the tensors in the files
    :return: full names of the Linears as the files have them
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
    """Check that every layer has all its experts, and that they have the same shape.

    :param names: of the model
    :param shapes: name in the files of every expert's weight, or fused weight, to its shape
    :param where: the checkpoint's folder, for errors
    :raises ValueError: naming the weight that is missing, or differs from the others
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
                f"the files of {where} hold {sum(sizes):,} weights of {full}, and in the model it "
                f"is {list(wanted)}: config.json is that of another model, or a file is missing"
            )
