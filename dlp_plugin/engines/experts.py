"""Loads packed experts into transformers, which merges the experts of a layer into fused weights.

A checkpoint holds experts one by one (``experts.0.w1``), or fused in one tensor. If transformers
only stacks and concatenates them, they stay packed: a :class:`~.mixture.SparseExperts` replaces
the model's module of experts. Otherwise they are decoded and then merged by transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.distributed.utils import is_dtensor

from dlp_plugin.checkpoints.names import SourceNames
from dlp_plugin.checkpoints.sparse_format import PARTS, Stored, decode
from dlp_plugin.engines.linear import DTYPES, SparseLinear
from dlp_plugin.engines.mixture import SparseExperts
from dlp_plugin.kernels.layout import layout_of

__all__ = ["files_names", "read_parts", "staying_packed", "whole_parameter", "with_experts"]

_LOCALS = "|".join(part.removeprefix("weight_") for part in PARTS)


def with_experts(conversions: Iterable[Any], fused: Iterable[str]) -> Iterator[Any]:
    """Extend the conversions that transformers applies to experts, so that they take packed ones.

    :param conversions: the model's conversions
    :param fused: full names, in the files, of the fused tensors that are packed
    :return: the conversions to use instead
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


def staying_packed(
    model: Any, names: SourceNames, keys: Iterable[str], linears: Mapping[str, Stored]
) -> set[str]:
    """Find the modules of experts that can compute with packed weights.

    :param model: on the meta device or with weights
    :param names: of the model
    :param keys: names in the files of all experts' weights, dense or packed
    :param linears: name in the files of every packed Linear to how it is stored
    :return: full names of the modules in the model
    """
    found: dict[str, bool] = {}
    for key in keys:
        if full := names.experts(key):
            path = full.rpartition(".")[0]
            stored = linears.get(key.removesuffix(".weight"))
            packed = stored is not None and stored.dtype in DTYPES and names.is_stacked(key)
            known = found.get(path)
            if known is None:
                known = SparseExperts.can_stand_for(model.get_submodule(path))
            found[path] = known and packed
    return {path for path, packed in found.items() if packed}


def files_names(model: Any, linears: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Find the names under which packed Linears are saved.

    transformers applies its conversions backwards to every name of a state that it saves. So the
    state needs a name that this turns into the name in the file.

    :param model: with packed Linears
    :param linears: full names in the model, including those inside a
        :class:`~.mixture.SparseExperts`
    :return: full name in the model to the name in the file and the name in the state
    """
    numbers = {name: number for number, name in enumerate(linears)}
    names, alone = list(numbers), dict(numbers)
    marks: dict[str, torch.Tensor] = {}
    for path, experts in model.named_modules():
        if isinstance(experts, SparseExperts):
            for tensor, inside in experts.names(path).items():
                rows = [[[alone.pop(name)] for name in expert] for expert in inside]
                marks[tensor] = torch.tensor(rows)
    marks |= {f"{name}.weight": torch.tensor(number) for name, number in alone.items()}
    used = getattr(model, "_weight_conversions", None) or ()
    renamings = [each for each in used if isinstance(each, WeightRenaming)]
    found = {}
    for key, number in revert_weight_conversion(model, marks).items():
        name, file = names[int(number)], key.removesuffix(".weight")
        state = name if name in alone else rename_source_key(f"{file}.", renamings, [])[0][:-1]
        found[name] = file, state
    return found


def read_parts(quantizer: Any, name: str) -> dict[str, torch.Tensor]:
    """Read the parts of a packed Linear into their own memory, not a memory map of the file.

    :param quantizer: the quantizer that loads the model, with the files open
    :param name: full name of the Linear in the files
    :return: local names to tensors
    """
    keys = {part: f"{name}.{part}" for part in quantizer.linears[name].part_shapes()}
    return {
        part: quantizer.opened(quantizer.places[key]).get_tensor(key) for part, key in keys.items()
    }


def whole_parameter(model: Any, name: str) -> torch.nn.Parameter:
    """Return the parameter that a packed weight is decoded into.

    :param model: that has the parameter
    :param name: full name in the model
    :return: the parameter
    :raises ValueError: if the parameter is divided among processes
    """
    parameter: torch.nn.Parameter = model.get_parameter(name)
    if is_dtensor(parameter):
        raise ValueError(
            f"{name} is packed, and transformers would divide it among processes before "
            "it is decoded: load the folder that `dlp-plugin unpack` writes"
        )
    return parameter


def _packed_too(pattern: str) -> str:
    """Extend a pattern for a weight so that it matches the parts of the packed weight too."""
    packed = rf"_(?:{_LOCALS})" if pattern.endswith(".weight") else rf"\.\d+\.weight_(?:{_LOCALS})"
    return f"{pattern.removesuffix('$')}(?:{packed})?$"


class _AsItIs(ConversionOps):
    """A conversion that changes nothing, for tensors that transformers does not convert."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: Sequence[str],
        target_patterns: Sequence[str],
        **context: Any,
    ) -> dict[str, Any]:
        """Return the only tensor under its name in the model."""
        (found,) = input_dict.values()
        return {target_patterns[0]: found[0] if isinstance(found, list) else found}

    @property
    def reverse_op(self) -> ConversionOps:
        """Return this conversion: it is its own inverse."""
        return self


class _Experts(WeightConverter):
    """A conversion of transformers that decodes packed experts first, or keeps them packed.

    :param plain: transformers' own conversion
    :param sources: patterns of tensor names in the files, which match packed experts too
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
        """Collect a tensor, and remember its name in the files."""
        super().add_tensor(target_key, source_key, source_pattern, future)
        self.keys.setdefault(source_pattern, []).append(source_key)

    def reverse_transform(self) -> WeightTransform:
        """Return the inverse for saving, which is that of dense experts."""
        return self.plain.reverse_transform()

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, torch.Tensor]:
        """Return a layer's fused weight by its full name; nothing if the experts stay packed."""
        path, _, local = layer_name.rpartition(".")
        if path in hf_quantizer.experts:
            self.materialize_tensors()  # frees what transformers has read; read_parts reads again
            if not isinstance(model.get_submodule(path), SparseExperts):
                model.set_submodule(path, SparseExperts(model.get_submodule(path)))
            model.get_submodule(path).hold(local, self._linears(hf_quantizer, layer_name))
            loading_info.missing_keys.discard(layer_name)
            return {}
        dtype = whole_parameter(model, layer_name).dtype
        found: Any = self.collected_tensors
        for pattern, tensors in self.materialize_tensors().items():
            parts = zip(self.keys[pattern], tensors, strict=True)
            found[pattern] = _decoded(parts, hf_quantizer, dtype)
        made: dict[str, torch.Tensor] = super().convert(
            layer_name, model, config, None, loading_info
        )
        return made

    def _linears(self, quantizer: Any, layer_name: str) -> list[list[SparseLinear]]:
        """Make the Linears of every expert, in the order of the patterns."""
        columns = []
        for pattern in self.source_patterns:
            made = []
            for name, key in {key.rpartition(".")[0]: key for key in self.keys[pattern]}.items():
                stored, where = quantizer.linears[name], f"{quantizer.places[key]}: {name}"
                layout = layout_of(stored, read_parts(quantizer, name), where)
                made.append(SparseLinear(layout, None, layer_name))
            columns.append(made)
        return [list(row) for row in zip(*columns, strict=True)]


def _decoded(
    tensors: Iterable[tuple[str, torch.Tensor]], quantizer: Any, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Decode the experts' weights that match one pattern, and stack those of a fused tensor.

    :param tensors: names in the files and tensors, in the order of the experts
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
