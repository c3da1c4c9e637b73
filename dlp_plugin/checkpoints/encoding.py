"""Encodes a Linear, or the experts of a layer, when a checkpoint is packed."""

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
"""Local names of a pack-quantized Linear's tensors; only the last one is optional."""


def pruned_experts(tensor: Tensor) -> list[tuple[Stored, dict[str, Tensor]]] | None:
    """Encode every expert of a fused weight.

    :param tensor: ``[experts, out, in]``
    :return: for each expert how it is stored and its tensors by local names; None if the tensor
        as a whole is not pruned or would not shrink
    """
    if tensor.dtype not in FLOATS.values():
        return None
    found = [encode_anyway(each) for each in tensor]
    size = sum(size_of(parts) for _, parts in found)
    kept = sum(stored.kept for stored, _ in found)
    return found if size < tensor.nbytes and _is_pruned(kept, tensor) else None


def pruned(weight: Tensor) -> tuple[Stored, dict[str, Tensor]] | None:
    """Encode the weight of a Linear that is not quantized.

    :param weight: ``[out, in]``
    :return: how it is stored and its tensors by local names; None if it is not pruned or would
        not shrink
    """
    found = encode(weight)
    return found if found and _is_pruned(found[0].kept, weight) else None


def _is_pruned(kept: int, tensor: Tensor) -> bool:
    """Whether at least a sixteenth of the weights are zero.

    The table of exponents shrinks Linears without zeros too. These stay dense, because engines
    build some of them, such as routers, without asking a quantization method.
    """
    return 16 * kept <= 15 * tensor.numel()


def quantized(
    where: str, held: Mapping[str, Tensor], bits: set[int]
) -> tuple[Stored, dict[str, Tensor]]:
    """Encode a pack-quantized Linear.

    :param where: file and full name, for errors
    :param held: the Linear's tensors by their local names
    :param bits: the bit widths that the checkpoint's integers may have
    :return: how the Linear is stored and its tensors by local names
    :raises ValueError: if a tensor is missing, or is not packed as compressed-tensors packs it
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
