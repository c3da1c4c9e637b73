"""The product ``x W^T`` with a packed W, as a torch operator.

The operator works with ``torch.compile``, and has a gradient with respect to ``x`` and the bias;
the weight is frozen. This module imports nothing but torch.
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
from dlp_plugin.kernels.library import chosen, missing
from dlp_plugin.precision import is_native

__all__ = ["available", "linear"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_FEW = 64  # largest number of rows of x for our own kernels: with more rows torch is faster
_BLOCK = 1 << 21  # bytes of W that are expanded at a time for torch, so that they fit in the cache


def available() -> str | None:
    """Say why the kernels cannot be used.

    :return: None if they can; otherwise the reason and what to do, in one sentence
    :raises ValueError: if the environment variable ``DLP_KERNELS`` has an invalid value
    """
    return missing()


def linear(x: Tensor, layout: Layout, bias: Tensor | None = None) -> Tensor:
    """Compute ``x W^T + bias``, summed in float32.

    :param x: ``[..., in]`` on the CPU, in bfloat16, float16 or float32
    :param layout: of W
    :param bias: ``[out]``
    :return: ``[..., out]`` in the dtype of ``x``
    :raises ValueError: if a tensor is on another device, or has a wrong dtype or shape
    """
    tensors = list(layout.tensors.values())
    devices = {one.device.type for one in (x, *tensors)}
    if devices != {"cpu"}:
        raise ValueError(
            "packed weights run on the CPU only, but these tensors are on "
            f"{' and '.join(sorted(devices))}: load the dense model for other devices"
        )
    if not _is_plain(x, bias):
        found: Tensor = _linear(x, tensors, layout.said, bias)
        return found
    return _multiply(x, layout, bias)


def _is_plain(x: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel can be called directly: no gradient, compilation or tensor subclass.

    A call through the torch operator takes a quarter longer.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return False
    wanted = x.requires_grad or (bias is not None and bias.requires_grad)
    return not (wanted and torch.is_grad_enabled())


def _multiply(x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
    count, width = layout.spec.shape
    if x.shape[-1:] != (width,) or x.dtype not in _FLOATS:
        raise ValueError(
            f"packed weights {[count, width]} take inputs [..., {width}] in bfloat16, float16 or "
            f"float32, not {list(x.shape)} in {x.dtype}"
        )
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


@torch.library.custom_op("dlp_plugin::linear", mutates_args=(), device_types="cpu")
def _linear(x: Tensor, tensors: Sequence[Tensor], spec: str, bias: Tensor | None) -> Tensor:
    return _multiply(x, _layout(tensors, spec), bias)


@_linear.register_fake
def _(x: Tensor, tensors: Sequence[Tensor], spec: str, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], _spec(spec).shape[0]))


@torch.library.custom_op("dlp_plugin::linear_backward", mutates_args=(), device_types="cpu")
def _backward(gradient: Tensor, tensors: Sequence[Tensor], spec: str) -> Tensor:
    layout = _layout(tensors, spec)
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
    """Multiply many rows of x: expand the weight block by block, and let torch multiply."""
    wide = x.to(_dtype_for(x, layout))
    bias = None if bias is None else bias.to(wide.dtype)
    for rows, weight in _blocks(layout, wide.dtype):
        some = None if bias is None else bias[rows]
        out[:, rows] = functional.linear(wide, weight, some)


def _blocks(layout: Layout, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of dense rows of the weight; each block overwrites the one before."""
    count, width = layout.spec.shape
    step = max(1, min(count, _BLOCK // max(1, width * dtype.itemsize)))
    block = torch.empty(step, width, dtype=dtype)
    for first in range(0, count, step):
        last = min(first + step, count)
        run_expand(layout, first, last, block[: last - first])
        yield slice(first, last), block[: last - first]


def _dtype_for(x: Tensor, layout: Layout) -> torch.dtype:
    """Return the dtype in which torch multiplies: the weight's, or float32 if that is faster."""
    if x.dtype == layout.spec.dtype and _is_native(x.dtype):
        return x.dtype
    return torch.float32


def _flat(x: Tensor) -> Tensor:
    """Flatten all dimensions but the last."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def _without_kernel(layout: Layout) -> bool:
    return layout.spec.dtype not in _FLOATS or chosen() is None


@cache
def _is_native(dtype: torch.dtype) -> bool:
    return is_native(dtype)


@cache
def _spec(said: str) -> Stored:
    return Stored.from_config("a layout", loads(said))


def _layout(tensors: Sequence[Tensor], said: str) -> Layout:
    spec = _spec(said)
    return Layout(spec, dict(zip(tensors_of(spec), tensors, strict=True)))
