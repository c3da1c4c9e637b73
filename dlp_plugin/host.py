"""All that depends on how llm-compressor's recipes and pruning stages work inside.

What it relies on, each point held by a test in ``tests/test_host.py``:

- while modifiers are initialized, and outside their epochs, the session's recipe lists
  all of them in order; during an epoch of the independent pipeline it lists one;
- a pruning stage (SparseGPT, Wanda) matches ``targets`` in the model, prunes the modules of
  ``PRUNABLE_LAYER_TYPES`` below each match, and asks ``ignore`` about the name
  ``<match>.<name below it>``, which ends in a dot where the match is the module;
- it reads ``sparsity`` (a list has one entry per match) when its epoch starts;
- a recipe is saved as stage -> group -> modifier type -> fields, behind the one that lies
  beside the model;
- a pipeline is called with the user's ``DatasetArguments`` as ``dataset_args``; the sequential one
  runs each block once, and keeps its weights if the options in ``_FOR_CHANGED_BLOCKS`` are False.
"""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import chain, count, takewhile
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from compressed_tensors.offload import disable_onloading
from compressed_tensors.utils import align_module_device, match_named_modules, match_targets
from llmcompressor.args import DatasetArguments
from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import (
    PRUNABLE_LAYER_TYPES,
    SparsityModifierBase,
)
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.transformers.utils.helpers import infer_recipe_from_model_path
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from loguru import logger

from dlp_plugin.scoring.blocks import find_blocks
from dlp_plugin.scoring.routers import left_routers, unnamed_routers

__all__ = [
    "StockStage",
    "block_names",
    "calibration_arguments",
    "check_patterns",
    "check_weights_are_own",
    "current_modifiers",
    "heed_ignore",
    "keep_all_modifiers_when_saved",
    "leave_dense",
    "run_once",
    "set_sparsities",
    "stage_targets",
    "stages_after",
    "warn_of_lost_zeros",
]

StockStage = SparsityModifierBase
_PACKAGE = __name__.partition(".")[0]

# Arguments by which the sequential pipeline runs every block a second time, or stores its weights
# in another form.
_FOR_CHANGED_BLOCKS = (
    "propagate_error",
    "log_sequential_error",
    "layerwise_compression",
    "layerwise_decompression",
)


def current_modifiers() -> list[Modifier]:
    """Modifiers that take part in what runs now: all, or one during its epoch."""
    modifiers: list[Modifier] = active_session().lifecycle.recipe.modifiers
    return modifiers


def stages_after(modifier: Modifier, until: type[Modifier]) -> list[StockStage]:
    """Pruning stages that follow, up to the next modifier of a kind.

    :param modifier: of the recipe that runs
    :param until: class of the modifier that ends the search
    """
    modifiers = current_modifiers()
    place = next(i for i, other in enumerate(modifiers) if other is modifier)
    following = takewhile(lambda other: not isinstance(other, until), modifiers[place + 1 :])
    return [other for other in following if isinstance(other, StockStage)]


def warn_of_lost_zeros(
    model: torch.nn.Module, modifiers: Sequence[Modifier], teller: Modifier | None
) -> None:
    """Tell of stock quantizers that bring zeros back: those of stages before, or of the model.

    GPTQ spreads errors over pruned weights, AutoRound learns to round them away from
    zero; both measured. Rounding to nearest, after AWQ too, leaves a zero at zero.

    :param model: to be quantized
    :param modifiers: of the whole recipe
    :param teller: the caller; only the package's first modifier warns, or None if it has none
    """
    ours = (each for each in modifiers if type(each).__module__.startswith(f"{_PACKAGE}."))
    if next(ours, None) is not teller:
        return
    pruned = False
    for modifier in modifiers:
        kind = type(modifier).__name__
        pruned |= isinstance(modifier, StockStage)
        if kind in ("GPTQModifier", "AutoRoundModifier") and (pruned or _is_pruned(model)):
            logger.warning(
                "{} does not keep pruned weights at zero: part of the sparsity will be "
                "lost. Write MaskedGPTQModifier instead",
                kind,
            )


