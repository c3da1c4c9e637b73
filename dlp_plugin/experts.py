"""Experts saved as the checkpoints of their architecture hold them.

What it relies on inside llm-compressor and transformers, held by
``tests/checkpoints/test_round_trips.py``:

- ``oneshot()`` makes Linears of fused experts before it initializes modifiers;
- transformers names what it saves by ``model._weight_conversions`` read backwards, one file
  at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from compressed_tensors.utils import match_named_modules
from llmcompressor.modeling.moe.conversion_mappings import set_save_conversion_mapping
from llmcompressor.modeling.moe.gpt_oss import GptOssLinearExperts
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_linearized_moes
from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin
from loguru import logger
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)
from transformers.integrations.accelerate import load_offloaded_parameter

from dlp_plugin.host import check_patterns, current_modifiers
from dlp_plugin.stacking import only_stacks

__all__ = ["save_under_source_names"]

# What an experts' module holds fused, by whether it has a gate: name -> Linears of one expert
_FUSED: dict[bool, dict[str, list[str]]] = {
    True: {"gate_up_proj": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]},
    False: {"up_proj": ["up_proj"], "down_proj": ["down_proj"]},
}


def save_under_source_names(model: Any) -> None:
    """Have experts saved as the checkpoints of their architecture hold them.

    The host makes Linears of fused experts and would save these under their own names. What is
    set here is read whenever the model is saved; the model itself stays as it is. Call it once
    the experts are Linears; calling it again does no harm.

    Mixtral's ``mlp.experts.0.gate_proj.weight`` becomes ``block_sparse_moe.experts.0.w1.weight``
    (or ``.weight_packed``, if quantized), GPT-OSS's a part of ``mlp.experts.gate_up_proj``.

    :param model: a transformers model
    :raises ValueError: if experts are to be quantized that such checkpoints hold fused, or if
        it is not known how they hold them
    """
    experts: list[tuple[str, LinearExperts2D]] = get_linearized_moes(model)
    if not experts:
        return
    known = get_model_conversion_mapping(model, add_legacy=False)
    used: list[WeightTransform] | None = getattr(model, "_weight_conversions", None)
    if used is None:  # a model that was not loaded, which transformers saves by what is known
        used = [each for each in known if not isinstance(each, PrefixChange)]
    quantized = _quantized(model)
    dense: list[str] = []
    added: dict[tuple[str | None, str], WeightTransform] = {}
    for name, module in experts:
        if isinstance(_transform_to(f"{name}.0.down_proj.weight", used), WeightRenaming):
            continue  # loaded as Linears, or seen to before
        linears = [each for each, _ in match_named_modules(module, ["Linear"])]
        inside = [f"{name}.{each}" for each in linears if f"{name}.{each}" in quantized]
        for fused, parts in _FUSED[module.has_gate].items():
            converter = _transform_to(f"{name}.{fused}", known)
            operations = getattr(converter, "operations", [])
            transforms: Iterable[WeightTransform]
            if only_stacks(converter) and len(converter.source_patterns) == len(parts):
                transforms = _renamings(converter, fused, parts)
                dense += [name] if quantized and len(inside) < len(linears) else []
            elif all(getattr(each, "check_dims", False) for each in operations):
                # Fused in checkpoints too: as in the model, or told apart from that on loading
                if inside:
                    raise ValueError(
                        f"{quantized[inside[0]]} would quantize {inside[0]}, but "
                        f"checkpoints of {model.config.model_type} hold experts fused, and have "
                        "no place for quantized ones: add 're:.*experts.*' to its ignore"
                    )
                transforms = _fusions(name, module, fused, parts)
            else:
                raise ValueError(
                    f"{name}.{fused} of {model.config.model_type} is made by {operations} when "
                    "it is loaded, which dlp_plugin cannot undo to save it: take another model"
                )
            added |= {(each.scope_prefix, each.source_patterns[0]): each for each in transforms}
    if dense:
        logger.warning(
            "Experts stay unquantized beside quantized Linears ({} and others): vLLM loads such a "
            "checkpoint, transformers 5.17 takes all its experts for quantized and does not",
            dense[0],
        )
    others = [each for each in used if (each.scope_prefix, each.source_patterns[0]) not in added]
    set_save_conversion_mapping(model, [*others, *added.values()])


def _transform_to(name: str, transforms: Sequence[WeightTransform]) -> WeightTransform | None:
    """What makes an expert's tensor on loading; renaming of what is above it does not count."""
    for each in transforms:
        _, pattern = each.reverse_transform().rename_source_key(name)
        if pattern is not None and "_proj" in pattern:
            return each
    return None


