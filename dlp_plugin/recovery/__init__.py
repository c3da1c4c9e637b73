"""Training a pruned model without losing its zeros.

In a pruned model the zeros are the mask. What is trained afterwards fills them: merging a
LoRA adapter adds a dense matrix to the weight, and an optimizer's step moves every weight.
``sparse_merge`` merges the adapters of peft under the masks, ``mask_updates`` has them train
under the masks, so that what is trained is what is merged, and ``hold_masks`` keeps the zeros
while the weights themselves are trained. Embeddings, norms and biases train freely.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from dlp_plugin.checkpoints.inspect import check_weight_files
from dlp_plugin.checkpoints.loading import load_stored, load_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["hold_masks", "load_adapter", "mask_updates", "masks_of", "sparse_merge"]

# A weight is pruned if at least this share of it is exactly zero: a dense one in bfloat16 may
# hold a few zeros by accident.
_PRUNED = 0.01
_MATRICES = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, Conv1D)
# Initialisations of LoRA that subtract from the base weights, or round them.
_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_SHOWN = 3


def masks_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Read the masks of a pruned model from its zeros.

    A weight counts as pruned if at least 1 % of it is exactly zero. Looked at are the weights
    of Linears and convolutions and the stacked weights ``[experts, ...]`` of fused experts,
    but not embeddings, nor an output layer that shares an embedding's weight.

    :param model: a model, or a ``PeftModel`` around it, whose base weights are read then
    :return: full name in the model without peft to bool mask of the weight's shape, True
        where it is alive; the name is the module's (fused experts: the parameter's). A weight
        that is tied stands there once.
    :raises ValueError: if a weight is on the meta device
    """
    masks = {}
    for weight in _weights(model):
        values = weight.read()
        if values.is_meta:
            raise ValueError(_on_meta(weight.name))
        if _is_plain(values) and _is_pruned(values):
            masks[weight.name] = values != 0
    return masks


