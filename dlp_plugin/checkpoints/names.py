"""What transformers calls the tensors of a checkpoint's files.

It may know them by other names than the files, or make one weight of several, as of experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from dlp_plugin.checkpoints.inspect import block_of

__all__ = ["SourceNames", "linears_of_blocks"]


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
        full, converted = self._renamed(key)
        return full if not converted and full in self._state else None

    def has_place(self, key: str) -> bool:
        """Whether the model has a module for a tensor of the files, quantized or not."""
        module = key.rpartition(".")[0]
        full, converted = self._renamed(f"{module}.weight" if module else key)
        return converted or full.rpartition(".")[0] in self._modules or self._renamed(key)[1]

    def _renamed(self, key: str) -> tuple[str, bool]:
        """A name in the model, and whether it is that of one made of several."""
        full, pattern = rename_source_key(
            key, self._renamings, self._converters, self._prefix, self._state
        )
        return full, pattern is not None


def linears_of_blocks(model: PreTrainedModel, keys: Iterable[str]) -> set[str]:
    """Full names of the Linears of blocks, by the names that their weights have in the files.

    Experts, of which transformers makes one weight, are none.

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
        if full is not None and "experts" not in full.split("."):
            module = model.get_submodule(full.removesuffix(".weight"))
            if isinstance(module, torch.nn.Linear):
                linears.add(name)
    return linears
