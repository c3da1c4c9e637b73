"""Weights that embeddings share with other modules, while adapters are merged into one end.

An adapter changes what its own module computes. Merged into a weight that is shared, as a head's
with the embeddings, it would change the other end with it; and twice, where peft ties adapters of
both ends (``ensure_weight_tying``), which are meant to change alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dlp_plugin.recovery.adapters import check_values
from dlp_plugin.recovery.layers import AdapterLayer, adapters_in, is_tied_to
from dlp_plugin.recovery.masks import walk


@dataclass
class _End:
    """A module that has a shared weight, and what adapts it."""

    name: str
    module: torch.nn.Module
    layers: Sequence[AdapterLayer]

    def adapters(self, adapter_names: list[str] | None) -> list[str]:
        return [name for layer in self.layers for name in adapters_in(layer, adapter_names)]

    def follows(self, other: _End, adapter_names: list[str] | None) -> bool:
        """Whether peft has tied all its adapters to those of another end."""
        mine = self.adapters(adapter_names)
        return bool(mine) and all(
            any(is_tied_to(layer, source, name) for layer in self.layers for source in other.layers)
            for name in mine
        )


@contextmanager
def untied(base: torch.nn.Module, adapter_names: list[str] | None) -> Iterator[set[str]]:
    """Give every end of an embedding's weight one of its own where adapters are merged into one.

    Afterwards those whose adapters are tied to the embedding's have its weight again; the others
    keep theirs, and the model's configuration says so. After an error all is as it was.

    :param base: the model that adapters are around
    :param adapter_names: names of the adapters to merge; None for the active ones
    :return: names of the modules that get the embedding's weight again
    :raises ValueError: if a shared weight cannot be read, or peft cannot change it
    """
    groups = _shared(base, adapter_names)
    for first, *others in groups:
        for end in others:
            check_values(end.name, end.module, _weight(end))
    parted = [(first, end, _weight(end)) for first, *others in groups for end in others]
    again = {end.name for first, end, _ in parted if end.follows(first, adapter_names)}
    for _, end, weight in parted:
        own = weight.detach().clone()
        end.module.weight = torch.nn.Parameter(own, requires_grad=weight.requires_grad)
    try:
        yield again
    except BaseException:
        for _, end, weight in parted:
            end.module.weight = weight
        raise
    for first, end, _ in parted:
        if end.name in again:
            end.module.weight = _weight(first)
    config: Any = getattr(base, "config", None)
    if parted and hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = len(again) == len(parted)


def _shared(base: torch.nn.Module, adapter_names: list[str] | None) -> list[list[_End]]:
    """The ends of each embedding's weight, that one first, where one is adapted."""
    ends: dict[int, list[_End]] = {}
    for name, module, layers, _ in walk(base):
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.nn.Parameter):
            ends.setdefault(id(weight), []).append(_End(name, module, layers))
    found = []
    for group in ends.values():
        group.sort(key=lambda end: not isinstance(end.module, torch.nn.Embedding))
        embeds = isinstance(group[0].module, torch.nn.Embedding)
        if embeds and len(group) > 1 and any(end.adapters(adapter_names) for end in group):
            found.append(group)
    return found


def _weight(end: _End) -> torch.nn.Parameter:
    weight: Any = end.module.weight
    return weight  # type: ignore[no-any-return]
