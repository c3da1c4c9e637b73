"""Where a loaded model computes: on the accelerator, or spread where that has no room for it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import get_max_memory
from compressed_tensors.offload import remove_dispatch
from llmcompressor.utils.dev import get_main_device
from transformers import PreTrainedModel

__all__ = ["let_go", "placed", "spread"]

# Of an accelerator's free memory, how much weights may take; logits and activations need the rest.
ROOM = 0.8


def placed(model: PreTrainedModel) -> PreTrainedModel:
    """Put a model in the CPU's memory where it computes.

    That is the accelerator if there is one and it has room; otherwise all accelerators and, for
    what these have no room for, the CPU's memory, from where weights are fetched at every use.

    :param model: as it is loaded, without a device map
    """
    device = get_main_device()
    if device.type == "cpu":
        return model.to(device)  # type: ignore[arg-type, no-any-return]
    free = {key: int(ROOM * size) for key, size in get_max_memory().items() if key != "cpu"}
    if sum(tensor.nbytes for tensor in model.parameters()) <= next(iter(free.values())):
        return model.to(device)  # type: ignore[arg-type, no-any-return]
    return spread(model, {**free, "cpu": sys.maxsize})  # where it is already


def spread(
    model: PreTrainedModel, memory: Mapping[int | str, int], **arguments: Any
) -> PreTrainedModel:
    """Put a model's parts on devices in turn, by accelerate; blocks stay whole.

    :param memory: device to bytes, in the order that they are filled in
    :param arguments: further ones of ``accelerate.dispatch_model()``
    """
    whole = list(getattr(model, "_no_split_modules", None) or ())  # where accelerate's users look
    places = infer_auto_device_map(model, dict(memory), no_split_module_classes=whole)
    return dispatch_model(model, places, **arguments)  # type: ignore[no-any-return]


def let_go(model: torch.nn.Module) -> None:
    """Free a model's weights, which the host's tracing would keep in memory with the model."""
    remove_hook_from_submodules(model)
    remove_dispatch(model).to("meta")
