"""The product of a Linear of which some rows are packed and others dense.

Engines join Linears that take the same inputs, such as q, k and v; not all of them need be packed,
or be packed alike. This module needs torch alone.
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
"""Of inputs and a bias: ``x W^T + bias``."""


def pieces_of(weight: Tensor, taken: Mapping[int, LazyWeight]) -> list[Layout | Tensor]:
    """The rows of a weight from the first to the last, as few pieces as there can be.

    :param weight: its dense rows, and what has never been written to in place of the others
    :param taken: the others, by their first row
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
    """What layouts that can be joined have in common."""
    return (piece.spec.dtype, piece.spec.bits) if isinstance(piece, Layout) else None


def product_of(
    pieces: list[Layout | Tensor], product_of_dense: Callable[[Tensor], Product]
) -> Product:
    """What multiplies by all pieces.

    :param product_of_dense: what multiplies by dense rows
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
