"""Lets vLLM run packed checkpoints.

vLLM's entry point ``vllm.general_plugins`` calls :func:`register`. The parts of a Linear are
collected while vLLM reads them. Then vLLM's own weight loaders take the slice that this process
needs, and copy it into the dense weight that vLLM has allocated. They slice the packed weight: rows
for column-parallel layers, columns for row-parallel layers.

On a CPU with kernels the copy is only recorded, and the Linear stays packed. The dense weight
costs no memory there, because the operating system assigns memory when it is first written.
Elsewhere the copy decodes the slice, and the Linear is an ordinary one from then on. Experts are
always decoded (:mod:`~.vllm_experts`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any
from weakref import WeakMethod, WeakValueDictionary, ref

import torch
from torch import Tensor
from torch.library import Library
from torch.nn import Module, Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from dlp_plugin.checkpoints.sparse_format import PARTS, QUANT_METHOD, Stored, read_stored
from dlp_plugin.engines.rows import Product, pieces_of, product_of
from dlp_plugin.engines.slices import LazyWeight
from dlp_plugin.engines.vllm_experts import FUSED_EXPERTS, RoutedExperts, SparseExpertsMethod
from dlp_plugin.kernels.layout import Layout
from dlp_plugin.kernels.products import available

__all__ = ["SparseConfig", "SparseLinearMethod", "register"]

_PACK = "fetch it or pack the checkpoint again"
_UNPACK = "unpack the checkpoint first (dlp-plugin unpack)"
_REARRANGED = ("bloom", "falcon", "k2_horizon", "llama4", "llama4_text")
"""Model types for which vLLM permutes rows of tensors as it reads them, packed parts included."""
_SHARDS = ("q", "k", "v", "index_q", "index_k")
"""vLLM's names of the shards of a fused attention projection, in order."""

Loader = Callable[..., None]
ShardId = str | int | tuple[int, ...] | None
Shard = tuple[str, Stored | None]
"""A Linear of the checkpoint: its full name, and how it is stored; None if it is dense."""

_logger = init_logger(f"vllm.{__name__}")  # a name under which vLLM's logging settings apply


def register() -> None:
    """Register the format with vLLM; calling it again changes nothing."""
    register_quantization_config(QUANT_METHOD)(SparseConfig)


