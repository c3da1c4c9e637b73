"""Calls the C library, after checking the tensors that it gets."""

from __future__ import annotations

import ctypes
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dlp_plugin.kernels.layout import Layout, tensors_of
from dlp_plugin.kernels.library import Weight, chosen, library, parallel

__all__ = ["run_expand", "run_multiply"]

_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
# Layout to the addresses and dtypes of its tensors when they were checked, and the C struct.
_known: WeakKeyDictionary[Layout, tuple[list[tuple[int, torch.dtype]], Weight]] = (
    WeakKeyDictionary()
)


def run_multiply(layout: Layout, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Compute ``x W^T + bias``.

    :param layout: of W
    :param x: contiguous ``[rows, in]``, of few rows
    :param bias: contiguous float32 ``[out]``
    :param out: contiguous ``[rows, out]``, of the dtype of ``x``; it gets the result
    :raises ValueError: if the layout's tensors have changed shape, dtype or device
    :raises MemoryError: if there is no memory for intermediate results
    """
    done = library().dlp_multiply(
        ctypes.byref(_weight(layout)),
        chosen(),
        x.data_ptr(),
        len(x),
        _DTYPES[x.dtype],
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
        parallel(),
    )
    _check(done)


def run_expand(layout: Layout, first: int, last: int, out: Tensor) -> None:
    """Expand rows of the weight to dense rows.

    :param layout: of the weight
    :param first: index of the first row
    :param last: index after the last row
    :param out: contiguous ``[last - first, in]``, of the weight's dtype or float32; it gets the
        result
    :raises ValueError: if the layout's tensors have changed shape, dtype or device
    :raises MemoryError: if there is no memory for intermediate results
    """
    done = library().dlp_expand(
        ctypes.byref(_weight(layout)),
        chosen(),
        first,
        last,
        _DTYPES[out.dtype],
        out.data_ptr(),
        torch.get_num_threads(),
        parallel(),
    )
    _check(done)


def _weight(layout: Layout) -> Weight:
    """Return the C struct of a weight; it is made anew if its tensors are new or have moved."""
    places = [(one.data_ptr(), one.dtype) for one in layout.tensors.values()]
    known = _known.get(layout)
    if known is None or known[0] != places:
        known = places, _described(layout)
        _known[layout] = known
    return known[1]


def _described(layout: Layout) -> Weight:
    spec, tensors = layout.spec, layout.tensors
    found = {name: (tuple(one.shape), one.dtype) for name, one in tensors.items()}
    where = {one.device.type for one in tensors.values()}
    whole = all(one.is_contiguous() for one in tensors.values())
    if found != tensors_of(spec) or where != {"cpu"} or not whole:
        raise ValueError(
            f"the tensors of packed weights are {found} instead of {tensors_of(spec)}: keep them "
            "as they were loaded"
        )
    rows, columns = spec.shape
    at = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    return Weight(
        rows=rows,
        columns=columns,
        words=-(-columns // 64),
        mask=at.get("mask"),
        starts=at.get("starts"),
        packed=at[spec.kind],
        scale=at.get("scale"),
        zero=at.get("zero"),
        groups=spec.groups if spec.kind == "integers" else 0,
        bits=spec.bits,
        dtype=_DTYPES[spec.dtype],
    )


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("there is no memory for a product with packed weights")
