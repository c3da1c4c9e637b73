"""Calls of the library with tensors that were looked at."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dlp_plugin.kernels.layout import Layout
from dlp_plugin.kernels.library import Weight, chosen, library, parallel

__all__ = ["run_expand", "run_multiply"]

_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def run_multiply(layout: Layout, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write ``x W^T + bias``.

    :param x: contiguous ``[rows, in]``, of few rows
    :param bias: contiguous float32 ``[out]``
    :param out: contiguous ``[rows, out]``, of the dtype of ``x``
    :raises MemoryError: if there is none for what is in between
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
    """Write rows of the weight with their zeros.

    :param out: contiguous ``[last - first, in]``, of the weight's dtype or float32
    :raises MemoryError: if there is none for what is in between
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
    spec, tensors = layout.spec, layout.tensors
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
