"""transformers loads a packed folder as the dense model that it was packed from, bit for bit.

Importing this module registers the quantizer; ``import dlp_plugin`` sees to that. The model's
modules are not replaced: a Linear's parts are gathered while the files are read, and decoded
where the dense weight would have been copied, so that in memory are the dense model and packed
tensors that are not decoded yet. The loaded model is an ordinary one, and is saved as such.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open
from transformers.core_model_loading import WeightConverter, WeightTransform
from transformers.distributed.utils import is_dtensor
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dlp_plugin.checkpoints.packed import check_parts
from dlp_plugin.checkpoints.sparse_format import PARTS, QUANT_METHOD, decode, read_stored

__all__ = ["SparseConfig", "SparseQuantizer"]


class SparseConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a packed folder.

    :raises ValueError: if it is damaged or of a newer version
    """

    def __init__(self, **fields: Any) -> None:
        read_stored(fields, "config.json")
        self.__dict__.update(fields)
        self.dequantize = True  # the model has no quantization_config once it is loaded


class SparseQuantizer(HfQuantizer):
    """Decodes the weights of packed Linears on their way into the model."""

    def __init__(self, quantization_config: SparseConfig, **arguments: Any) -> None:
        super().__init__(quantization_config, **arguments)
        self.linears = read_stored(quantization_config.to_dict(), "config.json")
        self.places: dict[str, str] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """The model's own conversions, and the decoding."""
        return [*weight_conversions, _Decoder()]

    def is_serializable(self) -> bool:
        """Whether what is loaded can be saved: it is dense."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether what is loaded can be trained: it is dense."""
        return True

    def _process_model_before_weight_loading(self, model: Any, **arguments: Any) -> None:
        for file in arguments.get("checkpoint_files") or ():
            with safe_open(file, framework="pt") as opened:
                self.places.update(dict.fromkeys(opened.keys(), file))
        check_parts(self.linears, self.places)
        self._dtypes = {name: tensor.dtype for name, tensor in model.named_parameters()}

    def _process_model_after_weight_loading(self, model: Any, **arguments: Any) -> None:
        # Where there is a quantizer, transformers leaves what it renames in the file's dtype.
        for name, parameter in model.named_parameters():
            if name not in self.places and name in self._dtypes:
                parameter.data = parameter.data.to(self._dtypes[name])


class _Decoder(WeightConverter):
    """Gathers the parts of a Linear under the name of its weight, and decodes them."""

    __slots__ = ()

    def __init__(self) -> None:
        # WeightConverter's own wants operations, which are not told whose the tensors are.
        WeightTransform.__init__(self, [rf"\.{part}$" for part in PARTS], [".weight"])
        self.operations = []
        self.force_cpu = False

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, torch.Tensor]:
        """The weight of one Linear by its full name in the model."""
        source = next(iter(self.layer_targets[layer_name]))
        name = source.rpartition(".")[0]  # its full name in the file
        parts = {
            pattern[2:-1]: tensors[0] for pattern, tensors in self.materialize_tensors().items()
        }
        parameter = model.get_parameter(layer_name)
        if is_dtensor(parameter):
            raise ValueError(
                f"{layer_name} is packed, and transformers would divide it among processes before "
                "it is decoded: load the folder that `dlp-plugin unpack` writes"
            )
        where = f"{hf_quantizer.places[source]}: {name}"
        return {layer_name: decode(hf_quantizer.linears[name], parts, parameter.dtype, where)}

    def was_used(self) -> bool:
        """Whether saving has something to turn back: what is saved is dense."""
        return False


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(QUANT_METHOD)(SparseConfig)
    register_quantizer(QUANT_METHOD)(SparseQuantizer)
