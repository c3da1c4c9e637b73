"""Lets transformers load a packed folder, and compute with the packed weights on a CPU.

Importing this module registers the quantizer; ``import dlp_plugin`` does so. The parts of a Linear
are collected while the files are read. On a CPU with kernels the Linear is then replaced by a
:class:`~.linear.SparseLinear`, so its dense weight is never in memory. Otherwise, and with
``SparseConfig(dequantize=True)``, the weight is decoded without loss. Then the loaded model is an
ordinary one, and is saved dense.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import cache
from typing import Any

import torch
from loguru import logger
from transformers.core_model_loading import WeightConverter, WeightTransform
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import Mxfp4Config

from dlp_plugin.checkpoints.files import opening
from dlp_plugin.checkpoints.names import SourceNames, check_experts
from dlp_plugin.checkpoints.packed import check_parts
from dlp_plugin.checkpoints.sparse_format import PARTS, QUANT_METHOD, Stored, decode, read_stored
from dlp_plugin.checkpoints.stored import read_fused
from dlp_plugin.engines.experts import (
    files_names,
    read_parts,
    staying_packed,
    whole_parameter,
    with_experts,
)
from dlp_plugin.engines.linear import DTYPES, SparseLinear
from dlp_plugin.kernels.layout import layout_of, parts_of
from dlp_plugin.kernels.products import available

__all__ = ["SparseConfig", "SparseQuantizer"]

_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


class SparseConfig(Mxfp4Config):
    """The ``quantization_config`` of a packed folder.

    It is derived from ``Mxfp4Config`` because transformers accepts a configuration from the caller
    of ``from_pretrained()`` for a few classes only.

    :param dequantize: whether to decode the model to dense weights when it is loaded
    :param fields: the ``quantization_config`` of ``config.json``; leave it out when you pass this
        object to ``from_pretrained()``
    :raises ValueError: if ``fields`` are damaged or of a newer version
    """

    def __init__(self, dequantize: bool = False, **fields: Any) -> None:
        if fields:
            read_stored(fields, "config.json")
        self.quant_method: Any = QUANT_METHOD
        self.dequantize = dequantize
        self.__dict__.update(fields)

    def to_dict(self) -> dict[str, Any]:
        """Return the ``quantization_config`` for ``config.json``."""
        return deepcopy({key: each for key, each in vars(self).items() if key != "dequantize"})


class SparseQuantizer(HfQuantizer):
    """Loads packed Linears into a model: they stay packed, or are decoded.

    :param quantization_config: of the folder, with the caller's ``dequantize``
    :param arguments: of transformers' own quantizers
    """

    quantization_config: Any  # a SparseConfig

    def __init__(self, quantization_config: SparseConfig, **arguments: Any) -> None:
        super().__init__(quantization_config, **arguments)
        if not self.pre_quantized:
            raise ValueError(
                "quantization_config is a SparseConfig, but the model is not packed: leave it out, "
                "or give a folder that `dlp-plugin pack` wrote"
            )
        said = quantization_config.to_dict()
        self.linears = read_stored(said, "config.json")
        self.fused = read_fused(said, self.linears, "config.json")
        self.places: dict[str, str] = {}
        self.experts: set[str] = set()
        self.opened: Callable[..., Any] | None = None
        self._dtypes: dict[str, torch.dtype] = {}

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """Return the model's conversions, extended for packed Linears and experts.

        :param weight_conversions: the model's own
        """
        return [*with_experts(weight_conversions, self.fused), _Gatherer()]

    def update_device_map(self, device_map: Any) -> Any:
        """Put the whole model on the CPU if there is no accelerator.

        An automatic map would count the weights as dense, and could offload some to disk.

        :param device_map: as passed to ``from_pretrained()``
        """
        automatic = isinstance(device_map, str) and device_map in _AUTOMATIC
        packed = not self.quantization_config.dequantize and available() is None
        alone = torch.accelerator.current_accelerator() is None
        return {"": "cpu"} if automatic and packed and alone else device_map

    def is_serializable(self) -> bool:
        """Whether the model can be saved; it can, dense or packed."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained; it can, adapters on packed weights included."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether the model can be compiled; it can, because the product is a torch operator."""
        return True

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any = None, **arguments: Any
    ) -> None:
        opened = self.opened = opening()
        for file in arguments.get("checkpoint_files") or ():
            self.places.update(dict.fromkeys(opened(file).keys(), file))
        check_parts(self.linears, self.places)
        self._dtypes = {name: tensor.dtype for name, tensor in model.named_parameters()}
        reason = _why_dense(model, device_map)
        if reason and not self.quantization_config.dequantize:
            logger.info(f"{model.config.name_or_path} is loaded dense: {reason}")
            self.quantization_config.dequantize = True
        self._see_to_experts(model, opened)

    def _see_to_experts(self, model: Any, opened: Callable[..., Any]) -> None:
        """Check that experts are complete and of one shape, and find those that stay packed."""
        shapes: dict[str, Sequence[int]] = {
            f"{name}.weight": stored.shape for name, stored in self.linears.items()
        }
        for name, count in self.fused.items():
            shapes[name] = (count, *self.linears[f"{name}.0"].shape)
        names = SourceNames(model)
        for key, place in self.places.items():
            if key.rpartition(".")[2] not in PARTS and names.experts(key):
                shapes[key] = opened(place).get_slice(key).get_shape()
        check_experts(names, shapes, model.config.name_or_path)
        if not self.quantization_config.dequantize:
            self.experts = staying_packed(model, names, shapes, self.linears)

    def _process_model_after_weight_loading(self, model: Any, **arguments: Any) -> None:
        self.opened = None
        # With a quantizer, transformers leaves renamed tensors in the file's dtype.
        for name, parameter in model.named_parameters():
            if name not in self.places and name in self._dtypes:
                parameter.data = parameter.data.to(self._dtypes[name])

    def stays_packed(self, stored: Stored, model: Any, path: str) -> bool:
        """Whether a Linear stays packed, instead of being decoded.

        :param stored: how the Linear is stored
        :param model: that it is part of
        :param path: full name of the Linear in the model
        """
        tied = model.all_tied_weights_keys
        return (
            not self.quantization_config.dequantize
            and type(model.get_submodule(path)) is torch.nn.Linear
            and stored.dtype in DTYPES
            and f"{path}.weight" not in {*tied, *tied.values()}
            and not _reads_weight(model, path)
        )

    def get_state_dict_and_metadata(
        self, model: Any
    ) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Return the state that ``save_pretrained()`` writes, and update the configuration for it.

        :param model: to save
        :return: the state, None if only adapters are saved; and no metadata
        :raises ValueError: if weights that are quantized in the source are dense in the model
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only adapters are written
        modules = {n: each for n, each in model.named_modules() if isinstance(each, SparseLinear)}
        if getattr(self.quantization_config, "source", None) and len(modules) < len(self.linears):
            raise ValueError(
                f"{len(self.linears) - len(modules)} quantized Linears of "
                f"{model.config.name_or_path} were made dense when it was loaded, and cannot be "
                "saved as quantized ones: copy the folder instead"
            )
        state, linears = model.state_dict(), {}
        names = files_names(model, modules)
        for name, module in modules.items():
            stored, parts = parts_of(module.layout)
            for part in PARTS:
                state.pop(f"{name}.{part}", None)
            file, saved = names[name]
            state.update((f"{saved}.{part}", tensor) for part, tensor in parts.items())
            linears[file] = stored.to_config()
        self.quantization_config.linears = linears
        # Fused tensors were decoded, or are saved expert by expert.
        vars(self.quantization_config).pop("fused", None)
        return state, {}


class _Gatherer(WeightConverter):
    """Collects the parts of a packed Linear, and makes a SparseLinear or dense weight of them."""

    __slots__ = ()

    def __init__(self) -> None:
        # WeightConverter.__init__ requires operations, and these do not get the Linear's name.
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
        """Return a Linear's dense weight by its full name; nothing if the Linear stays packed."""
        source = next(iter(self.layer_targets[layer_name]))
        name = source.rpartition(".")[0]  # full name of the Linear in the file
        stored, where = hf_quantizer.linears[name], f"{hf_quantizer.places[source]}: {name}"
        gathered = self.materialize_tensors()
        path = layer_name.removesuffix(".weight")
        if hf_quantizer.stays_packed(stored, model, path):
            # The collected tensors would keep their whole file in memory: read them once more.
            layout = layout_of(stored, read_parts(hf_quantizer, name), where)
            bias = model.get_submodule(path).bias
            model.set_submodule(path, SparseLinear(layout, bias, path))
            loading_info.missing_keys.discard(layer_name)
            return {}
        parts = {pattern[2:-1]: tensors[0] for pattern, tensors in gathered.items()}
        dtype = whole_parameter(model, layer_name).dtype
        return {layer_name: decode(stored, parts, dtype, where)}

    def was_used(self) -> bool:
        """Whether saving must undo this conversion; no, because the state has the file's names."""
        return False


def _why_dense(model: Any, device_map: Any) -> str | None:
    """Return why a model cannot compute with packed weights; None if it can."""
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map or "cpu"]
    others = [str(place) for place in places if str(place).partition(":")[0] != "cpu"]
    if others:
        return f"packed weights run on the CPU only, and device_map names {others[0]}"
    if getattr(model.config, "distributed_config", None):
        return "packed weights cannot be divided among processes"
    if model.dtype not in DTYPES:
        return f"packed weights run in bfloat16, float16 and float32, not in {model.dtype}"
    return available()


def _reads_weight(model: Any, path: str) -> bool:
    """Whether a model's source code reads the weight of a Linear instead of calling the Linear.

    :param path: full name of the Linear
    """
    above, _, name = path.rpartition(".")
    code = _code(type(model.get_submodule(above)).__module__)
    return re.search(rf"\b{name}\.weight\b", code) is not None


@cache
def _code(module: str) -> str:
    """Return the source code of a module; empty if it is not available."""
    with suppress(OSError, TypeError):
        return inspect.getsource(sys.modules[module])
    return ""


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(QUANT_METHOD)(SparseConfig)
    register_quantizer(QUANT_METHOD)(SparseQuantizer)
