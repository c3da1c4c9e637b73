"""Takes rows or columns out of a packed Linear without decoding it, by counting mask bits.

The result is a packed Linear again. Engines import this module, so it imports nothing but torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import pad

from dlp_plugin.checkpoints.bits import (
    integers_of_words,
    nibbles_of,
    ones,
    packed,
    words_of_integers,
)
from dlp_plugin.checkpoints.sparse_format import Stored, broken, checked

__all__ = ["narrow"]


def narrow(
    stored: Stored, parts: Mapping[str, Tensor], dim: int, start: int, length: int, name: str = ""
) -> tuple[Stored, dict[str, Tensor]]:
    """Take consecutive rows or columns out of a packed Linear.

    Decoded, the result equals ``weight.narrow(dim, start, length)``.

    :param stored: how the Linear is stored
    :param parts: local names to tensors, as :func:`~.sparse_format.decode` takes them
    :param dim: 0 for rows, 1 for columns
    :param start: index of the first row or column
    :param length: number of rows or columns
    :param name: the Linear's full name, for errors
    :return: how the slice is stored, and its tensors by local names
    :raises ValueError: as :func:`~.sparse_format.decode` does
    """
    checked(stored, parts, name)
    rows, columns = (
        slice(start, start + length) if dim == each else slice(0, size)
        for each, size in enumerate(stored.shape)
    )
    taken: dict[str, Tensor] = {}
    if stored.masked:
        mask = parts["weight_packed"]
        counts = ones(mask)
        ends = counts.cumsum(0)
        if len(ends) and int(ends[-1]) != stored.kept:
            said = f"marks {int(ends[-1])} weights, but {stored.kept} are stored"
            raise broken(name, "weight_packed", said)
        taken["weight_packed"] = _bits(mask[rows], columns)
        lengths = ones(taken["weight_packed"])
        firsts = (ends - counts)[rows] + ones(_bits(mask[rows], slice(0, columns.start)))
    else:
        device = parts["weight_scale"].device
        firsts = torch.arange(rows.start, rows.stop, device=device) * stored.shape[1]
        firsts += columns.start
        lengths = torch.full_like(firsts, columns.stop - columns.start)
    kept = int(lengths.sum())
    if dim == 0:  # rows are stored one after the other
        first = int(firsts[0]) if len(firsts) else 0
        places: slice | Tensor = slice(first, first + kept)
    else:
        places = _runs(firsts, lengths)
    for part in ("weight_fractions", "weight_values"):
        if part in parts:
            taken[part] = _at(parts[part], places)
    for part, bits in (("weight_exponents", 4), ("weight_integers", stored.bits)):
        if part in parts:
            values = parts[part] if bits == 8 else nibbles_of(parts[part])
            taken[part] = packed(_at(values, places), bits)
    if "weight_table" in parts:
        taken["weight_table"] = parts["weight_table"]
    size = _scales(stored, parts, rows, columns, taken) if stored.kind == "integers" else 0
    shape = rows.stop - rows.start, columns.stop - columns.start
    return replace(stored, shape=shape, kept=kept, group_size=size), taken


def _bits(mask: Tensor, columns: slice) -> Tensor:
    """Take columns out of a bit mask uint8 ``[rows, bytes]``."""
    count, shift = columns.stop - columns.start, columns.start % 8
    first, size = columns.start // 8, -(-count // 8)
    taken = mask[:, first : first + size]
    if shift:
        after = pad(
            mask[:, first + 1 : first + 1 + size], (0, max(0, first + 1 + size - mask.shape[1]))
        )
        taken = taken >> shift | after << (8 - shift)
    if count % 8:
        taken = taken.clone()
        taken[:, -1] &= (1 << count % 8) - 1
    return taken


def _runs(firsts: Tensor, lengths: Tensor) -> Tensor:
    """Concatenate ranges of indices: firsts [5, 9] and lengths [2, 3] give [5, 6, 9, 10, 11]."""
    before = lengths.cumsum(0) - lengths
    places = (firsts - before).repeat_interleave(lengths)
    return places + torch.arange(len(places), device=places.device)


def _at(values: Tensor, places: slice | Tensor) -> Tensor:
    return values[places] if isinstance(places, slice) else values.index_select(0, places)


def _scales(
    stored: Stored,
    parts: Mapping[str, Tensor],
    rows: slice,
    columns: slice,
    taken: dict[str, Tensor],
) -> int:
    """Put the scales and zero points of rows and columns into ``taken``; return the group size.

    If the columns begin or end inside a group, groups are split into equal smaller ones that fit.
    """
    size = stored.group_size
    if size == -1:
        groups = slice(None)
        repeats = 1
    else:
        whole, size = size, gcd(size, columns.start, columns.stop - columns.start)
        groups = slice(columns.start // size, columns.stop // size)
        repeats = whole // size

    def of(matrix: Tensor) -> Tensor:
        return matrix[rows].repeat_interleave(repeats, 1)[:, groups]

    taken["weight_scale"] = of(parts["weight_scale"])
    if not stored.symmetric:
        words = parts["weight_zero_point"].T
        zero = of(integers_of_words(words, stored.bits, stored.shape[0]).T)
        taken["weight_zero_point"] = words_of_integers(zero.T.contiguous(), stored.bits).T
    return size
