"""Refuses results that are NaN or infinite, and finds their cause in the model."""

from __future__ import annotations

import math

import torch
from accelerate.utils import align_module_device

__all__ = ["check_finite"]


def check_finite(figure: float, what: str, model: torch.nn.Module) -> float:
    """Refuse a result that is NaN or infinite.

    :param figure: the result
    :param what: name of the result and the model, for the error
    :param model: that the result was measured on
    :return: the result
    :raises ValueError: naming a weight that is not finite, or else the probable cause
    """
    if math.isfinite(figure):
        return figure
    if name := _broken(model):
        reason = f"{name} holds NaN or infinity: take a checkpoint that does not"
    elif math.isnan(figure):
        kind = str(getattr(model, "dtype", "its dtype")).removeprefix("torch.")
        reason = (
            f"its weights are finite, so its activations overflow {kind}: set a wider dtype in its "
            "config.json"
        )
    else:
        reason = (
            "it gives a part of the text a probability of 0: prune it less, or check that it was "
            "trained on such text"
        )
    raise ValueError(f"{what} is {figure}; {reason}")


def _broken(model: torch.nn.Module) -> str | None:
    """Return the name of the first parameter, buffer or packed weight that is not finite."""
    for name, module in model.named_modules():
        with align_module_device(module):  # loads weights that accelerate has offloaded
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for tensor_name, tensor in own:
                if tensor.is_floating_point() and not tensor.float().isfinite().all():
                    return f"{name}.{tensor_name}".strip(".")
            decoded = getattr(module, "decoded", None)
            if decoded is not None and not decoded().isfinite().all():
                return f"{name}.weight"
    return None
