"""Checkpoints that others have quantized: what can be made dense, and what is refused.

What is pruned or merged has to be dense: a quantized Linear would keep scales and format of the
weights that it had before. So such a checkpoint is made dense as it is loaded, and is saved dense.
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
    """The ``quantization_config`` of a model's configuration; empty where there is none."""
    found = getattr(config, "quantization_config", None) or {}
    return found if isinstance(found, Mapping) else dict(found.to_dict())


def check_known(name: str, quantization: Mapping[str, Any]) -> None:
    """Refuse a quantization that transformers does not know, and would not heed.

    :param name: of the checkpoint, for the message
    :raises ValueError: naming it
    """
    method = quantization.get("quant_method")
    kinds = [method, *(f"{method}_{bits}bit" for bits in (4, 8))]  # of bitsandbytes
    if quantization and not any(kind in AUTO_QUANTIZATION_CONFIG_MAPPING for kind in kinds):
        raise ValueError(
            f"{name} is quantized by {method!r}, which transformers does not know: give the dense "
            "checkpoint that it was made from"
        )


def dequantizing(name: str, quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``from_pretrained()`` that give a dense model.

    :param name: of the checkpoint, for the message
    :raises ValueError: if a checkpoint of this kind cannot be made dense
    """
    method = quantization.get("quant_method")
    if not quantization:
        return {}
    if method not in _MADE_DENSE:
        raise ValueError(
            f"{name} is quantized by {method!r}, and only a dense model can be pruned or merged "
            f"into: give the dense checkpoint that it was made from (made dense here are: "
            f"{', '.join(_MADE_DENSE)})"
        )
    return {"quantization_config": AUTO_QUANTIZATION_CONFIG_MAPPING[method](dequantize=True)}


def as_plain(model: PreTrainedModel) -> PreTrainedModel:
    """A dequantized model as one that was never quantized.

    Scales, schemes and hooks that stay behind on its modules would be saved with it, and
    transformers would save it by the names of quantized weights read backwards.

    :param model: it is of no use after that
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
