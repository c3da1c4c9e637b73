"""Reading masks: which weights of a model can be pruned, and which are.

With adapters of peft around its modules or without: a weight is that of the base model, and
has the name that it has there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from transformers.pytorch_utils import Conv1D

from dlp_plugin.checkpoints.quantized import quantization_of
from dlp_plugin.checkpoints.stored import QUANT_METHOD
from dlp_plugin.recovery.layers import AdapterLayer, adapted_parameter, base_of, unwrapped

# A weight is pruned if at least this share of it is exactly zero: a dense one in bfloat16 may
# hold a few zeros by accident.
_PRUNED = 0.01
_MATRICES = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, Conv1D)
_SHOWN = 3


def masks_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Read the masks of a pruned model from its zeros.

    A weight counts as pruned if at least 1 % of it is exactly zero. Looked at are the weights
    of Linears and convolutions and the stacked weights ``[experts, ...]`` of fused experts,
    but not embeddings, nor an output layer that shares an embedding's weight.

    :param model: a model, or a ``PeftModel`` around it, whose base weights are read then
    :return: full name in the model without peft to bool mask of the weight's shape, True
        where the weight is not zero; the name is the module's (fused experts: the parameter's).
        A tied weight is listed once.
    :raises ValueError: if a weight is on the meta device, or the model keeps its weights packed
    """
    masks = {}
    for weight in weights_of(model):
        values = weight.read()
        if values.is_meta:
            raise ValueError(on_meta(weight.name))
        if is_plain(values) and is_pruned(values):
            masks[weight.name] = values != 0
    return masks


@dataclass
class Weight:
    """A weight of the base model that may be pruned, and what peft has around it.

    :param name: as in :func:`masks_of`
    :param owner: module that has the weight
    :param parameter: local name of the weight
    :param layers: peft's adapter layers around the module, from the outermost
    :param copied: whether ``modules_to_save`` trains a copy of the module
    """

    name: str
    owner: torch.nn.Module
    parameter: str
    layers: list[AdapterLayer] = field(default_factory=list)
    copied: bool = False

    def read(self) -> torch.Tensor:
        """Return its values, apart from the graph, but not copied."""
        value: torch.Tensor = getattr(self.owner, self.parameter)
        return value.detach()


def weights_of(model: torch.nn.Module) -> list[Weight]:
    """List all weights that may be pruned, tied ones once; embeddings and norms are none.

    :param model: a model, or a ``PeftModel`` around it
    :raises ValueError: if it keeps its weights packed
    """
    config = getattr(base_of(model), "config", None)
    if quantization_of(config).get("quant_method") == QUANT_METHOD:
        raise ValueError(
            "the model keeps its weights packed: load it with "
            "quantization_config=dlp_plugin.SparseConfig(dequantize=True)"
        )
    modules = list(walk(base_of(model)))
    free = {
        id(value)
        for _, module, _, _ in modules
        if isinstance(module, torch.nn.Embedding)
        for value in _stored(module).values()
    }
    found: dict[int, Weight] = {}
    for name, module, layers, copied in modules:
        for parameter, value in _stored(module).items():
            mine = [layer for layer in layers if adapted_parameter(layer) == parameter]
            matrix = parameter == "weight" and isinstance(module, _MATRICES)
            experts = value is not None and value.dim() == 3 and value.shape[0] > 1
            adapted = value is not None and value.dim() > 1 and mine
            if id(value) not in free and (matrix or experts or adapted):
                full = name if parameter == "weight" else f"{name}.{parameter}"
                weight = found.setdefault(id(value), Weight(full, module, parameter))
                weight.layers += mine
                weight.copied |= copied
    return list(found.values())


def is_plain(values: torch.Tensor) -> bool:
    """Tell whether weights are numbers as they stand, not quantized.

    :param values: of a parameter
    """
    return values.is_floating_point() and values.itemsize > 1


def is_pruned(values: torch.Tensor) -> bool:
    """Tell whether at least 1 % of the weights are exactly zero, and one at least.

    :param values: of a parameter
    """
    return int((values == 0).sum()) >= max(1, _PRUNED * values.numel())


def is_offloaded(module: torch.nn.Module) -> bool:
    """Tell whether ``compressed_tensors.offload`` keeps the module's parameters elsewhere.

    :param module: that has the parameters
    """
    return hasattr(module._parameters, "offloaded_values")


@torch.no_grad()
def set_to_zero(value: torch.Tensor, pruned: torch.Tensor) -> None:
    """Set weights to +0 in place; multiplying with the mask would give -0 for negative ones.

    :param value: the weights
    :param pruned: bool, of the weight's shape, on any device
    """
    value.masked_fill_(pruned.to(value.device), 0)


def on_meta(name: str) -> str:
    """Say of a weight that it has no values to read.

    :param name: full name of the weight
    """
    return f"the weight of {name} is on the meta device: load the model without offloading"


def some(names: list[str]) -> str:
    """Name the first few, and count the others.

    :param names: at least one
    """
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _stored(module: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    """The module's own parameters, without onloading what is offloaded."""
    own = module._parameters
    stored: Mapping[str, torch.Tensor] = getattr(own, "offloaded_values", own)
    return stored


def walk(
    module: torch.nn.Module, name: str = "", copied: bool = False
) -> Iterator[tuple[str, torch.nn.Module, list[AdapterLayer], bool]]:
    """Walk over the base model's modules, without peft's.

    :param module: where to start
    :param name: full name of that module
    :param copied: whether ``modules_to_save`` trains a copy of that module
    :return: full name, module, the adapter layers around it, and whether ``modules_to_save``
        trains a copy of it
    """
    module, layers, here = unwrapped(module)
    copied |= here
    yield name, module, layers, copied
    for child, part in module.named_children():
        yield from walk(part, f"{name}.{child}" if name else child, copied)
