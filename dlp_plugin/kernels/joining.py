"""Joins packed Linears by rows into one packed Linear. This module imports nothing but torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import gcd

import torch
from torch import Tensor

from dlp_plugin.checkpoints.bits import (
    integers_of_words,
    mask_of,
    nibbles_of,
    packed,
    words_of_integers,
)
from dlp_plugin.checkpoints.stored import Stored

__all__ = ["joined_parts"]

Filed = tuple[Stored, Mapping[str, Tensor]]


def joined_parts(linears: Sequence[Filed]) -> tuple[Stored, dict[str, Tensor]]:
    """Concatenate packed Linears by rows.

    :param linears: how each Linear is stored, and its checked parts. All have the same number of
        columns, dtype and bits; kind ``planes`` is not allowed
    :return: how the result is stored, and its parts by local names
    """
    first = linears[0][0]
    shape = sum(stored.shape[0] for stored, _ in linears), first.shape[1]
    kept = sum(stored.kept for stored, _ in linears)
    masked = any(stored.masked for stored, _ in linears)
    parts: dict[str, Tensor] = {}
    if masked:
        parts["weight_packed"] = torch.cat([_mask(*linear) for linear in linears])
    if first.bits:
        size, symmetric = _integers(linears, parts)
        stored = replace(
            first, shape=shape, kept=kept, group_size=size, symmetric=symmetric, masked=masked
        )
        return stored, parts
    parts["weight_values"] = torch.cat([held["weight_values"] for _, held in linears])
    return Stored("values", shape, first.dtype, kept), parts


def _mask(stored: Stored, parts: Mapping[str, Tensor]) -> Tensor:
    if stored.masked:
        return parts["weight_packed"]
    whole = torch.ones(1, stored.shape[1], dtype=torch.bool, device=parts["weight_scale"].device)
    return mask_of(whole).expand(stored.shape[0], -1)


def _integers(linears: Sequence[Filed], parts: dict[str, Tensor]) -> tuple[int, bool]:
    """Put integers, scales and zero points into ``parts``.

    :return: the common group size, which divides the group sizes of all Linears, and whether the
        result is symmetric
    """
    bits, columns = linears[0][0].bits, linears[0][0].shape[1]
    held = [found for _, found in linears]
    if bits == 8:
        parts["weight_integers"] = torch.cat([found["weight_integers"] for found in held])
    else:
        integers = [nibbles_of(found["weight_integers"])[: one.kept] for one, found in linears]
        parts["weight_integers"] = packed(torch.cat(integers), bits)
    sizes = {stored.group_size for stored, _ in linears}
    size = sizes.pop() if len(sizes) == 1 else gcd(*(sizes - {-1}), columns)
    groups = 1 if size == -1 else columns // size

    def of(matrices: Sequence[Tensor]) -> Tensor:
        return torch.cat([one.repeat_interleave(groups // one.shape[1], 1) for one in matrices])

    parts["weight_scale"] = of([found["weight_scale"] for found in held])
    symmetric = all(stored.symmetric for stored, _ in linears)
    if not symmetric:
        zero = of([_zero(*linear) for linear in linears])
        parts["weight_zero_point"] = words_of_integers(zero.T.contiguous(), bits).T
    return size, symmetric


def _zero(stored: Stored, parts: Mapping[str, Tensor]) -> Tensor:
    """Return the unsigned zero points, uint8 ``[out, groups]``."""
    if stored.symmetric:
        middle = 1 << (stored.bits - 1)
        return torch.full_like(parts["weight_scale"], middle, dtype=torch.uint8)
    return integers_of_words(parts["weight_zero_point"].T, stored.bits, stored.shape[0]).T
