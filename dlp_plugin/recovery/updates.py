"""Adapters that train under the masks: a variant of LoRA whose updates are masked."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dlp_plugin.recovery.adapters import (
    adapted_base,
    check_inits,
    check_unmerged,
    check_values,
)
from dlp_plugin.recovery.layers import (
    AdapterLayer,
    LoraLinear,
    Variant,
    adapters_in,
    as_lora_linear,
    is_dora,
    variant_of,
)
from dlp_plugin.recovery.masks import Weight, is_pruned, weights_of

if TYPE_CHECKING:
    from peft import PeftModel

_REMEDY = "train unmasked and sparse_merge() afterwards"


def mask_updates(peft_model: PeftModel) -> None:
    """Mask the adapters' updates from now on, in training, inference and merging.

    A layer computes with ``W + mask * dW`` then. ``dW`` is what the adapter adds to the
    weight: ``B A`` scaled, or with DoRA ``m (W + B A) / |W + B A| - W``. So the loss that is
    trained is the merged model's, with :func:`sparse_merge` and peft's own merging alike. The
    updates of several adapters are summed up, as peft does in its forward pass (merging,
    it compounds those of DoRA, unless this is called first). The adapters' files do not
    change; call this again after loading them to train on, or after adding an adapter.

    It costs a dense ``dW`` per layer, which is made anew in the backward pass and not kept.

    :param peft_model: with adapters of LoRA or DoRA
    :raises ValueError: before anything has changed, if a pruned module is adapted by anything
        else than LoRA or DoRA of a Linear, an adapter is merged, or no pruned module is adapted
    """
    base = adapted_base(peft_model)
    names = list(peft_model.peft_config)
    check_inits(
        peft_model, names, f"{_REMEDY}, with masks read by masks_of() before get_peft_model()"
    )
    plan = [step for weight in weights_of(base) for step in _plan_of(weight, names)]
    if not plan:
        raise ValueError(
            "none of the adapted modules is pruned (at least 1 % zeros): prune the model first, "
            "or target the pruned modules"
        )
    for layer, adapter, update in plan:
        layer.lora_variant[adapter] = update


def is_masked(layer: AdapterLayer, adapter: str) -> bool:
    """Tell whether :func:`mask_updates` has masked a layer's adapter.

    :param layer: with adapters
    :param adapter: name of the adapter
    """
    return isinstance(variant_of(layer, adapter), _MaskedUpdate)


_DenseUpdate = Callable[[LoraLinear, str, torch.Tensor], torch.Tensor]
"""What an adapter adds to a weight: of a layer, an adapter's name and the weight ``[out, in]``
without any adapter, ``dW``, ``[out, in]``, in float32 or wider."""


def _lora_update(layer: LoraLinear, adapter: str, weight: torch.Tensor) -> torch.Tensor:
    """``B A``, scaled: a ``_DenseUpdate``."""
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    wide = torch.promote_types(up.dtype, torch.float32)
    product: torch.Tensor = up.to(wide) @ down.to(wide)
    return product * layer.scaling[adapter]


def _dora_update(layer: LoraLinear, adapter: str, weight: torch.Tensor) -> torch.Tensor:
    """``m (W + B A) / |W + B A| - W``: a ``_DenseUpdate``.

    As in peft, the norm is a constant (DoRA's paper, arXiv 2402.09353, section 4.3). A row that
    is all zero has norm and magnitude 0, and stays as it is.
    """
    update = _lora_update(layer, adapter, weight)
    weight = weight.to(update.dtype)
    norm = (weight + update.detach()).norm(dim=1).clamp_min(torch.finfo(update.dtype).tiny)
    scale = layer.lora_magnitude_vector[adapter].weight.to(update.dtype) / norm
    added: torch.Tensor = scale[:, None] * (weight + update) - weight
    return added


class _MaskedUpdate(Variant):
    """Adds ``mask * dW`` to one layer's weight, whose zeros are the mask.

    What it computes has the layout of the layer's weight: ``[out, in]``, or of a Conv1D
    ``[in, out]``.
    """

    def __init__(self, dense: _DenseUpdate) -> None:
        self._dense = dense
        self._before: torch.Tensor | None = None  # the weight, while this is merged into it

    def supports_lora_conversion(self) -> bool:
        return False  # a masked product is no product of low rank

    def forward(
        self,
        module: LoraLinear,
        active_adapter: str,
        x: torch.Tensor,
        result: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        x = module.lora_dropout[active_adapter](x)
        if torch.is_grad_enabled():
            # else every layer would keep its dense update for the backward pass
            added: torch.Tensor = checkpoint(
                self._add, module, active_adapter, x, use_reentrant=False, preserve_rng_state=False
            )
        else:
            added = self._add(module, active_adapter, x)
        return result + added

    @torch.no_grad()
    def merge_safe(
        self, module: LoraLinear, active_adapter: str, orig_weight: torch.Tensor
    ) -> torch.Tensor:
        base = orig_weight
        if module.merged_adapters:
            first = variant_of(module, module.merged_adapters[0])
            if not isinstance(first, _MaskedUpdate) or first._before is None:
                raise ValueError(
                    f"adapter {module.merged_adapters[0]!r} is merged unmasked: unmerge it and "
                    "call mask_updates() before merging"
                )
            base = first._before
        self._before = orig_weight
        update = self._masked(module, active_adapter, base)
        return (orig_weight.to(update.dtype) + update).to(orig_weight.dtype)

    def merge_unsafe(
        self, module: LoraLinear, active_adapter: str, orig_weight: torch.Tensor
    ) -> None:
        orig_weight.data = self.merge_safe(module, active_adapter, orig_weight.data)

    def unmerge(
        self, module: LoraLinear, active_adapter: str, orig_weight: torch.Tensor
    ) -> torch.Tensor:
        before, self._before = self._before, None
        if before is None:
            raise ValueError(f"adapter {active_adapter!r} is not merged: merge it first")
        return before.to(orig_weight.device)

    def _add(self, layer: LoraLinear, adapter: str, x: torch.Tensor) -> torch.Tensor:
        weight: Any = layer.get_base_layer().weight
        update = self._masked(layer, adapter, weight)
        update = update.T if layer.fan_in_fan_out else update
        bias = layer.lora_B[adapter].bias
        scaled = None if bias is None else (bias * layer.scaling[adapter]).to(x.dtype)
        return functional.linear(x, update.to(x.dtype), scaled)

    def _masked(self, layer: LoraLinear, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """``mask * dW`` in float32 or wider.

        :param weight: the base weight, nothing merged into it
        """
        weight = weight.detach()
        with torch.autocast(weight.device.type, enabled=False):
            update = self._dense(layer, adapter, weight.T if layer.fan_in_fan_out else weight)
            update = update.T if layer.fan_in_fan_out else update
            return update.masked_fill(weight == 0, 0)


def _plan_of(weight: Weight, names: list[str]) -> list[tuple[LoraLinear, str, _MaskedUpdate]]:
    """What to compute the adapters of a weight with; nothing for one that is not pruned."""
    if not weight.layers and not weight.copied:
        return []
    for layer in weight.layers:
        check_unmerged(weight.name, layer)
    check_values(weight.name, weight.owner, weight.read())
    if not is_pruned(weight.read()):
        return []
    if weight.copied:
        raise ValueError(
            f"{weight.name} is pruned and in modules_to_save, which trains all of it: "
            f"adapt it with LoRA, or {_REMEDY}"
        )
    return [
        _step_of(weight.name, layer, adapter)
        for layer in weight.layers
        for adapter in adapters_in(layer, names)
    ]


def _step_of(name: str, layer: AdapterLayer, adapter: str) -> tuple[LoraLinear, str, _MaskedUpdate]:
    variant, linear = variant_of(layer, adapter), as_lora_linear(layer)
    if linear is not None:
        if isinstance(variant, _MaskedUpdate):
            return linear, adapter, variant
        if variant is None or is_dora(variant):
            update = _lora_update if variant is None else _dora_update
            return linear, adapter, _MaskedUpdate(update)
    kind = type(layer if variant is None else variant)
    raise ValueError(
        f"adapter {adapter!r} of {name} is a {kind.__module__}.{kind.__name__}, "
        f"whose updates cannot be masked: {_REMEDY}"
    )
