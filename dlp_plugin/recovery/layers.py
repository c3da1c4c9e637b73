"""The internals of peft that recovery uses; all other files use them through this one.

It may change with any release of peft (this is 0.21). ``tests/recovery/test_layers.py`` holds
each of these:

* Where an adapter is, a wrapper stands in the place of the model's module, and every wrapper
  has ``merged_adapters``, by which it is known without importing peft.
* A wrapper with an ``original_module`` trains beside the module: its child ``modules_to_save``
  holds a whole copy each adapter, its child ``token_adapter`` some rows of an embedding.
* The others are adapter layers, :class:`AdapterLayer`, around their ``base_layer``; with
  several adapted parameters around one another, each of which has a ``parameter_name``.
* With ``ensure_weight_tying`` the ``lora_A`` of a head is, transposed, the storage of the
  ``lora_embedding_B`` of the embedding whose weight it has.
* LoRA of a Linear, :class:`LoraLinear`, asks the :class:`Variant` that its ``lora_variant`` has
  of an adapter, and computes by itself where it has none.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, Protocol, cast

import torch

_INFIXES = ("base_layer", "original_module", "token_adapter")


class AdapterLayer(Protocol):
    """A layer of peft around a module (``peft.tuners.tuners_utils.BaseTunerLayer``)."""

    adapter_layer_names: tuple[str, ...]
    """The attributes that hold its adapters' parts, a mapping by adapter each."""
    merged_adapters: list[str]
    """In the order in which they were merged."""

    @property
    def active_adapters(self) -> list[str]:
        """Those that it computes with and merges, if none are named."""

    @property
    def merged(self) -> bool:
        """Whether an adapter is merged."""

    def get_base_layer(self) -> torch.nn.Module:
        """Return the model's module, under all the layers around it."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weight."""


class LoraLinear(AdapterLayer, Protocol):
    """LoRA of a Linear, or of a Conv1D (``peft.tuners.lora.layer.Linear``).

    All fields but the last map an adapter's name to what it has.

    :param lora_A: weight ``[rank, in]``
    :param lora_B: weight ``[out, rank]``; its bias is the update's
    :param lora_dropout: of the inputs
    :param lora_magnitude_vector: of DoRA
    :param lora_variant: what computes an adapter that is not plain LoRA
    :param scaling: factor of the update
    :param fan_in_fan_out: whether the weight is ``[in, out]``, as in a Conv1D
    """

    lora_A: Mapping[str, torch.nn.Linear]  # noqa: N815
    lora_B: Mapping[str, torch.nn.Linear]  # noqa: N815
    lora_dropout: Mapping[str, torch.nn.Module]
    lora_magnitude_vector: Mapping[str, Magnitude]
    lora_variant: MutableMapping[str, Variant]
    scaling: Mapping[str, float]
    fan_in_fan_out: bool


class Magnitude(Protocol):
    """DoRA's magnitudes of a weight's rows (``peft.tuners.lora.dora.DoraLinearLayer``)."""

    weight: torch.Tensor
    """``[out]``"""


class Variant(Protocol):
    """What LoRA computes an adapter with (``peft.tuners.lora.layer.LoraVariant``)."""

    def supports_lora_conversion(self) -> bool:
        """Tell whether the update is a product of low rank."""

    def forward(
        self,
        module: LoraLinear,
        active_adapter: str,
        x: torch.Tensor,
        result: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Add the adapter's output to that of the base layer and the adapters before.

        :param x: the layer's input, ``[..., in]``
        :param result: what there is so far, ``[..., out]``
        """

    def merge_safe(
        self, module: LoraLinear, active_adapter: str, orig_weight: torch.Tensor
    ) -> torch.Tensor:
        """Return the weight with the adapter merged.

        :param orig_weight: the weight with the ``merged_adapters`` in it, which stays
        """

    def merge_unsafe(
        self, module: LoraLinear, active_adapter: str, orig_weight: torch.Tensor
    ) -> None:
        """Merge the adapter into the data of the weight."""

    def unmerge(
        self, module: LoraLinear, active_adapter: str, orig_weight: torch.Tensor
    ) -> torch.Tensor:
        """Return the weight without the adapter, the last that was merged."""


def base_of(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model that a ``PeftModel`` is around, any other model as it is.

    :param model: any model
    """
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


def unwrapped(module: torch.nn.Module) -> tuple[torch.nn.Module, list[AdapterLayer], bool]:
    """Take what peft has around a module off it.

    :param module: of a model with adapters
    :return: the model's own module, the adapter layers around it from the outermost, and
        whether ``modules_to_save`` trains a copy of it
    """
    layers: list[AdapterLayer] = []
    copied = False
    while hasattr(module, "merged_adapters"):
        copied |= "modules_to_save" in dict(module.named_children())
        inner: Any = getattr(module, "original_module", None)
        if inner is None:
            layers.append(cast(AdapterLayer, module))
            inner = module.base_layer
        module = inner
    return module, layers, copied


def adapter_layers(base: torch.nn.Module) -> list[tuple[str, AdapterLayer]]:
    """List all adapter layers of a model by the names of the modules that they are around.

    :param base: the model that adapters are around
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [
        (".".join(part for part in name.split(".") if part not in _INFIXES), module)
        for name, module in base.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]


def adapters_in(layer: AdapterLayer, adapter_names: list[str] | None) -> list[str]:
    """List those adapters that a layer has.

    :param layer: with adapters
    :param adapter_names: out of these; None for the active ones
    """
    wanted = layer.active_adapters if adapter_names is None else adapter_names
    parts = [getattr(layer, part, None) or () for part in layer.adapter_layer_names]
    return [name for name in wanted if any(name in part for part in parts)]


def is_tied_to(layer: AdapterLayer, embedding: AdapterLayer, adapter: str) -> bool:
    """Tell whether LoRA of a Linear has the parameters of an embedding's, transposed.

    :param layer: of the Linear
    :param embedding: of the embedding
    :param adapter: name of the adapter
    """
    ends: list[Any] = [
        getattr(layer, "lora_A", None),
        getattr(embedding, "lora_embedding_B", None),
    ]
    if not all(part is not None and adapter in part for part in ends):
        return False
    down, up = ends
    return bool(down[adapter].weight.data_ptr() == up[adapter].data_ptr())


def adapted_parameter(layer: AdapterLayer) -> str:
    """Name the parameter of the base layer that a layer adapts.

    :param layer: with adapters
    """
    name: str = getattr(layer, "parameter_name", "weight")
    return name


def variant_of(layer: AdapterLayer, adapter: str) -> Variant | None:
    """Return what a layer computes an adapter with; None for plain LoRA and other tuners.

    :param layer: with adapters
    :param adapter: name of the adapter
    """
    variants: Mapping[str, Variant] = getattr(layer, "lora_variant", {})
    return variants.get(adapter)


def as_lora_linear(layer: AdapterLayer) -> LoraLinear | None:
    """Return the layer if it is LoRA of a Linear; what derives from that computes otherwise.

    :param layer: with adapters
    """
    from peft.tuners.lora.layer import Linear

    return cast(LoraLinear, layer) if type(layer) is Linear else None


def is_dora(variant: Variant) -> bool:
    """Tell whether a variant of a Linear is DoRA's.

    :param variant: as :func:`variant_of` returns it
    """
    from peft.tuners.lora.variants import DoraLinearVariant

    return isinstance(variant, DoraLinearVariant)
