"""Figures that are no numbers, and what in a model they come from."""

from __future__ import annotations

import math

import torch
from accelerate.utils import align_module_device

__all__ = ["check_finite"]


def check_finite(figure: float, what: str, model: torch.nn.Module) -> float:
    """Refuse a figure that says nothing.

    :param figure: what was measured
    :param what: what it is of which model, for the message
    :param model: where it stands
    :return: the figure
    :raises ValueError: naming a weight that is not finite, or else what the model may lack
    """
    if math.isfinite(figure):
        return figure
    if name := _broken(model):
        reason = f"{name} holds NaN or infinity: take a checkpoint that does not"
    elif math.isnan(figure):
        kind = str(getattr(model, "dtype", "its dtype")).removeprefix("torch.")
        reason = (
            f"its weights are finite, so what it computes of them overflows {kind}: set a wider "
            "dtype in its config.json"
        )
    else:
        reason = (
            "it gives a part of the text no probability at all: prune it less, or check that the "
            "text is of a kind that it was trained on"
        )
    raise ValueError(f"{what} is {figure}; {reason}")


def _broken(model: torch.nn.Module) -> str | None:
    """The first parameter or buffer that is not finite, or weight that is kept packed."""
    for name, module in model.named_modules():
        with align_module_device(module):  # of a model that is spread
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for tensor_name, tensor in own:
                if tensor.is_floating_point() and not tensor.float().isfinite().all():
                    return f"{name}.{tensor_name}".strip(".")
            decoded = getattr(module, "decoded", None)
            if decoded is not None and not decoded().isfinite().all():
                return f"{name}.weight"
    return None
