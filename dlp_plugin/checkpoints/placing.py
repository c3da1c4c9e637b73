"""Places a loaded model: on the accelerator, or spread over several devices if it does not fit."""

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

# Fraction of an accelerator's free memory for weights; logits and activations need the rest.
ROOM = 0.8


def placed(model: PreTrainedModel) -> PreTrainedModel:
    """Move a model from the CPU's memory to the devices that it computes on.

    If the accelerator has room for the whole model, it goes there. Otherwise it is spread over all
    accelerators, and what does not fit stays in the CPU's memory and is copied over at every use.

    :param model: in the CPU's memory, without a device map
    :return: the model
    """
    device = get_main_device()
    if device.type == "cpu":
        return model.to(device)  # type: ignore[arg-type, no-any-return]
    free = {key: int(ROOM * size) for key, size in get_max_memory().items() if key != "cpu"}
    if sum(tensor.nbytes for tensor in model.parameters()) <= next(iter(free.values())):
        return model.to(device)  # type: ignore[arg-type, no-any-return]
    return spread(model, {**free, "cpu": sys.maxsize})  # no limit: the model is there already


def spread(
    model: PreTrainedModel, memory: Mapping[int | str, int], **arguments: Any
) -> PreTrainedModel:
    """Spread a model over devices by accelerate, without splitting blocks.

    :param model: to spread
    :param memory: device to the bytes that it may hold; devices are filled in this order
    :param arguments: further arguments of ``accelerate.dispatch_model()``
    :return: the model
    """
    # A private name, but the one that accelerate's documentation tells users to read.
    whole = list(getattr(model, "_no_split_modules", None) or ())
    places = infer_auto_device_map(model, dict(memory), no_split_module_classes=whole)
    return dispatch_model(model, places, **arguments)  # type: ignore[no-any-return]


def let_go(model: torch.nn.Module) -> None:
    """Free a model's weights, because the host's tracing keeps a reference to the model.

    :param model: has no weights afterwards
    """
    remove_hook_from_submodules(model)
    remove_dispatch(model).to("meta")
