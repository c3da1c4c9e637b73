"""Multiplies by a weight of which some rows are packed and others dense.

Engines join Linears that take the same inputs, such as q, k and v. Some of these may be dense, and
the packed ones may be of different kinds. This module imports nothing but torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby

import torch
from torch import Tensor

from dlp_plugin.engines.slices import LazyWeight
from dlp_plugin.kernels.layout import Layout, joined
from dlp_plugin.kernels.products import linear

__all__ = ["Product", "pieces_of", "product_of"]

Product = Callable[[Tensor, Tensor | None], Tensor]
"""A function of inputs and bias that returns ``x W^T + bias``."""


def pieces_of(weight: Tensor, taken: Mapping[int, LazyWeight]) -> list[Layout | Tensor]:
    """Split a weight into packed and dense pieces, as few as possible.

    :param weight: ``[out, in]``; only its dense rows are read, the others were never written
    :param taken: first row of every packed piece to that piece
    :return: pieces in the order of the rows, a layout for packed rows and a tensor for dense ones
    :raises ValueError: as :func:`~.layout.layout_of` does
    """
    found: list[Layout | Tensor] = []
    last = 0
    for first in sorted(taken):
        if first > last:
            found.append(weight[last:first].clone())
        found.append(taken[first].as_layout())
        last = first + taken[first].shape[0]
    if last < len(weight):
        found.append(weight[last:].clone())
    return list(_joined(found))


def _joined(pieces: list[Layout | Tensor]) -> Iterator[Layout | Tensor]:
    for _, group in groupby(pieces, _kind):
        layouts = []
        for piece in group:
            if isinstance(piece, Layout):
                layouts.append(piece)
            else:
                yield piece
        if layouts:
            yield joined(layouts) if len(layouts) > 1 else layouts[0]


def _kind(piece: Layout | Tensor) -> tuple[torch.dtype, int] | None:
    """Return a key that is equal for layouts that can be joined; None for dense rows."""
    return (piece.spec.dtype, piece.spec.bits) if isinstance(piece, Layout) else None


def product_of(
    pieces: list[Layout | Tensor], product_of_dense: Callable[[Tensor], Product]
) -> Product:
    """Make the function that multiplies by all pieces and concatenates the outputs.

    :param pieces: in the order of the rows
    :param product_of_dense: makes the function that multiplies by dense rows
    :return: the function
    """
    products = [
        _product_of_packed(piece) if isinstance(piece, Layout) else product_of_dense(piece)
        for piece in pieces
    ]
    if len(products) == 1:
        return products[0]
    sizes = [piece.spec.shape[0] if isinstance(piece, Layout) else len(piece) for piece in pieces]

    def side_by_side(x: Tensor, bias: Tensor | None) -> Tensor:
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        return torch.cat([one(x, b) for one, b in zip(products, biases, strict=True)], -1)

    return side_by_side


def _product_of_packed(layout: Layout) -> Product:
    return lambda x, bias: linear(x, layout, bias)
