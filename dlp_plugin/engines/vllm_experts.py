"""Decodes packed experts when vLLM loads them, because vLLM multiplies by all experts at once.

The parts of an expert are collected while vLLM reads them. Then vLLM's own weight loader takes the
slice that this process needs, and decodes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.utils import set_weight_attrs

from dlp_plugin.checkpoints.sparse_format import PARTS, Stored
from dlp_plugin.engines.slices import LazyWeight

__all__ = ["FUSED_EXPERTS", "RoutedExperts", "SparseExpertsMethod"]

_FUSED = re.compile(rf"\.experts\.([a-z]\w*)\.(\d+)\.({'|'.join(PARTS)})$")
FUSED_EXPERTS = WeightsMapper(orig_to_new_regex={_FUSED: r".experts.routed_experts.\1_\2_\3"})
"""Renames a part of a packed expert of a fused tensor to a parameter of vLLM's layer."""
_FUSED_SHARDS = {"gate_up_proj": ("w13", "gpt_oss_w13"), "down_proj": ("w2", "gpt_oss_w2")}
"""GPT-OSS' name of a fused tensor to the stem of vLLM's parameter and vLLM's name of the shard."""

_logger = init_logger(f"vllm.{__name__}")


class _Expert(NamedTuple):
    """A packed Linear of one expert.

    :param name: full name in the checkpoint
    :param stored: how it is stored
    :param stem: of the vLLM parameter that it belongs to, ``w13`` or ``w2``
    :param shard: vLLM's name of its part of that parameter
    :param expert: index of the expert in the layer
    """

    name: str
    stored: Stored
    stem: str
    shard: str
    expert: int


class SparseExpertsMethod(UnquantizedFusedMoEMethod):  # type: ignore[misc]
    """Loads a layer's experts of which some are packed; they are dense afterwards.

    :param layer: vLLM's
    :param packed: local name in the layer, ``3.w1`` or ``gate_up_proj.3``, to the full name in the
        checkpoint and how the Linear is stored
    :raises ValueError: if the layer has no parameter for a packed Linear
    """

    supports_eplb = False  # expert-parallel load balancing loads some experts twice

    def __init__(self, layer: Any, packed: Mapping[str, tuple[str, Stored]]) -> None:
        super().__init__(layer.moe_config)
        self.supports_pre_processed_weights = False  # such weights would bypass the loaders below
        self._experts = {local: _expert(layer, local, *one) for local, one in packed.items()}
        self._parts: dict[str, dict[str, Tensor]] = {local: {} for local in packed}
        self._arrived: set[str] = set()
        self._registered: list[str] = []

    def create_weights(self, layer: Any, *args: Any, **attributes: Any) -> None:
        """Make the dense weights, and an empty parameter per part whose loader collects it."""
        super().create_weights(layer, *args, **attributes)
        shards = {(one.shard, one.expert): local for local, one in self._experts.items()}
        for local, one in self._experts.items():
            for part, dtype in one.stored.part_dtypes().items():
                if one.shard.startswith("gpt_oss"):
                    name, loader = (
                        f"{local.replace('.', '_')}_{part}",
                        self._loader(layer, part, local),
                    )
                else:
                    name, loader = f"{one.stem}_{part}", self._loader_of_all(layer, part, shards)
                if not hasattr(layer, name):
                    parameter = Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
                    set_weight_attrs(parameter, {"weight_loader": loader})
                    layer.register_parameter(name, parameter)
                    self._registered.append(name)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all experts of this process were loaded.

        :raises ValueError: naming the tensors that are missing
        """
        of_process = layer.expert_map_manager.map_global_to_local
        missing = [
            f"{one.name}.{part}"
            for local, one in self._experts.items()
            if local not in self._arrived and of_process(one.expert) != -1
            for part in one.stored.part_shapes()
            if part not in self._parts[local]
        ]
        if missing:
            raise ValueError(
                f"the checkpoint lacks {', '.join(missing)}: fetch it or pack the checkpoint again"
            )
        for name in self._registered:
            delattr(layer, name)
        self._registered, self._parts = [], {}
        _logger.warning_once(
            "Packed experts are decoded to dense ones: vLLM multiplies by all experts at once"
        )
        super().process_weights_after_loading(layer)

    # vLLM keeps loaders until its process ends. They hold weak references, so that the layer's
    # memory can be freed.

    def _loader(self, layer: Any, part: str, local: str) -> Callable[..., bool]:
        """Make a loader that collects a part, and loads the weight once all parts are there."""
        layer = ref(layer)

        def load(parameter: Parameter, tensor: Tensor, **_: Any) -> bool:
            one, parts = self._experts[local], self._parts[local]
            weight = getattr(layer(), f"{one.stem}_weight")
            parts[part] = tensor.to(weight.device)
            if parts.keys() != one.stored.part_shapes().keys():
                return True
            self._parts[local] = {}
            whole = LazyWeight.of(one.stored, parts, weight.dtype, one.name)
            self._arrived.add(local)
            return bool(
                layer().weight_loader(
                    weight, whole, f"{one.stem}_weight", one.shard, one.expert, return_success=True
                )
            )

        return load

    def _loader_of_all(
        self, layer: Any, part: str, shards: Mapping[tuple[str, int], str]
    ) -> Callable[..., bool]:
        """Make a loader for one part of all experts."""
        layer = ref(layer)

        def load(
            param: Parameter,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool:
            local = shards.get((shard_id, expert_id))
            if local is None or part not in self._experts[local].stored.part_shapes():
                raise ValueError(
                    f"a file holds {part} of {shard_id} of expert {expert_id} of "
                    f"{layer().layer_name}, which config.json does not list: fetch it or pack the "
                    "checkpoint again"
                )
            return self._loader(layer(), part, local)(param, loaded_weight)

        return load


def _expert(layer: Any, local: str, name: str, stored: Stored) -> _Expert:
    first, _, last = local.partition(".")
    shards = {
        layer.ckpt_gate_proj_name: ("w13", "w1"),
        layer.ckpt_up_proj_name: ("w13", "w3"),
        layer.ckpt_down_proj_name: ("w2", "w2"),
    }
    if first.isdecimal() and last in shards:
        return _Expert(name, stored, *shards[last], int(first))
    if type(layer).__name__ == "GptOssRoutedExperts" and first in _FUSED_SHARDS:
        return _Expert(name, stored, *_FUSED_SHARDS[first], int(last))
    raise ValueError(
        f"{name} is packed, but vLLM's {type(layer).__name__} has no parameter for it: unpack the "
        "checkpoint first (dlp-plugin unpack)"
    )