def _renamings(
    converter: WeightTransform, fused: str, parts: list[str]
) -> Iterator[WeightRenaming]:
    """One for each of an expert's Linears, after a converter that fuses what it finds."""
    place = converter.target_patterns[0].removesuffix(fused)
    for source, part in zip(converter.source_patterns, parts, strict=True):
        renaming = WeightRenaming(
            source.removesuffix(".weight").replace("*", r"(\d+)"), rf"{place}\1.{part}"
        )
        renaming.scope_prefix = converter.scope_prefix
        renaming.base_model_prefix = converter.base_model_prefix
        yield renaming


def _fusions(
    name: str, module: LinearExperts2D, fused: str, parts: list[str]
) -> Iterator[WeightConverter]:
    """Of the weights and, where there are some, of the biases of a layer's experts."""
    for kind, suffix in {"weight": "", "bias": "_bias"}.items():
        if kind == "weight" or module.has_bias:
            names = [
                [f"{name}.{i}.{part}.{kind}" for part in parts] for i in range(module.num_experts)
            ]
            yield WeightConverter(
                f"{name}.{fused}{suffix}",
                [f"{names[0][0]}$", *(f"{name}.*.{part}.{kind}$" for part in parts)],
                [
                    _FuseExperts(
                        names, isinstance(module, GptOssLinearExperts), module.is_transposed
                    )
                ],
            )


class _FuseExperts(ConversionOps):
    """Make one tensor of what a layer's experts have each, on saving.

    transformers converts what goes to one file after the other, and two files can part the
    experts of a layer: all are taken from the model, and written where the first one is.

    :param names: for every expert the tensors to be joined in their first dimension
    :param interleaved: join them by turns, not one behind the other
    :param transposed: hold them ``[in, out]``
    """

    def __init__(self, names: list[list[str]], interleaved: bool, transposed: bool) -> None:
        self.names = names
        self.interleaved = interleaved
        self.transposed = transposed

    @property
    def reverse_op(self) -> ConversionOps:
        return self

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **context: Any,
    ) -> dict[str, Any]:
        """Fuse.

        :param source_patterns: of the first expert's first tensor, and of all
        :return: the fused tensor by its full name; nothing if the first one is in another file
        """
        if source_patterns[0] not in input_dict:
            return {}
        experts = [[_stored(context["model"], name) for name in names] for names in self.names]
        return {context["full_layer_name"]: torch.stack([self._join(each) for each in experts])}

    def _join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        joined = torch.stack(parts, 1).flatten(0, 1) if self.interleaved else torch.cat(parts)
        return joined.t() if self.transposed else joined


def _stored(model: Any, name: str) -> torch.Tensor:
    parameter: torch.Tensor = model.get_parameter(name)
    return load_offloaded_parameter(model, name) if parameter.is_meta else parameter


def _quantized(model: torch.nn.Module) -> dict[str, str]:
    """Full name of every module that the recipe will have quantized, and by what."""
    quantizers: list[Any] = [m for m in current_modifiers() if isinstance(m, QuantizationMixin)]
    for quantizer in quantizers:
        check_patterns(quantizer, targets=quantizer.resolved_targets, ignore=quantizer.ignore)
    return {
        name: type(quantizer).__name__
        for quantizer in quantizers
        for name, _ in match_named_modules(model, quantizer.resolved_targets, quantizer.ignore)
    }
