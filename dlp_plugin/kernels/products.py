"""``x W^T`` with W as it is stored, as an operator that torch knows.

The operator compiles, and has a gradient with respect to ``x`` and the bias; the weight is
frozen. This module needs torch alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from json import loads
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dlp_plugin.checkpoints.stored import Stored
from dlp_plugin.kernels.calls import run_expand, run_multiply
from dlp_plugin.kernels.layout import Layout, dense, tensors_of
from dlp_plugin.kernels.library import missing
from dlp_plugin.precision import is_native

__all__ = ["available", "linear"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_FEW = 64  # rows of x that our own kernels take: torch gains from more of them
_BLOCK = 1 << 21  # bytes of W that are expanded at a time for more: they stay in the cache


def available() -> str | None:
    """None where kernels run; otherwise, in one sentence, why none does and what to do.

    :raises ValueError: if the variable ``DLP_KERNELS`` is none of what it may be
    """
    return missing()


def linear(x: Tensor, layout: Layout, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias``, summed in float32, in the dtype of ``x``.

    :param x: ``[..., in]`` on the CPU, in bfloat16, float16 or float32
    :param bias: ``[out]``
    :return: ``[..., out]``
    :raises ValueError: if a tensor is on another device, or of a dtype or shape that cannot be
    """
    tensors = list(layout.tensors.values())
    devices = {one.device.type for one in (x, *tensors)}
    if devices != {"cpu"}:
        raise ValueError(
            "packed weights are multiplied on the CPU, and here are tensors on "
            f"{' and '.join(sorted(devices))}: load the dense model for other devices"
        )
    found: Tensor = _linear(x, tensors, layout.said, bias)
    return found


@torch.library.custom_op("dlp_plugin::linear", mutates_args=(), device_types="cpu")
def _linear(x: Tensor, tensors: Sequence[Tensor], spec: str, bias: Tensor | None) -> Tensor:
    layout = _again(x, tensors, spec, 1)
    count = layout.spec.shape[0]
    if bias is not None and (bias.shape != (count,) or bias.device.type != "cpu"):
        raise ValueError(f"the bias is {list(bias.shape)} on {bias.device}, not [{count}] on cpu")
    if _without_kernel(layout):
        dtype = _dtype_for(x, layout)
        bias = None if bias is None else bias.to(dtype)
        return functional.linear(x.to(dtype), dense(layout, dtype), bias).to(x.dtype)
    out = x.new_empty((*x.shape[:-1], count))
    flat = _flat(x).contiguous()
    bias = None if bias is None else bias.float().contiguous()
    if len(flat) <= _FEW:
        run_multiply(layout, flat, bias, out)
    else:
        _by_blocks(layout, flat, bias, out.view(len(flat), count))
    return out


@_linear.register_fake
def _(x: Tensor, tensors: Sequence[Tensor], spec: str, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], _spec(spec).shape[0]))


@torch.library.custom_op("dlp_plugin::linear_backward", mutates_args=(), device_types="cpu")
def _backward(gradient: Tensor, tensors: Sequence[Tensor], spec: str) -> Tensor:
    layout = _again(gradient, tensors, spec, 0)
    width = layout.spec.shape[1]
    wide = _flat(gradient).to(_dtype_for(gradient, layout))
    if _without_kernel(layout):
        product = wide @ dense(layout, wide.dtype)
        return product.to(gradient.dtype).view(*gradient.shape[:-1], width)
    total = torch.zeros(len(wide), width)
    for rows, weight in _blocks(layout, wide.dtype):
        total += wide[:, rows] @ weight
    return total.to(gradient.dtype).view(*gradient.shape[:-1], width)


@_backward.register_fake
def _(gradient: Tensor, tensors: Sequence[Tensor], spec: str) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], _spec(spec).shape[1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.tensors, ctx.spec, _ = inputs


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    x = _backward(gradient, ctx.tensors, ctx.spec) if ctx.needs_input_grad[0] else None
    bias = _flat(gradient).sum(0) if ctx.needs_input_grad[3] else None
    return x, [None] * len(ctx.tensors), None, bias


_linear.register_autograd(_gradients, setup_context=_setup)


def _by_blocks(layout: Layout, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Many rows of x: torch multiplies rows of the weight that were expanded into the cache."""
    wide = x.to(_dtype_for(x, layout))
    bias = None if bias is None else bias.to(wide.dtype)
    for rows, weight in _blocks(layout, wide.dtype):
        some = None if bias is None else bias[rows]
        out[:, rows] = functional.linear(wide, weight, some)


def _blocks(layout: Layout, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows by rows of the weight, in memory that the next ones take."""
    count, width = layout.spec.shape
    step = max(1, min(count, _BLOCK // max(1, width * dtype.itemsize)))
    block = torch.empty(step, width, dtype=dtype)
    for first in range(0, count, step):
        last = min(first + step, count)
        run_expand(layout, first, last, block[: last - first])
        yield slice(first, last), block[: last - first]


def _dtype_for(x: Tensor, layout: Layout) -> torch.dtype:
    """The dtype that torch multiplies in: the weight's, or float32 where that is faster."""
    if x.dtype == layout.spec.dtype and _is_native(x.dtype):
        return x.dtype
    return torch.float32


def _flat(x: Tensor) -> Tensor:
    """As a matrix, whose rows are of the last dimension."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def _without_kernel(layout: Layout) -> bool:
    return layout.spec.dtype not in _FLOATS or missing() is not None


@cache
def _is_native(dtype: torch.dtype) -> bool:
    return is_native(dtype)


@cache
def _spec(said: str) -> Stored:
    return Stored.from_config("a layout", loads(said))


def _again(x: Tensor, tensors: Sequence[Tensor], said: str, dim: int) -> Layout:
    """The layout that an operator is given, once its tensors are what they should be.

    :param x: whose last dimension is that dimension of the weight
    """
    spec = _spec(said)
    expected = tensors_of(spec)
    if x.shape[-1:] != spec.shape[dim : dim + 1] or x.dtype not in _FLOATS:
        raise ValueError(
            f"a product with {list(spec.shape)} packed weights takes [..., {spec.shape[dim]}] in "
            f"bfloat16, float16 or float32, and not {list(x.shape)} in {x.dtype}"
        )
    found = [(tuple(one.shape), one.dtype) for one in tensors]
    if found != list(expected.values()) or not all(one.is_contiguous() for one in tensors):
        raise ValueError(
            f"the tensors of packed weights are {found} in place of {list(expected.values())}: "
            "keep them as they were loaded"
        )
    return Layout(spec, dict(zip(expected, tensors, strict=True)))
