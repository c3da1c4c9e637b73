"""Training a pruned model's weights while its zeros are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from dlp_plugin.recovery.masks import masks_of, set_to_zero, some, weights_of


def hold_masks(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> RemovableHandle:
    """Set pruned weights to zero after every step of an optimizer that trains the model.

    This holds for any momentum and weight decay. With the Trainer of transformers, call
    ``trainer.create_optimizer()`` first and pass ``trainer.optimizer``. llm-compressor's
    ``ConstantPruningModifier`` is no replacement: it needs its events fired from the training
    loop, does nothing without ``start: 0``, and also prunes unpruned weights up to 1e-8.

    :param model: the pruned model
    :param optimizer: of its weights
    :return: handle whose ``remove()`` ends it
    :raises ValueError: if no module is pruned, or the optimizer trains no pruned module
    """
    found = masks_of(model)
    if not found:
        raise ValueError("no module of the model is pruned (at least 1 % zeros): prune it first")
    # accelerate's optimizer steps the one that it wraps
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    trained = {id(value) for group in optimizer.param_groups for value in group["params"]}
    held = []
    for weight in weights_of(model):
        value = getattr(weight.owner, weight.parameter)
        if weight.name in found and id(value) in trained:
            held.append((value, ~found[weight.name]))
    if not held:
        raise ValueError(
            f"the optimizer trains none of the pruned weights of {some(list(found))}: make it "
            "from the model's parameters; for adapters of peft use mask_updates()"
        )

    def hold(*_: Any) -> None:
        for value, pruned in held:
            set_to_zero(value, pruned)

    return optimizer.register_step_post_hook(hold)
