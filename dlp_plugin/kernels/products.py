"""``x W^T`` with W as it is stored, as an operator that torch knows.

The operator compiles, and has a gradient with respect to ``x`` and the bias; the weight is
frozen. This module needs torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from json import loads
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dlp_plugin.checkpoints.stored import Stored
from dlp_plugin.kernels.layout import Layout, dense, tensors_of

__all__ = ["available", "linear"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def available() -> str | None:
    """None where kernels run; otherwise, in one sentence, why none does and what to do."""
    return None


def linear(x: Tensor, layout: Layout, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias``, summed in float32, in the dtype of ``x``.

    :param x: ``[..., in]`` on the CPU, in bfloat16, float16 or float32
    :param bias: ``[out]``
    :return: ``[..., out]``
    :raises ValueError: if a tensor is on another device, or of a dtype or shape that cannot be
    """
    found: Tensor = _linear(x, list(layout.tensors.values()), layout.said, bias)
    return found


@torch.library.custom_op("dlp_plugin::linear", mutates_args=())
def _linear(x: Tensor, tensors: Sequence[Tensor], spec: str, bias: Tensor | None) -> Tensor:
    layout = _again(x, tensors, spec)
    return functional.linear(x, dense(layout, x.dtype), None if bias is None else bias.to(x.dtype))


@_linear.register_fake
def _(x: Tensor, tensors: Sequence[Tensor], spec: str, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], _spec(spec).shape[0]))


@torch.library.custom_op("dlp_plugin::linear_backward", mutates_args=())
def _backward(gradient: Tensor, tensors: Sequence[Tensor], spec: str) -> Tensor:
    layout = Layout(_spec(spec), dict(zip(tensors_of(_spec(spec)), tensors, strict=True)))
    return gradient @ dense(layout, gradient.dtype)


@_backward.register_fake
def _(gradient: Tensor, tensors: Sequence[Tensor], spec: str) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], _spec(spec).shape[1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.tensors, ctx.spec, _ = inputs


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    x = _backward(gradient, ctx.tensors, ctx.spec) if ctx.needs_input_grad[0] else None
    bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
    return x, [None] * len(ctx.tensors), None, bias


_linear.register_autograd(_gradients, setup_context=_setup)


@cache
def _spec(said: str) -> Stored:
    return Stored.from_config("a layout", loads(said))


def _again(x: Tensor, tensors: Sequence[Tensor], said: str) -> Layout:
    """The layout that an operator is given, once its tensors are what they should be."""
    spec = _spec(said)
    expected = tensors_of(spec)
    if x.shape[-1:] != spec.shape[1:] or x.dtype not in _FLOATS:
        raise ValueError(
            f"a product with {list(spec.shape)} packed weights takes [..., {spec.shape[1]}] in "
            f"bfloat16, float16 or float32, and not {x.dtype} {list(x.shape)}"
        )
    found = {name: (tuple(one.shape), one.dtype) for name, one in zip(expected, tensors)}
    if found != expected:
        raise ValueError(f"packed weights are {found} in place of {expected}: load them again")
    devices = {str(one.device) for one in (x, *tensors)}
    if devices != {"cpu"}:
        raise ValueError(
            f"packed weights are multiplied on the CPU, and not on {' and '.join(devices)}: "
            "load the dense model for other devices"
        )
    return Layout(spec, dict(zip(expected, tensors)))
