"""Dequantizes checkpoints that other tools have quantized, or refuses them.

A model must be dense to be pruned or merged into: a quantized Linear would keep the scales and
format of its old weights. So a quantized checkpoint is dequantized when it is loaded, and saved
dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from dlp_plugin.checkpoints.stored import QUANT_METHOD

__all__ = ["as_plain", "check_known", "dequantizing", "quantization_of"]

_MADE_DENSE = ("compressed-tensors", "fp8", "mxfp4", QUANT_METHOD)


def quantization_of(config: Any) -> Mapping[str, Any]:
    """Return the ``quantization_config`` of a model's configuration.

    :param config: of the model
    :return: a mapping; empty if the model is not quantized
    """
    found = getattr(config, "quantization_config", None) or {}
    return found if isinstance(found, Mapping) else dict(found.to_dict())


def check_known(name: str, quantization: Mapping[str, Any]) -> None:
    """Refuse a quantization method that transformers does not know and would silently ignore.

    :param name: of the checkpoint, for the error
    :param quantization: as :func:`quantization_of` returns it
    :raises ValueError: naming the method
    """
    method = quantization.get("quant_method")
    kinds = [method, *(f"{method}_{bits}bit" for bits in (4, 8))]  # of bitsandbytes
    if quantization and not any(kind in AUTO_QUANTIZATION_CONFIG_MAPPING for kind in kinds):
        raise ValueError(
            f"{name} is quantized by {method!r}, which transformers does not know: give the dense "
            "checkpoint that it was made from"
        )


def dequantizing(name: str, quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that make ``from_pretrained()`` dequantize the model.

    :param name: of the checkpoint, for the error
    :param quantization: as :func:`quantization_of` returns it
    :return: keyword arguments; empty if the checkpoint is not quantized
    :raises ValueError: if the quantization method cannot be undone
    """
    method = quantization.get("quant_method")
    if not quantization:
        return {}
    if method not in _MADE_DENSE:
        raise ValueError(
            f"{name} is quantized by {method!r}, and only a dense model can be pruned or merged "
            f"into: give the dense checkpoint that it was made from (only "
            f"{', '.join(_MADE_DENSE)} can be dequantized)"
        )
    return {"quantization_config": AUTO_QUANTIZATION_CONFIG_MAPPING[method](dequantize=True)}


def as_plain(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a dequantized model into one that was never quantized.

    Otherwise the scales, schemes and hooks that remain on its modules would be saved with it, and
    transformers would rename its weights as those of the quantized model when it saves.

    :param model: dequantized; do not use it afterwards
    :return: a model with the same weights and configuration
    """
    kind: Any = type(model)
    with torch.device("meta"):
        known = kind(model.config).state_dict()
    state = {key: tensor for key, tensor in model.state_dict().items() if key in known}
    plain: PreTrainedModel = kind.from_pretrained(
        None, config=model.config, state_dict=state, dtype=model.dtype
    )
    for key, tensor in [*plain.named_parameters(), *plain.named_buffers()]:
        if key in state:
            tensor.data = tensor.data.to(state[key].dtype)
    plain.generation_config = model.generation_config
    plain.name_or_path = plain.config.name_or_path = model.name_or_path
    return plain