def load_adapter(folder: str | Path, base: str | None = None) -> tuple[PeftModel, Any]:
    """Load a saved adapter and the causal language model that it belongs to.

    :param folder: as ``peft_model.save_pretrained()`` writes it
    :param base: the model; None for the one that the adapter was trained on
    :return: the model with the adapter on it, and the tokenizer: the one beside the adapter,
        for which the embeddings are enlarged if need be, or the base model's
    :raises ValueError: if the folder holds no adapter, a damaged one, or one of another model
    """
    _need_peft()
    from peft import PeftConfig, PeftModel

    if not (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds no adapter_config.json: give an adapter's folder")
    check_weight_files(folder)
    base = base or PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        raise ValueError(f"the adapter in {folder} does not say what model it is for: name it")
    model: Any = load_stored(base)
    trained_with = (Path(folder) / "tokenizer_config.json").is_file()
    tokenizer: Any = load_tokenizer(str(folder) if trained_with else base)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    try:
        return PeftModel.from_pretrained(model, str(folder)), tokenizer
    except RuntimeError as error:  # another shape
        reason = next((line for line in str(error).splitlines()[1:] if line.strip()), str(error))
        raise ValueError(
            f"the adapter in {folder} does not fit {base} ({reason.strip()}): name the model that "
            "it was trained on (--base), or save the adapter again"
        ) from error


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
    too. The masks take a byte a weight meanwhile.

    :param adapter_names: adapters to merge; None for the active ones
    :param masks: as :func:`masks_of` returns them, instead of the zeros of these weights
    :param allow_dense: merge modules that were never pruned too, as they are
    :return: the base model; the ``PeftModel`` is of no use after that
    :raises ValueError: before any weight has changed, if the adapters cannot be merged, a
        module among the adapted ones was never pruned, or masks do not fit
    """
    base = _base_of(peft_model)
    names = _adapters(peft_model, adapter_names)
    if masks is None:
        remedy = "sparse_merge(masks=...), read by masks_of() before get_peft_model()"
        _check_inits(peft_model, names, remedy)
    weights = _weights(base)
    found = {**masks_of(base), **_fitting(masks or {}, weights)}
    for name, layer in _layers(base):  # into a copy each, so that nothing changes if one fails
        _check_layer(name, layer, adapter_names, found)
    dense = [
        weight.name
        for weight in weights
        if weight.name not in found and any(_held(layer, adapter_names) for layer in weight.layers)
    ]
    if dense and not allow_dense:
        raise ValueError(
            f"less than 1 % of the weights of {_some(dense)} are zero, so they were never "
            "pruned: allow_dense=True (--allow-dense) if they are meant to be dense; if the "
            "adapter's initialisation changed the base weights (PiSSA, OLoRA, CorDA, LoftQ), "
            "sparse_merge(masks=...), read by masks_of() before get_peft_model()"
        )
    del weights  # peft's layers go one by one then, with what they keep of before merging
    merged: torch.nn.Module = peft_model.merge_and_unload(adapter_names=adapter_names)
    for weight in _weights(merged):
        if weight.name in found:
            _fill(getattr(weight.owner, weight.parameter), ~found[weight.name])
    return merged


def mask_updates(peft_model: PeftModel) -> None:
    """Mask the adapters' updates from now on, in training, inference and merging.

    A layer computes with ``W + mask * dW`` then. ``dW`` is what the adapter adds to the
    weight: ``B A`` scaled, or with DoRA ``m (W + B A) / |W + B A| - W``. So the loss that is
    trained is the merged model's, with :func:`sparse_merge` and peft's own merging alike. The
    updates of several adapters are summed up, as peft does in its forward pass (merging,
    it compounds those of DoRA, unless this is called first). The adapters' files do not
    change; call this again after loading them to train on, or after adding an adapter.

    It costs a dense ``dW`` per layer, which is made anew in the backward pass and not kept.

    :raises ValueError: before anything has changed, if a pruned module is adapted by anything
        else than LoRA or DoRA of a Linear, an adapter is merged, or no pruned module is adapted
    """
    base = _base_of(peft_model)
    from peft.tuners.lora.layer import Linear
    from peft.tuners.lora.variants import DoraLinearVariant

    remedy = "train unmasked and sparse_merge() afterwards"
    _check_inits(
        peft_model,
        list(peft_model.peft_config),
        f"{remedy}, with masks read by masks_of() before get_peft_model()",
    )
    plan: list[tuple[Any, str, Any]] = []
    for weight in _weights(base):
        if not weight.layers and not weight.copied:
            continue
        for layer in weight.layers:
            _check_unmerged(weight.name, layer)
        _check_values(weight.name, weight.owner, weight.read())
        if not _is_pruned(weight.read()):
            continue
        if weight.copied:
            raise ValueError(
                f"{weight.name} is pruned and in modules_to_save, which trains all of it: "
                f"adapt it with LoRA, or {remedy}"
            )
        for layer in weight.layers:
            variants = getattr(layer, "lora_variant", {})
            for adapter in _held(layer, list(peft_model.peft_config)):
                variant = variants.get(adapter)
                if type(layer) is not Linear or not isinstance(
                    variant, (type(None), _MaskedUpdate, DoraLinearVariant)
                ):
                    raise ValueError(
                        f"adapter {adapter!r} of {weight.name} is a "
                        f"{type(variant or layer).__module__}.{type(variant or layer).__name__}, "
                        f"whose updates cannot be masked: {remedy}"
                    )
                if not isinstance(variant, _MaskedUpdate):
                    variant = _MaskedUpdate(variant)
                plan.append((layer, adapter, variant))
    if not plan:
        raise ValueError(
            "none of the adapted modules is pruned (at least 1 % zeros): prune the model first, "
            "or target the pruned modules"
        )
    for layer, adapter, update in plan:
        layer.lora_variant[adapter] = update


def hold_masks(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> RemovableHandle:
    """Set pruned weights to zero after every step of an optimizer that trains the model.

    Whatever the optimizer does with momentum and weight decay. With the Trainer of
    transformers, call ``trainer.create_optimizer()`` first and give it ``trainer.optimizer``.
    The host's ``ConstantPruningModifier`` needs its events fired from the training loop, does
    nothing without ``start: 0``, and prunes living weights up to 1e-8.

    :return: handle whose ``remove()`` ends it
    :raises ValueError: if no module is pruned, or the optimizer trains none of those that are
    """
    found = masks_of(model)
    if not found:
        raise ValueError("no module of the model is pruned (at least 1 % zeros): prune it first")
    # accelerate's optimizer steps the one that it wraps
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    trained = {id(value) for group in optimizer.param_groups for value in group["params"]}
    held = []
    for weight in _weights(model):
        value = getattr(weight.owner, weight.parameter)
        if weight.name in found and id(value) in trained:
            held.append((value, ~found[weight.name]))
    if not held:
        raise ValueError(
            f"the optimizer trains none of the pruned weights of {_some(list(found))}: make it "
            "from the model's parameters; for adapters of peft use mask_updates()"
        )

    def hold(*_: Any) -> None:
        for value, pruned in held:
            _fill(value, pruned)

    return optimizer.register_step_post_hook(hold)


class _MaskedUpdate:
    """Stands in for a variant of LoRA (``peft.tuners.lora.layer.LoraVariant``) in one layer.

    Its parts have the layout of the layer's weight: ``[out, in]``, or of a Conv1D
    ``[in, out]``.
    """

    def __init__(self, variant: Any) -> None:
        """Take the variant, None for plain LoRA."""
        self._variant = variant
        self._before: torch.Tensor | None = None  # the weight, while this is merged into it

    def supports_lora_conversion(self) -> bool:
        return False  # a masked product is no product of low rank

    def forward(
        self,
        module: Any,
        active_adapter: str,
        x: torch.Tensor,
        result: torch.Tensor,
        **_: Any,
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

    def _add(self, module: Any, adapter: str, x: torch.Tensor) -> torch.Tensor:
        update = self._update(module, adapter, module.get_base_layer().weight)
        update = update.T if module.fan_in_fan_out else update
        bias = module.lora_B[adapter].bias
        if bias is not None:
            bias = (bias * module.scaling[adapter]).to(x.dtype)
        return functional.linear(x, update.to(x.dtype), bias)

    def _update(self, module: Any, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """``mask * dW`` in float32 or wider.

        :param weight: the base weight, nothing merged into it
        """
        weight = weight.detach()
        with torch.autocast(weight.device.type, enabled=False):
            down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            wide = torch.promote_types(up.dtype, torch.float32)
            update = (up.to(wide) @ down.to(wide)) * module.scaling[adapter]  # [out, in]
            if self._variant is not None:
                rows = weight.to(wide).T if module.fan_in_fan_out else weight.to(wide)
                # As in peft, DoRA's paper (arXiv 2402.09353, section 4.3): a constant. A row
                # that is all zero has norm and magnitude 0, and stays as it is.
                norm = (rows + update.detach()).norm(dim=1).clamp_min(torch.finfo(wide).tiny)
                scale = module.lora_magnitude_vector[adapter].weight.to(wide) / norm
                update = scale[:, None] * (rows + update) - rows
            update = update.T if module.fan_in_fan_out else update
            masked: torch.Tensor = update.masked_fill(weight == 0, 0)
            return masked

    @torch.no_grad()
    def merge_safe(
        self, module: Any, active_adapter: str, orig_weight: torch.Tensor
    ) -> torch.Tensor:
        base = orig_weight
        if module.merged_adapters:
            first = module.lora_variant.get(module.merged_adapters[0])
            if not isinstance(first, _MaskedUpdate) or first._before is None:
                raise ValueError(
                    f"adapter {module.merged_adapters[0]!r} is merged unmasked: unmerge it and "
                    "call mask_updates() before merging"
                )
            base = first._before
        self._before = orig_weight
        update = self._update(module, active_adapter, base)
        return (orig_weight.to(update.dtype) + update).to(orig_weight.dtype)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        orig_weight.data = self.merge_safe(module, active_adapter, orig_weight.data)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        before, self._before = self._before, None
        if before is None:
            raise ValueError(f"adapter {active_adapter!r} is not merged: merge it first")
        return before.to(orig_weight.device)


@dataclass
class _Weight:
    """A weight of the base model that may be pruned, and what peft has around it."""

    name: str
    owner: torch.nn.Module
    parameter: str
    layers: list[Any] = field(default_factory=list)  # that adapt it
    copied: bool = False  # by modules_to_save, which trains the copy instead

    def read(self) -> torch.Tensor:
        value: torch.Tensor = getattr(self.owner, self.parameter)
        return value.detach()


def _weights(model: Any) -> list[_Weight]:
    """All weights that may be pruned, tied ones once; embeddings and norms are none."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    modules = list(_walk(model))
    free = {
        id(value)
        for _, module, _, _ in modules
        if isinstance(module, torch.nn.Embedding)
        for value in _parameters(module).values()
    }
    found: dict[int, _Weight] = {}
    for name, module, layers, copied in modules:
        for parameter, value in _parameters(module).items():
            mine = [one for one in layers if getattr(one, "parameter_name", "weight") == parameter]
            matrix = parameter == "weight" and isinstance(module, _MATRICES)
            experts = value is not None and value.dim() == 3 and value.shape[0] > 1
            adapted = value is not None and value.dim() > 1 and mine
            if id(value) not in free and (matrix or experts or adapted):
                full = name if parameter == "weight" else f"{name}.{parameter}"
                weight = found.setdefault(id(value), _Weight(full, module, parameter))
                weight.layers += mine
                weight.copied |= copied
    return list(found.values())


def _parameters(module: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    """The module's own parameters, without onloading what is offloaded."""
    own = module._parameters
    stored: Mapping[str, torch.Tensor] = getattr(own, "offloaded_values", own)
    return stored


def _walk(
    module: torch.nn.Module, name: str = "", copied: bool = False
) -> Iterator[tuple[str, torch.nn.Module, list[Any], bool]]:
    """Walk over the base model's modules, without peft's.

    :return: full name, module, the adapter layers around it, and whether ``modules_to_save``
        trains a copy of it
    """
    layers: list[Any] = []
    while hasattr(module, "merged_adapters"):  # a wrapper of peft
        inner = getattr(module, "original_module", None)
        if inner is None:
            layers.append(module)
            inner = module.base_layer
        copied |= "modules_to_save" in module._modules
        module = inner  # type: ignore[assignment]
    yield name, module, layers, copied
    for child, part in module.named_children():
        yield from _walk(part, f"{name}.{child}" if name else child, copied)


def _without_peft(name: str) -> str:
    inner = ("base_layer", "original_module", "token_adapter")
    return ".".join(part for part in name.split(".") if part not in inner)


def _is_plain(values: torch.Tensor) -> bool:
    """Whether weights are numbers as they stand, not quantized."""
    return values.is_floating_point() and values.itemsize > 1


def _is_pruned(values: torch.Tensor) -> bool:
    return int((values == 0).sum()) >= max(1, _PRUNED * values.numel())


@torch.no_grad()
def _fill(value: torch.Tensor, pruned: torch.Tensor) -> None:
    # filling gives +0, multiplying with the mask would give -0 for negative weights
    value.masked_fill_(pruned.to(value.device), 0)


def _need_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError("adapters need peft: pip install 'dlp_plugin[lora]'") from error


def _base_of(peft_model: Any) -> torch.nn.Module:
    _need_peft()
    from peft import PeftModel

    if not isinstance(peft_model, PeftModel):
        raise ValueError(
            f"the model is a {type(peft_model).__name__}, not a PeftModel: give what "
            "get_peft_model() (without mixed=True) or PeftModel.from_pretrained() returned"
        )
    if not hasattr(peft_model.base_model, "merge_and_unload"):
        kinds = sorted({type(one).__name__ for one in peft_model.peft_config.values()})
        raise ValueError(
            f"adapters of {', '.join(kinds)} do not change weights, so there is nothing "
            "to mask or merge: save them beside the pruned model"
        )
    base: torch.nn.Module = peft_model.get_base_model()
    if isinstance(base, PeftModel):
        raise ValueError("a PeftModel is inside this PeftModel: call get_peft_model() once")
    return base


def _adapters(peft_model: Any, adapter_names: list[str] | None) -> list[str]:
    if adapter_names is None:
        return list(peft_model.active_adapters)
    unknown = [name for name in adapter_names if name not in peft_model.peft_config]
    if isinstance(adapter_names, str) or unknown:
        raise ValueError(
            f"adapter_names is {adapter_names!r}: give a list of names out of "
            f"{list(peft_model.peft_config)}"
        )
    return adapter_names


def _held(layer: Any, adapter_names: list[str] | None) -> list[str]:
    """Those of the adapters to merge that a layer of peft has."""
    wanted = layer.active_adapters if adapter_names is None else adapter_names
    parts = [getattr(layer, part, None) or () for part in layer.adapter_layer_names]
    return [name for name in wanted if any(name in part for part in parts)]


def _fitting(
    masks: Mapping[str, torch.Tensor], weights: list[_Weight]
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


def _check_inits(peft_model: Any, names: list[str], remedy: str) -> None:
    for name in names:
        config = peft_model.peft_config[name]
        init = getattr(config, "init_lora_weights", None)
        if getattr(config, "kasa_config", None) is not None:
            init = "KaSA"
        if init == "KaSA" or (isinstance(init, str) and init.lower().startswith(_CHANGING_INITS)):
            raise ValueError(
                f"the initialisation of adapter {name!r} ({init}) changed the base weights, "
                f"whose zeros are the masks no more: {remedy}"
            )


def _check_unmerged(name: str, layer: Any) -> None:
    if layer.merged:
        raise ValueError(
            f"{', '.join(layer.merged_adapters)} is already merged into {name}: call "
            "peft_model.unmerge_adapter() first"
        )


def _layers(base: torch.nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [
        (_without_peft(name), module)
        for name, module in base.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]


def _check_layer(
    name: str, layer: Any, adapter_names: list[str] | None, masks: Mapping[str, torch.Tensor]
) -> None:
    """Check that peft can merge a layer's adapters, by merging them into a copy."""
    _check_unmerged(name, layer)
    if not _held(layer, adapter_names):
        return
    owner = layer.get_base_layer()
    parameter = getattr(layer, "parameter_name", "weight")
    value = getattr(owner, parameter, None)
    if value is None:
        raise ValueError(
            f"{name} ({type(owner).__name__}) has no weight of its own: load the model "
            "unquantized; MultiheadAttention cannot be merged under masks"
        )
    _check_values(name, owner, value)
    variants = [getattr(layer, "lora_variant", {}).get(one) for one in _held(layer, adapter_names)]
    if len({isinstance(variant, _MaskedUpdate) for variant in variants}) > 1:
        raise ValueError(
            f"some adapters of {name} were masked by mask_updates() and some came later: call it "
            "again before merging, or merge them one by one"
        )
    trial = copy.deepcopy(layer)
    try:
        trial.merge(adapter_names=adapter_names)
    except Exception as error:
        raise ValueError(
            f"peft cannot merge the adapter of {name} ({str(error) or type(error).__name__}): "
            "keep the adapter beside the model"
        ) from error
    merged = getattr(trial.get_base_layer(), parameter).detach()
    mask = masks.get(name if parameter == "weight" else f"{name}.{parameter}")
    if not (merged if mask is None else merged[mask.to(merged.device)]).isfinite().all():
        raise ValueError(
            f"{name} is not finite with the adapter merged: train it again, with a lower "
            "learning rate or in a wider dtype"
        )


def _check_values(name: str, owner: torch.nn.Module, values: torch.Tensor) -> None:
    if values.is_meta:
        raise ValueError(_on_meta(name))
    if not _is_plain(values):
        raise ValueError(f"{name} has weights of {values.dtype}: load the model unquantized")
    if hasattr(owner._parameters, "offloaded_values"):
        raise ValueError(
            f"{name} is offloaded, as in models that oneshot() returned, and peft's changes to it "
            "would be lost: call remove_dispatch(model) of compressed_tensors.offload first"
        )


def _on_meta(name: str) -> str:
    return f"the weight of {name} is on the meta device: load the model without offloading"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
