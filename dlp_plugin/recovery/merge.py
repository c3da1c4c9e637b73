"""Merging adapters under the masks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch

from dlp_plugin.recovery.adapters import (
    adapted_base,
    check_inits,
    check_unmerged,
    check_values,
    chosen_adapters,
)
from dlp_plugin.recovery.layers import (
    AdapterLayer,
    adapted_parameter,
    adapter_layers,
    adapters_in,
)
from dlp_plugin.recovery.masks import Weight, masks_of, set_to_zero, some, weights_of
from dlp_plugin.recovery.ties import untied
from dlp_plugin.recovery.updates import is_masked

if TYPE_CHECKING:
    from peft import PeftModel


def sparse_merge(
    peft_model: PeftModel,
    *,
    adapter_names: list[str] | None = None,
    masks: Mapping[str, torch.Tensor] | None = None,
    allow_dense: bool = False,
) -> torch.nn.Module:
    """Merge adapters as ``peft_model.merge_and_unload()`` does, but under the masks.

    peft itself merges, then the pruned weights are set to zero; so every kind of adapter
    works that peft can merge. What ``modules_to_save`` trained of a pruned module is masked
    too. The masks take a byte a weight meanwhile. A head that shares the embeddings' weight gets
    one of its own if adapters are merged into one of the two, unless peft tied these
    (``ensure_weight_tying``), and counts as never pruned.

    :param peft_model: with the adapters to merge
    :param adapter_names: adapters to merge; None for the active ones
    :param masks: as :func:`masks_of` returns them, instead of the zeros of these weights
    :param allow_dense: merge modules that were never pruned too, as they are
    :return: the base model; the ``PeftModel`` is of no use after that
    :raises ValueError: before any weight has changed, if the adapters cannot be merged, a
        module among the adapted ones was never pruned, or masks do not fit
    """
    base = adapted_base(peft_model)
    names = chosen_adapters(peft_model, adapter_names)
    if masks is None:
        remedy = "sparse_merge(masks=...), read by masks_of() before get_peft_model()"
        check_inits(peft_model, names, remedy)
    weights = weights_of(base)
    found = {**masks_of(base), **_fitting(masks or {}, weights)}
    with untied(base, adapter_names) as follow:
        # A head that was tied is a Linear of its own by now
        weights = [weight for weight in weights_of(base) if weight.name not in follow]
        for name, layer in adapter_layers(base):
            if name not in follow:
                _check_mergeable(name, layer, adapter_names, found)
        dense = [
            weight.name
            for weight in weights
            if weight.name not in found
            and any(adapters_in(layer, adapter_names) for layer in weight.layers)
        ]
        if dense and not allow_dense:
            raise ValueError(
                f"less than 1 % of the weights of {some(dense)} are zero, so they were never "
                "pruned: allow_dense=True (--allow-dense) if they are meant to be dense; if the "
                "adapter's initialisation changed the base weights (PiSSA, OLoRA, CorDA, LoftQ), "
                "sparse_merge(masks=...), read by masks_of() before get_peft_model()"
            )
        del weights  # peft's layers go one by one then, with what they keep of before merging
        merged: torch.nn.Module = peft_model.merge_and_unload(adapter_names=adapter_names)
    for weight in weights_of(merged):
        if weight.name in found:
            set_to_zero(getattr(weight.owner, weight.parameter), ~found[weight.name])
    return merged


def _fitting(
    masks: Mapping[str, torch.Tensor], weights: list[Weight]
) -> Mapping[str, torch.Tensor]:
    """Check masks against the model's weights."""
    known = {weight.name: weight for weight in weights}
    for name, mask in masks.items():
        if name not in known:
            raise ValueError(
                f"masks has {name!r}, which is no weight of the model that can be pruned: read "
                "masks with masks_of() from this model"
            )
        shape = known[name].read().shape
        if mask.dtype is not torch.bool:
            raise ValueError(f"the mask of {name} is {mask.dtype}: make it torch.bool")
        if mask.shape != shape:
            raise ValueError(
                f"the mask of {name} has shape {list(mask.shape)}, its weight {list(shape)}: "
                "read masks with masks_of() from this model"
            )
    return masks


def _check_mergeable(
    name: str,
    layer: AdapterLayer,
    adapter_names: list[str] | None,
    masks: Mapping[str, torch.Tensor],
) -> None:
    """Check that peft can merge a layer's adapters, into finite weights."""
    check_unmerged(name, layer)
    adapters = adapters_in(layer, adapter_names)
    if not adapters:
        return
    owner, parameter = layer.get_base_layer(), adapted_parameter(layer)
    value = getattr(owner, parameter, None)
    if value is None:
        raise ValueError(
            f"{name} ({type(owner).__name__}) has no weight of its own: load the model "
            "unquantized; MultiheadAttention cannot be merged under masks"
        )
    check_values(name, owner, value)
    if len({is_masked(layer, adapter) for adapter in adapters}) > 1:
        raise ValueError(
            f"some adapters of {name} were masked by mask_updates() and some came later: call it "
            "again before merging, or merge them one by one"
        )
    merged = _merged_in_a_copy(name, layer, adapter_names)
    mask = masks.get(name if parameter == "weight" else f"{name}.{parameter}")
    if not (merged if mask is None else merged[mask.to(merged.device)]).isfinite().all():
        raise ValueError(
            f"{name} is not finite with the adapter merged: train it again, with a lower "
            "learning rate or in a wider dtype"
        )


def _merged_in_a_copy(
    name: str, layer: AdapterLayer, adapter_names: list[str] | None
) -> torch.Tensor:
    """The weight with the adapters merged, so that nothing has changed if that fails."""
    trial = copy.deepcopy(layer)
    try:
        trial.merge(adapter_names=adapter_names)
    except Exception as error:
        raise ValueError(
            f"peft cannot merge the adapter of {name} ({str(error) or type(error).__name__}): "
            "keep the adapter beside the model"
        ) from error
    merged = getattr(trial.get_base_layer(), adapted_parameter(layer))
    return cast(torch.Tensor, merged).detach()