class SparseConfig(QuantizationConfig):  # type: ignore[misc]
    """The ``quantization_config`` of a packed checkpoint in vLLM.

    :param linears: full name of every packed Linear to how it is stored
    """

    def __init__(self, linears: dict[str, Stored]) -> None:
        super().__init__()
        self._shards: dict[str, Shard] = {name: (name, one) for name, one in linears.items()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SparseConfig:
        """Read ``quantization_config``.

        :raises ValueError: if it is damaged or of a newer version
        """
        return cls(read_stored(config, "config.json"))

    @classmethod
    def get_name(cls) -> str:
        """Return the ``quant_method`` of the format."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return the dtypes that weights can be decoded to."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return 0: every GPU will do, because weights are decoded there."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no file names: ``config.json`` holds everything."""
        return []

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> None:
        """Refuse a ``--quantization`` other than the checkpoint's.

        :raises ValueError: naming both
        """
        if hf_quant_cfg["quant_method"] == QUANT_METHOD and user_quant not in (None, QUANT_METHOD):
            raise _twice(f"--quantization {user_quant}")

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the Linears as the model in vLLM names them."""
        ending = f".{PARTS[0]}"  # mappers are for names of tensors
        renamed = {
            hf_to_vllm_mapper.map_name(name + ending): shard for name, shard in self._shards.items()
        }
        self._shards = {name.removesuffix(ending): one for name, one in renamed.items() if name}

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Refuse models whose weights vLLM permutes as it reads them.

        :raises ValueError: for such a model
        """
        kind = getattr(hf_config, "model_type", None)
        if kind in _REARRANGED:
            raise ValueError(
                f"{model_name} is packed, and vLLM permutes the rows of a {kind} model's weights "
                f"as it reads them, which is not possible with packed weights: {_UNPACK}"
            )

    def get_quant_method(self, layer: Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method that loads and applies a layer's weights; None for vLLM's default.

        :raises ValueError: if the layer's weights are packed and it only takes dense ones, as an
            output layer does, or if vLLM is told to quantize the layer as it loads
        """
        if isinstance(layer, LinearBase):
            shards = self._shards_of(prefix)
            if not any(stored for _, stored in shards):
                return UnquantizedLinearMethod()
            self._check_online(layer, prefix)
            return SparseLinearMethod(shards)
        if isinstance(layer, RoutedExperts):
            inside = {
                name.removeprefix(f"{prefix}."): (of_checkpoint, stored)
                for name, (of_checkpoint, stored) in self._shards.items()
                if stored and name.startswith(f"{prefix}.")
            }
            if not inside:
                return None
            self._check_online(layer, prefix)
            return SparseExpertsMethod(layer, inside)
        for name, (of_checkpoint, _) in self._shards.items():
            if f"{name}.".startswith(f"{prefix}."):
                raise ValueError(
                    f"{of_checkpoint} is packed, but vLLM's {type(layer).__name__} takes dense "
                    f"weights only: {_UNPACK}"
                )
        return None

    @staticmethod
    def get_checkpoint_weight_mapper() -> Any:
        """Return the mapper that renames packed parts of fused experts."""
        return FUSED_EXPERTS

    def _check_online(self, layer: Module, prefix: str) -> None:
        """Refuse online quantization of a packed layer.

        vLLM would replace our method by its own, which expects a dense weight.
        """
        online = self.online_quantization_config
        if online:
            online.packed_modules_mapping = self.packed_modules_mapping
            if online.resolve_quant_method_cls(type(layer), prefix):
                raise _twice(f"quantization_config of {prefix}")

    def _shards_of(self, prefix: str) -> list[Shard]:
        """Return the checkpoint's Linears that vLLM joins into one layer, in order."""
        if prefix in self._shards:
            return [self._shards[prefix]]
        above, dot, last = prefix.rpartition(".")
        names = [above + dot + name for name in self.packed_modules_mapping.get(last, [last])]
        return [self._shards.get(name, (name, None)) for name in names]


def _twice(asked: str) -> ValueError:
    return ValueError(
        f"the checkpoint is packed ({QUANT_METHOD}) and cannot be quantized when it is loaded "
        f"({asked}): leave that out, or {_UNPACK}"
    )


@register_weight_loader_v2_supported_method  # as for the dense method, whose weight it uses
class SparseLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """Loads and applies a Linear of vLLM of which at least one shard is packed.

    :param shards: the checkpoint's Linears that vLLM joins into this one, in order
    """

    supports_pre_processed_weights = False  # such weights would bypass the loaders below

    def __init__(self, shards: list[Shard]) -> None:
        super().__init__()
        self._shards = shards
        self._parts: list[dict[str, Tensor]] = [{} for _ in shards]
        self._arrived: set[int] = set()
        self._taken: dict[int, LazyWeight] | None = {} if current_platform.is_cpu() else None
        self._rows = 0

    def create_weights(self, layer: Any, *args: Any, **attributes: Any) -> None:
        """Make the dense weight, and an empty parameter per part whose loader collects the part."""
        super().create_weights(layer, *args, **attributes)
        self._rows = len(layer.weight)
        layer.weight.weight_loader = self._dense_loader(layer.weight.weight_loader)
        dtypes = {
            part: dtype
            for _, stored in self._shards
            if stored
            for part, dtype in stored.part_dtypes().items()
        }
        for part, dtype in dtypes.items():
            parameter = Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": self._part_loader(layer, part)})
            layer.register_parameter(part, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all tensors were loaded, and prepare the product.

        :raises ValueError: naming the tensors that are missing or damaged
        """
        missing = [
            f"{name}.{part}"
            for index, (name, stored) in enumerate(self._shards)
            if index not in self._arrived
            for part in (stored.part_shapes() if stored else ["weight"])
            if part not in self._parts[index]
        ]
        if missing:
            raise ValueError(f"the checkpoint lacks {', '.join(missing)}: {_PACK}")
        for part in PARTS:
            if hasattr(layer, part):
                delattr(layer, part)
        if self._taken is None:
            _tell_decoded(f"there are no kernels for {current_platform.device_type}")
            super().process_weights_after_loading(layer)
            return
        # A tensor holds the number, because vLLM would cache a constant with its compiled graphs.
        number = next(_numbers)
        _methods[number] = self
        layer.register_buffer("packed_number", torch.tensor(number), persistent=False)
        taken, self._taken = self._taken, {}
        why = available()
        # vLLM sets this mark on layers whose dense weight it reads itself.
        if why or getattr(layer, "_cpu_skip_gemm_dispatch", False):
            if why:
                _tell_decoded(why)
            self.product = self._decoded(layer, taken)
        else:
            self.product = self._packed(layer, taken)

    def _decoded(self, layer: Any, taken: Mapping[int, LazyWeight]) -> Product:
        """Decode the packed rows, and return vLLM's own product with the dense weight."""
        for first, lazy in taken.items():
            layer.weight.data[first : first + lazy.shape[0]] = lazy.decoded()
        super().process_weights_after_loading(layer)
        return _product_of(layer)

    def _packed(self, layer: Any, taken: Mapping[int, LazyWeight]) -> Product:
        """Return a product with packed rows by our kernels, and with dense rows by vLLM's."""
        weight = layer.weight.data
        layer.weight = Parameter(weight.new_empty(0), requires_grad=False)
        pieces = pieces_of(weight, taken)
        for index, piece in enumerate(pieces):
            if isinstance(piece, Layout):
                for name, tensor in piece.tensors.items():
                    layer.register_buffer(f"packed_{index}_{name}", tensor)
        return product_of(pieces, _product_of_dense)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute ``x W^T + bias`` of ``x`` ``[..., in]``."""
        if self._taken is None:
            found: Tensor = super().apply(layer, x, bias)
        else:
            operator = torch.ops.dlp_plugin.vllm_linear
            found = operator(x, layer.packed_number, self._rows, bias)
        return found

    # vLLM keeps loaders until its process ends. They hold weak references, so that the layer's
    # memory can be freed.

    def _part_loader(self, layer: Any, part: str) -> Loader:
        """Make a loader that collects a part, and loads the weight once all parts are there."""
        layer = ref(layer)

        def load(parameter: Parameter, tensor: Tensor, loaded_shard_id: ShardId = None) -> None:
            index = self._index_of(loaded_shard_id)
            name, stored = self._shards[index]
            parts = self._parts[index]
            if stored is None or part not in stored.part_shapes():
                raise ValueError(
                    f"a file holds {name}.{part}, which config.json does not list: {_PACK}"
                )
            weight = layer().weight
            parts[part] = tensor.to(weight.device)
            if parts.keys() == stored.part_shapes().keys():
                self._parts[index] = {}
                taken = None if stored.dtype == torch.float64 else self._taken  # no kernel
                whole = LazyWeight.of(stored, parts, weight.dtype, name, taken)
                weight.weight_loader(weight, whole, *_given(loaded_shard_id))
                self._arrived.add(index)

        return load

    def _dense_loader(self, loader: Loader) -> Loader:
        """Make the loader of the weight: it gets dense shards, and packed ones once complete."""
        method = WeakMethod(loader)

        def load(weight: Parameter, tensor: Tensor, loaded_shard_id: ShardId = None) -> None:
            index = self._index_of(loaded_shard_id)
            name, stored = self._shards[index]
            if stored and not isinstance(tensor, LazyWeight):
                raise ValueError(f"{name}.weight is dense, but config.json says packed: {_PACK}")
            of_vllm: Any = method()
            of_vllm(weight, tensor, *_given(loaded_shard_id))
            self._arrived.add(index)

        return load

    def _index_of(self, shard: ShardId) -> int:
        """Return the index of the checkpoint's Linear that belongs to vLLM's name of a shard.

        vLLM may count parts of one Linear as shards of their own; a tuple then names all of them.
        A wrong index would show as shapes that do not fit.
        """
        if isinstance(shard, str):
            return _SHARDS.index(shard)
        first = shard[0] if isinstance(shard, tuple) else shard or 0
        return min(first, len(self._shards) - 1)


def _given(shard: ShardId) -> tuple[Any, ...]:
    """Return a loader's further arguments: those of layers without shards take no shard name."""
    return () if shard is None else (shard,)


def _tell_decoded(why: str) -> None:
    _logger.warning_once("Packed weights are decoded to dense ones: %s", why)


def _product_of_dense(weight: Tensor) -> Product:
    layer = Module()
    layer.weight = Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    product = _product_of(layer)

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        found = product(x, None)  # some of vLLM's products require the bias in float32
        return found if bias is None else found + bias

    return run


def _product_of(layer: Any) -> Product:
    """Return vLLM's product with a layer's weight, without a reference to the layer."""
    product, weight = layer.cpu_linear, layer.weight
    return lambda x, bias: product(x, weight, bias)


_numbers = count()
_methods: WeakValueDictionary[int, SparseLinearMethod] = WeakValueDictionary()


def _linear(x: Tensor, number: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    return _methods[int(number)].product(x, bias)


def _shape_of_linear(x: Tensor, number: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


_library = Library("dlp_plugin", "FRAGMENT")  # operators are removed when this object is freed
direct_register_custom_op(
    "vllm_linear",
    _linear,
    fake_impl=_shape_of_linear,
    target_lib=_library,
    dispatch_key="CPU",
)
