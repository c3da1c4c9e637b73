"""What a Linear, or a layer's experts, are stored as when a checkpoint is packed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dlp_plugin.checkpoints.bits import integers_of_words, words_for, words_of_integers
from dlp_plugin.checkpoints.sparse_format import (
    Stored,
    encode,
    encode_anyway,
    encode_integers,
    size_of,
)
from dlp_plugin.checkpoints.stored import FLOATS

__all__ = ["LOCALS", "pruned", "pruned_experts", "quantized"]

LOCALS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
"""A pack-quantized Linear's own tensors; only the last may be missing."""


def pruned_experts(tensor: Tensor) -> list[tuple[Stored, dict[str, Tensor]]] | None:
    """Every expert of a tensor ``[experts, ...]``; None where they are not pruned, as a whole."""
    if tensor.dtype not in FLOATS.values():
        return None
    found = [encode_anyway(each) for each in tensor]
    size = sum(size_of(parts) for _, parts in found)
    kept = sum(stored.kept for stored, _ in found)
    return found if size < tensor.nbytes and _is_pruned(kept, tensor) else None


def pruned(weight: Tensor) -> tuple[Stored, dict[str, Tensor]] | None:
    """A dense Linear as it is stored; None where it is not pruned."""
    found = encode(weight)
    return found if found and _is_pruned(found[0].kept, weight) else None


def _is_pruned(kept: int, tensor: Tensor) -> bool:
    """Whether enough of its weights are zero.

    A table of exponents shrinks unpruned Linears too, but engines build some of these where they
    ask no quantization method.
    """
    return 16 * kept <= 15 * tensor.numel()


def quantized(
    where: str, held: Mapping[str, Tensor], bits: set[int]
) -> tuple[Stored, dict[str, Tensor]]:
    """A pack-quantized Linear as it is stored.

    :param where: file and full name, for errors
    :param held: its tensors by their local names
    :param bits: how many its integers may have
    """
    if missing := [local for local in LOCALS[:3] if local not in held]:
        raise ValueError(f"{where} lacks {missing[0]}: save the checkpoint again")
    words, scale, shape = (held[local] for local in LOCALS[:3])
    rows, columns = shape.tolist()
    known = [each for each in bits if words.shape == (rows, words_for(columns, each))]
    groups = scale.shape[-1]
    if len(known) == 1 and scale.shape == (rows, groups) and columns % groups == 0:
        integers = integers_of_words(words, known[0], columns)
        if torch.equal(words_of_integers(integers, known[0]), words):
            zero = held.get("weight_zero_point")
            size = -1 if groups == 1 else columns // groups
            return encode_integers(integers, scale, zero, bits=known[0], group_size=size)
    found = ", ".join(f"{local} {list(tensor.shape)}" for local, tensor in held.items())
    raise ValueError(
        f"{where} of {rows} x {columns} is not as compressed-tensors packs it ({found}): quantize "
        "it again, or pack the dense checkpoint"
    )