def _is_pruned(model: torch.nn.Module) -> bool:
    """Whether at least 1 % of some Linear is zero."""
    for _, linear in match_named_modules(model, ["Linear"]):
        with align_module_device(linear):
            weight = getattr(linear, "weight", None)  # which a compressed one has not
            if weight is not None and 100 * int((weight == 0).sum()) >= weight.numel() > 0:
                return True
    return False


def stage_targets(
    model: torch.nn.Module, stage: StockStage
) -> dict[str, dict[str, torch.nn.Module]]:
    """What a pruning stage is about to prune: no routers but those that ``targets`` name.

    :param model: to be pruned
    :param stage: that prunes it
    :return: for every module that the stage's ``targets`` match, in the order of the
        stage's sparsity list, the modules below it to be pruned, by full name
    """
    check_patterns(stage, targets=stage.targets, ignore=stage.ignore)
    routers = unnamed_routers(model, stage.targets)
    return {
        target: {n: m for n, m in _prunable(target, layer, stage) if n not in routers}
        for target, layer in match_named_modules(model, stage.targets)
    }


def check_patterns(modifier: Modifier, **fields: str | Iterable[str]) -> None:
    """Refuse what the host would stumble over, or take apart letter by letter.

    :param modifier: that has the fields
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


def heed_ignore(model: torch.nn.Module, stage: StockStage) -> list[str]:
    """Have the host leave out what a stage means to leave out.

    These are routers that ``targets`` do not name, and modules that ``ignore`` names exactly or by
    a pattern with ``$``: the host appends a dot to the name of a module that is itself a target.

    :param model: to be pruned
    :param stage: whose ``ignore`` is extended
    :return: what was added to ``ignore`` for that
    :raises ValueError: as :func:`_check_ignore` does
    """
    _check_ignore(model, stage)
    matches = list(match_named_modules(model, stage.targets))
    found = [name for target, layer in matches for name, _ in _prunable(target, layer, stage)]
    routers = left_routers(model, type(stage).__name__, stage.targets, found)
    missed = [
        name
        for target, layer in matches
        for below, module in match_named_modules(layer, PRUNABLE_LAYER_TYPES)
        if _ignored(name := f"{target}.{below}", module, stage.ignore)
        and not match_targets(name, module, stage.ignore)
    ]
    return leave_dense(stage, [*(name.strip(".") for name in missed), *routers])


def _check_ignore(model: torch.nn.Module, stage: StockStage) -> None:
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
    target: str, layer: torch.nn.Module, stage: StockStage
) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, module in match_named_modules(layer, PRUNABLE_LAYER_TYPES):
        host_name = f"{target}.{name}"
        if not _ignored(host_name, module, stage.ignore):
            yield host_name.strip("."), module


def check_weights_are_own(model: torch.nn.Module, modules: Mapping[str, torch.nn.Module]) -> None:
    """Make sure that pruning these modules changes no other one, and none of them twice.

    :param model: that has the modules
    :param modules: what is to be pruned, by full name
    :raises ValueError: naming two modules that share a weight, and the entry of ``ignore`` that
        leaves one of them out
    """
    owners: dict[int, str] = {}
    embeddings = match_named_modules(model, ["Embedding"])
    with disable_onloading():  # what is stored stays the same object
        shared = {id(module.weight): name for name, module in embeddings}
        for name, module in modules.items():
            weight = id(module.get_parameter("weight"))
            if embedding := shared.get(weight):
                raise ValueError(
                    f"{name} has the weight of {embedding}, which would be pruned with it: add "
                    f"'re:.*{re.escape(name)}' to the stage's ignore"
                )
            other = owners.setdefault(weight, name)
            if other != name:
                raise ValueError(
                    f"{other} and {name} share one weight, which would be counted and "
                    f"pruned twice: add re:{name} to the stage's ignore"
                )


def set_sparsities(stage: StockStage, sparsities: list[float]) -> None:
    """Hand a stage one sparsity per match of its targets.

    SparseGPT reads the sorted score at index ``int(n * sparsity)``; 1.0 would be past the end.

    :param stage: to change
    :param sparsities: in the order of the matches
    """
    if isinstance(stage, SparseGPTModifier):
        sparsities = [min(sparsity, math.nextafter(1, 0)) for sparsity in sparsities]
    stage.sparsity = sparsities


def leave_dense(stage: StockStage, names: list[str]) -> list[str]:
    """Add modules, by full name, to what a stage ignores.

    :param stage: to change
    :param names: full names of the modules
    :return: the entries that were added
    """
    patterns = [f"re:\\.?{re.escape(name)}\\.?$" for name in names]
    stage.ignore = [*stage.ignore, *patterns]
    return patterns


def block_names(model: torch.nn.Module, sequential_targets: list[str] | None) -> list[str]:
    """Full names of the model's blocks, as llm-compressor infers or is told them.

    :param model: any module
    :param sequential_targets: names or classes of the blocks; None to infer them
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

    The host does not pass them to modifiers, so they are read from the running pipeline's frame.

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

    The host's own sequential pipeline with the user's arguments, less what it does for blocks
    that have changed. The modifiers of the epoch get its events. Call from within an epoch.

    :param model: to run
    :param batches: keyword arguments of the model's forward pass
    """
    arguments = copy(calibration_arguments())
    for name in _FOR_CHANGED_BLOCKS:
        if hasattr(arguments, name):  # releases differ
            setattr(arguments, name, False)
    pipeline: Any = CalibrationPipeline.load_from_registry("sequential")
    pipeline(model, batches, arguments)


def keep_all_modifiers_when_saved(model: torch.nn.Module) -> None:
    """Name stage and groups so that a saved recipe loses no modifier, and runs again.

    A recipe is written as group -> modifier type -> fields: of two modifiers of one
    type in a group only the last is written, and a group that is returned to is
    written where it first stood. It is appended to that in the model's folder, where stages of
    one name become ``pruning_stage_0`` and ``_1``, which the host skips when it reads them.

    :param model: whose folder may hold an earlier recipe
    :raises ValueError: if the recipe in the model's folder cannot be read
    """
    recipe = active_session().lifecycle.recipe
    recipe.stage = _unlike(recipe.stage, "_stage", _stages_beside(model))
    groups: dict[str, set[str]] = {}
    given: str | None = None
    name = ""
    for modifier in current_modifiers():
        wanted, kind = modifier.group or recipe.stage, type(modifier).__name__
        if not groups or wanted != given or kind in groups[name]:
            name = _unlike(wanted, "", groups)
            groups[name] = set()
            given = wanted
        groups[name].add(kind)
        if name != wanted:
            modifier.group = name


def _unlike(wanted: str, ending: str, taken: Container[str]) -> str:
    """A name, with a number if need be, that is not taken with this ending."""
    numbered = (f"{wanted}_{number}" for number in count(1))
    return next(name for name in chain([wanted], numbered) if f"{name}{ending}" not in taken)


def _stages_beside(model: torch.nn.Module) -> Collection[str]:
    """Names of the stages of the recipe in the folder that a model was loaded from."""
    folder = getattr(model, "name_or_path", "")
    path = infer_recipe_from_model_path(folder) if os.path.isdir(folder) else None
    if path is None:
        return ()
    try:
        stages = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        problem = "" if isinstance(stages, dict) else "it is no mapping of stages"
    except (OSError, ValueError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
    if problem:
        raise ValueError(
            f"{path} cannot be read, to which the recipe is appended when the model is saved "
            f"({problem}): mend it, or move it away"
        )
    return set(stages)
