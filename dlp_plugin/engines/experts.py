"""Packed experts on their way into transformers, decoded before it makes one weight of them.

A checkpoint holds a layer's experts one by one (``experts.0.w1``), or fused in a tensor; the model
holds them fused. What transformers would do with dense ones is done with decoded ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.distributed.utils import is_dtensor

from dlp_plugin.checkpoints.sparse_format import PARTS, Stored, decode

__all__ = ["with_experts"]

_LOCALS = "|".join(part.removeprefix("weight_") for part in PARTS)


def with_experts(conversions: Iterable[Any], fused: Iterable[str]) -> Iterator[Any]:
    """A model's conversions, of which those that make experts take packed ones too.

    :param conversions: the model's own
    :param fused: full names, in the files, of tensors whose experts are packed
    """
    known = []
    for each in conversions:
        sources = each.source_patterns if isinstance(each, WeightConverter) else []
        if sources and all("experts" in source for source in sources):
            known += sources
            yield _Experts(each, [_packed_too(source) for source in sources])
        else:
            yield each
    for local in sorted({name.partition("experts.")[2] for name in fused}):
        if not any(
            re.search(source.replace("*.", r".*\."), f"experts.{local}") for source in known
        ):
            plain = WeightConverter(f".experts.{local}", f".experts.{local}", [_AsItIs()])
            yield _Experts(plain, [_packed_too(plain.source_patterns[0])])


def _packed_too(pattern: str) -> str:
    """What matches what a pattern does, and the parts of it packed."""
    packed = rf"_(?:{_LOCALS})" if pattern.endswith(".weight") else rf"\.\d+\.weight_(?:{_LOCALS})"
    return f"{pattern.removesuffix('$')}(?:{packed})?$"


class _AsItIs(ConversionOps):
    """For tensors that transformers does not convert."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: Sequence[str],
        target_patterns: Sequence[str],
        **context: Any,
    ) -> dict[str, Any]:
        """Give what there is the name that it has in the model."""
        (found,) = input_dict.values()
        return {target_patterns[0]: found[0] if isinstance(found, list) else found}

    @property
    def reverse_op(self) -> ConversionOps:
        """The same again."""
        return self


class _Experts(WeightConverter):
    """One of a model's conversions, behind the decoding of what it converts.

    :param plain: it
    :param sources: its patterns, that match packed experts too
    """

    __slots__ = ("keys", "plain")

    def __init__(self, plain: WeightConverter, sources: list[str]) -> None:
        super().__init__(sources, [*plain.target_patterns], plain.operations, plain.force_cpu)
        self.scope_prefix, self.base_model_prefix = plain.scope_prefix, plain.base_model_prefix
        self.plain = plain
        self.keys: dict[str, list[str]] = {}

    def add_tensor(
        self, target_key: str, source_key: str, source_pattern: str, future: Any
    ) -> None:
        """Take a tensor, and remember its name in the files."""
        super().add_tensor(target_key, source_key, source_pattern, future)
        self.keys.setdefault(source_pattern, []).append(source_key)

    def reverse_transform(self) -> WeightTransform:
        """What saving does: dense experts are saved."""
        return self.plain.reverse_transform()

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, torch.Tensor]:
        """A layer's experts by their full name in the model."""
        parameter = model.get_parameter(layer_name)
        if is_dtensor(parameter):
            raise ValueError(
                f"{layer_name} is packed, and transformers would divide it among processes before "
                "it is decoded: load the folder that `dlp-plugin unpack` writes"
            )
        found: Any = self.collected_tensors
        for pattern, tensors in self.materialize_tensors().items():
            parts = zip(self.keys[pattern], tensors, strict=True)
            found[pattern] = _decoded(parts, hf_quantizer, parameter.dtype)
        made: dict[str, torch.Tensor] = super().convert(
            layer_name, model, config, None, loading_info
        )
        return made


def _decoded(
    tensors: Iterable[tuple[str, torch.Tensor]], quantizer: Any, dtype: torch.dtype
) -> list[torch.Tensor]:
    """The dense weights of experts, or the tensor of them all.

    :param tensors: of one pattern by their names in the files, in the order of the experts
    """
    linears: Mapping[str, Stored] = quantizer.linears
    held: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors:
        name, _, local = key.rpartition(".")
        held.setdefault(name if name in linears else key, {})[local] = tensor
    weights: dict[str, list[torch.Tensor]] = {}
    for name, parts in held.items():
        if name not in linears:
            (weight,) = parts.values()
        else:
            part = next(iter(parts))
            where = f"{quantizer.places[f'{name}.{part}']}: {name}"
            weight = decode(linears[name], parts, dtype, where)
        whole = name.rpartition(".")[0]
        weights.setdefault(whole if whole in quantizer.fused else name, []).append(weight)
    return [
        torch.stack(experts) if name in quantizer.fused else experts[0]
        for name, experts in weights.items()
    ]
