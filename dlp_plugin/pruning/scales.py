"""Scales of quantized weights that are trained, while the integers stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from compressed_tensors.quantization import (
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
)
from compressed_tensors.quantization.utils import is_module_quantized
from compressed_tensors.utils import update_offload_parameter

from dlp_plugin.pruning.training import Trained

__all__ = ["Scales", "check_scheme", "scales_of"]

_STRATEGIES = (
    QuantizationStrategy.GROUP,
    QuantizationStrategy.CHANNEL,
    QuantizationStrategy.TENSOR,
)


def check_scheme(scheme: QuantizationScheme, what: str) -> None:
    """Refuse a scheme whose scales cannot be trained.

    :param scheme: of modules
    :param what: what trains them, for the error
    :raises ValueError: if weights are not integers with a scale per row, group or matrix, or more
        than the weights is quantized
    """
    weights = scheme.weights
    problem = ""
    if scheme.input_activations is not None or scheme.output_activations is not None:
        problem = "quantizes activations"
    elif weights is None or weights.type != QuantizationType.INT:
        problem = "has no integers"
    elif weights.strategy not in _STRATEGIES:
        problem = f"has the strategy {weights.strategy}"
    if problem:
        raise ValueError(
            f"{what} trains the scales of weights that are integers, and the scheme of "
            f"{', '.join(scheme.targets)} {problem}: take one such as W4A16, or leave it out"
        )


def scales_of(
    modules: Iterable[torch.nn.Module],
) -> dict[torch.nn.Module, Callable[[torch.Tensor], Trained]]:
    """What is trained of quantized Linears; other modules are left out.

    :param modules: whose weights are quantized, and have the values that their integers stand for
    """
    linears = [module for module in modules if isinstance(module, torch.nn.Linear)]
    return {linear: partial(Scales, linear) for linear in linears if is_module_quantized(linear)}


class Scales:
    """The scales of a quantized weight, as factors of what they are; see ``Trained``.

    :param module: that has the weight, onloaded
    :param leaf: its float32 copy
    """

    def __init__(self, module: torch.nn.Module, leaf: torch.Tensor) -> None:
        self.leaf = leaf.requires_grad_()
        self._module = module
        scale = module.get_parameter("weight_scale").detach()
        self._scale = scale.to(leaf.device, torch.float32, copy=True)
        self._dtype, self._weight_dtype = scale.dtype, module.get_parameter("weight").dtype
        self.values = torch.ones_like(self._scale)
        self._integers = (leaf.detach() / self._over_entries(self._scale)).round()

    def slope(self, gradient: torch.Tensor) -> torch.Tensor:
        """As in :class:`Trained`."""
        products = gradient * self._integers
        if self._scale.ndim == 1:
            sums = products.sum()
        else:
            sums = products.reshape(*self._scale.shape, -1).sum(-1)
        return sums * self._scale

    def spread(self) -> None:
        """As in :class:`Trained`."""
        torch.mul(self._integers, self._over_entries(self._scale * self.values), out=self.leaf)

    def rounded(self) -> torch.Tensor:
        """As in :class:`Trained`."""
        return (self._scale * self.values).to(self._dtype).float() / self._scale

    def write(self, values: torch.Tensor) -> None:
        """As in :class:`Trained`."""
        scale = (self._scale * values).to(self._dtype)
        weight = self._integers * self._over_entries(scale.float())
        update_offload_parameter(self._module, "weight_scale", scale)
        update_offload_parameter(self._module, "weight", weight.to(self._weight_dtype))

    def _over_entries(self, scale: torch.Tensor) -> torch.Tensor:
        """The scale of every entry of the weight; a matrix's one scale as it is."""
        if scale.ndim == 1:
            return scale
        return scale.repeat_interleave(self.leaf.shape[1] // scale.shape[1], dim=1)
