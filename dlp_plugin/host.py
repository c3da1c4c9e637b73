"""All that depends on how llm-compressor's recipes and pruning stages work inside.

What it relies on, each point held by a test in ``tests/test_host.py``:

- while modifiers are initialized, and outside their epochs, the session's recipe lists
  all of them in order; during an epoch of the independent pipeline it lists one;
- a pruning stage (SparseGPT, Wanda) matches ``targets`` in the model, prunes the modules of
  ``PRUNABLE_LAYER_TYPES`` below each match, and asks ``ignore`` about the name
  ``<match>.<name below it>``, which ends in a dot where the match is the module;
- it reads ``sparsity`` (a list has one entry per match) when its epoch starts;
- a recipe is saved as stage -> group -> modifier type -> fields;
- a pipeline is called with the user's ``DatasetArguments`` as ``dataset_args``, and the
  sequential one runs each block once where ``propagate_error`` is False;
- ``oneshot()`` makes Linears of fused experts before it initializes modifiers, and
  transformers names what it saves by ``model._weight_conversions`` read backwards, one file
  at a time (``tests/test_round_trips.py``).
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from typing import Any

import torch
from compressed_tensors.utils import match_named_modules, match_targets
from llmcompressor.args import DatasetArguments
from llmcompressor.core import active_session
from llmcompressor.modeling.moe.conversion_mappings import set_save_conversion_mapping
from llmcompressor.modeling.moe.gpt_oss import GptOssLinearExperts
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_linearized_moes
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import (
    PRUNABLE_LAYER_TYPES,
    SparsityModifierBase,
)
from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from loguru import logger
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)
from transformers.integrations.accelerate import load_offloaded_parameter

from dlp_plugin.scoring.blocks import find_blocks

__all__ = [
    "PruningStage",
    "block_names",
    "calibration_arguments",
    "check_patterns",
    "current_modifiers",
    "heed_ignore",
    "keep_all_modifiers_when_saved",
    "leave_dense",
    "reviving_modifiers",
    "run_once",
    "save_under_source_names",
    "set_sparsities",
    "stage_targets",
    "stages_after",
]

PruningStage = SparsityModifierBase


def current_modifiers() -> list[Modifier]:
    """Modifiers that take part in what runs now: all, or one during its epoch."""
    modifiers: list[Modifier] = active_session().lifecycle.recipe.modifiers
    return modifiers


def stages_after(modifier: Modifier, until: type[Modifier]) -> list[PruningStage]:
    """Pruning stages that follow, up to the next modifier of a kind."""
    return [other for other in _followers(modifier, until) if isinstance(other, PruningStage)]


def _followers(modifier: Modifier, until: type[Modifier]) -> Iterator[Modifier]:
    """Modifiers that follow one, up to the next of a kind."""
    modifiers = current_modifiers()
    place = next(i for i, other in enumerate(modifiers) if other is modifier)
    for other in modifiers[place + 1 :]:
        if isinstance(other, until):
            return
        yield other


def reviving_modifiers(modifier: Modifier, until: type[Modifier]) -> list[str]:
    """Names of stock quantizers after the stages of a modifier that bring zeros back.

    GPTQ spreads errors over pruned weights, AutoRound learns to round them away from
    zero; both measured. Rounding to nearest, after AWQ too, leaves a zero at zero.
    """
    names: list[str] = []
    pruned = False
    for other in _followers(modifier, until):
        pruned |= isinstance(other, PruningStage)
        if pruned and type(other).__name__ in ("GPTQModifier", "AutoRoundModifier"):
            names.append(type(other).__name__)
    return names


def stage_targets(
    model: torch.nn.Module, stage: PruningStage
) -> dict[str, dict[str, torch.nn.Module]]:
    """What a pruning stage is about to prune.

    :return: for every module that the stage's ``targets`` match, in the order of the
        stage's sparsity list, the modules below it to be pruned, by full name
    """
    check_patterns(stage, targets=stage.targets, ignore=stage.ignore)
    return {
        target: dict(_prunable(target, layer, stage))
        for target, layer in match_named_modules(model, stage.targets)
    }


def check_patterns(modifier: Modifier, **fields: str | Iterable[str]) -> None:
    """Refuse what the host would stumble over, or take apart letter by letter.

    :param fields: what each field holds that selects modules
    :raises ValueError: naming the field, and the entry that is no regular expression
    """
    for name, entries in fields.items():
        field = f"{type(modifier).__name__}.{name}"
        if isinstance(entries, str):
            raise ValueError(f"{field} is {entries!r}: write a list, [{entries!r}]")
        for entry in entries:
            try:
                re.compile(entry.removeprefix("re:") if entry.startswith("re:") else "")
            except (re.error, OverflowError) as error:
                raise ValueError(
                    f"{field} holds {entry!r}, which is no regular expression ({error}): mend it, "
                    "or name the modules without re:"
                ) from None


def heed_ignore(model: torch.nn.Module, stage: PruningStage) -> list[str]:
    """Have the host leave out what ``ignore`` names by an exact name, or a pattern with ``$``.

    It asks about the name with a dot behind it where a target is the module itself.

    :return: what was added to ``ignore`` for that
    :raises ValueError: as :func:`_check_ignore` does
    """
    _check_ignore(model, stage)
    missed = [
        name
        for target, layer in match_named_modules(model, stage.targets)
        for below, module in match_named_modules(layer, PRUNABLE_LAYER_TYPES)
        if _ignored(name := f"{target}.{below}", module, stage.ignore)
        and not match_targets(name, module, stage.ignore)
    ]
    return leave_dense(stage, [name.strip(".") for name in missed])


def _check_ignore(model: torch.nn.Module, stage: PruningStage) -> None:
    """Tell of entries without effect.

    :raises ValueError: if an entry that is no pattern matches no module, or one matches only
        what holds modules that are pruned
    """
    holders = {
        name[:place]: name
        for modules in stage_targets(model, stage).values()
        for name in modules
        for place, character in enumerate(name)
        if character == "."
    }
    for entry in stage.ignore:
        said = f"{type(stage).__name__}.ignore holds {entry!r}, which matches"
        found = {n: m for n, m in model.named_modules() if _ignored(f"{n}.", m, [entry])}
        if not found and not entry.startswith("re:"):
            raise ValueError(
                f"{said} no module of {type(model).__name__}: mend or remove it; the names are "
                "those of model.named_modules()"
            )
        if not found:  # one recipe serves models with a head and without
            logger.warning("{} no module of {}", said, type(model).__name__)
        holder = next((name for name in found if name in holders), None)
        if holder and not any(match_targets("", m, PRUNABLE_LAYER_TYPES) for m in found.values()):
            pattern = re.escape(f"{holder}.")
            raise ValueError(
                f"{said} {holder}, but nothing that is pruned, as {holders[holder]} in it is: "
                f"write 're:{pattern}' to leave out all that is in it"
            )


def _ignored(host_name: str, module: torch.nn.Module, ignore: Sequence[str]) -> bool:
    """Whether an entry matches a module by the name that the host asks about, or its own."""
    names = (host_name, host_name.strip("."))
    return any(match_targets(name, module, ignore) for name in names)


def _prunable(
    target: str, layer: torch.nn.Module, stage: PruningStage
) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, module in match_named_modules(layer, PRUNABLE_LAYER_TYPES):
        host_name = f"{target}.{name}"
        if not _ignored(host_name, module, stage.ignore):
            yield host_name.strip("."), module


def set_sparsities(stage: PruningStage, sparsities: list[float]) -> None:
    """Hand a stage one sparsity per match of its targets.

    SparseGPT reads the sorted score at place ``int(n * sparsity)``, which 1.0 puts past
    the end; the next smaller number prunes all just the same.
    """
    if isinstance(stage, SparseGPTModifier):
        sparsities = [min(sparsity, math.nextafter(1, 0)) for sparsity in sparsities]
    stage.sparsity = sparsities


def leave_dense(stage: PruningStage, names: list[str]) -> list[str]:
    """Add modules, by full name, to what a stage ignores.

    :return: the entries that were added
    """
    patterns = [f"re:\\.?{re.escape(name)}\\.?$" for name in names]
    stage.ignore = [*stage.ignore, *patterns]
    return patterns


def block_names(model: torch.nn.Module, sequential_targets: list[str] | None) -> list[str]:
    """Full names of the model's blocks, as llm-compressor infers or is told them.

    :raises ValueError: if there are none
    """
    try:
        names = find_blocks(model, infer_sequential_targets(model, sequential_targets))
    except TypeError:  # transformers declares no blocks for this architecture
        names = []
    if not names:
        raise ValueError(
            f"no blocks found in {type(model).__name__}"
            + (f" by sequential_targets={sequential_targets}" if sequential_targets else "")
            + ": name the class of its decoder layers, "
            "oneshot(sequential_targets=['...'])"
        )
    return names


def calibration_arguments() -> DatasetArguments:
    """The user's calibration arguments, from within an epoch.

    The host hands them to its pipelines and to no modifier, so they are looked up where
    the running pipeline holds them.

    :raises RuntimeError: if no pipeline is running
    """
    frame = inspect.currentframe()
    while frame is not None:
        arguments = frame.f_locals.get("dataset_args")
        if isinstance(arguments, DatasetArguments):
            return arguments
        frame = frame.f_back
    raise RuntimeError("no calibration pipeline is running")


def run_once(model: torch.nn.Module, batches: Sequence[dict[str, Any]]) -> None:
    """Run batches through the model block by block, each block once.

    The host's own sequential pipeline with the user's arguments, less the second run of
    every block that shows the later ones what pruning has changed. The modifiers of the
    epoch get its events. Call from within an epoch.
    """
    arguments = copy(calibration_arguments())
    arguments.propagate_error = False
    pipeline: Any = CalibrationPipeline.load_from_registry("sequential")
    pipeline(model, batches, arguments)


def keep_all_modifiers_when_saved() -> None:
    """Give modifiers groups of their own where a saved recipe would lose one.

    A recipe is written as group -> modifier type -> fields: of two modifiers of one
    type in a group only the last is written, and a group that is returned to is
    written where it first stood.
    """
    stage = active_session().lifecycle.recipe.stage
    groups: dict[str, set[str]] = {}
    given: str | None = None
    name = ""
    for modifier in current_modifiers():
        wanted, kind = modifier.group or stage, type(modifier).__name__
        if not groups or wanted != given or kind in groups[name]:
            number = 1
            name = wanted
            while name in groups:
                number += 1
                name = f"{wanted}_{number}"
            groups[name] = set()
            given = wanted
        groups[name].add(kind)
        if name != wanted:
            modifier.group = name


# Experts

# What an experts' module holds fused, by whether it has a gate: name -> Linears of one expert
_FUSED: dict[bool, dict[str, list[str]]] = {
    True: {"gate_up_proj": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]},
    False: {"up_proj": ["up_proj"], "down_proj": ["down_proj"]},
}
# How transformers fuses experts that a checkpoint holds one by one: operation and dimension;
# the second where there is a gate
_MERGE = [(MergeModulelist, 0), (Concatenate, 1)]


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
            steps = [(type(each), getattr(each, "dim", None)) for each in operations]
            if converter and steps == _MERGE[: len(parts)]:
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
