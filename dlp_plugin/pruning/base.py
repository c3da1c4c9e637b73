"""What the pruning stages share: an N for every module, repairs."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, ExitStack
from typing import Any, ClassVar

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.offload import get_offloaded_device
from llmcompressor.core import Event, State
from llmcompressor.utils.helpers import eval_context
from loguru import logger
from pydantic import Field, PrivateAttr, model_validator
from torch import distributed as dist

from dlp_plugin.experts import save_under_source_names
from dlp_plugin.generation import make_savable
from dlp_plugin.host import (
    StockStage,
    block_names,
    check_weights_are_own,
    current_modifiers,
    heed_ignore,
    keep_all_modifiers_when_saved,
    stage_targets,
    warn_of_lost_zeros,
)
from dlp_plugin.planning.structure import MaskStructure
from dlp_plugin.pruning.distillation import Distillation, check_distillable, distillation
from dlp_plugin.pruning.grams import Grams, polishing
from dlp_plugin.pruning.reconstruction import Reconstruction
from dlp_plugin.pruning.training import check_number, survivors
from dlp_plugin.scoring.blocks import check_columns

__all__ = ["PruningStage", "declared"]

# Rate of distillation, see train(). The best lay between 3e-4 and 1e-3 on the models measured.
DISTILLING = 5e-4


class PruningStage(StockStage):
    """A pruning stage with a separate sparsity, or N of N:M, for every module.

    A stage declares in its class what the rest of the package needs to know: ``pruner``, its name
    in comparisons; ``by_magnitude``, whether it ranks weights by magnitude (all others rank
    roughly as Wanda does); and ``compensates``, whether it updates the remaining weights while it
    prunes. The last two decide how plans for it are judged.

    :param sparsity: of all targets, or one per match of ``targets``; with an N:M structure a
        list of N / M. It may be left out where that structure or a modifier before states it
    :param polish: refit the remaining weights by least squares, so that each Linear's outputs
        change least
    :param reconstruct: epochs of training every block, with its mask fixed, to return the dense
        block's outputs; 0 for none
    :param distill: epochs of training the whole pruned model, with its masks fixed, to predict
        what the dense model predicts; 0 for none. It needs memory for 25 bytes per weight
    """

    pruner: ClassVar[str]
    by_magnitude: ClassVar[bool] = False
    compensates: ClassVar[bool] = False

    polish: bool = False
    reconstruct: int = Field(default=0, ge=0, strict=True)
    distill: int = Field(default=0, ge=0, strict=True)

    _reached: set[torch.nn.Module] = PrivateAttr(default_factory=set)
    _heeded: list[str] = PrivateAttr(default_factory=list)
    _grams: Grams = PrivateAttr(default_factory=Grams)
    _blocks: dict[str, torch.nn.Module] = PrivateAttr(default_factory=dict)
    _reconstruction: Reconstruction | None = PrivateAttr(default=None)
    _distillation: Distillation | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        given = fields.get("sparsity")
        if any(isinstance(one, bool) for one in (given if isinstance(given, list) else [given])):
            raise ValueError(f"sparsity is {given}, which is not a number: state it, e.g. 0.7")
        structure = fields.get("mask_structure", "0:0")
        if not isinstance(structure, str):
            raise ValueError(
                f'mask_structure is {structure!r}: quote it, "2:4", which YAML reads as a number'
            )
        MaskStructure.parse(structure)
        return {"sparsity": None, **fields}

    @property
    def structure(self) -> MaskStructure:
        """``mask_structure``, parsed."""
        return MaskStructure.parse(self.mask_structure)

    def number(self, module: torch.nn.Module) -> int:
        """How many of every M consecutive weights of a module are to be zero."""
        if isinstance(self.sparsity, list):
            return self.structure.number(float(self._module_sparsities[module]))
        return self.structure.n

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check that sparsities and structure fit the model.

        :raises ValueError: naming the module or field
        """
        kind, targets = type(self).__name__, stage_targets(state.model, self)
        stated = self.sparsity if isinstance(self.sparsity, list) else [self.sparsity]
        if isinstance(self.sparsity, list) and len(stated) != len(targets):
            raise ValueError(
                f"{kind}.sparsity holds {len(stated)} values, and its targets match "
                f"{len(targets)} modules: state one for each, or one number"
            )
        for sparsity in stated:
            if not (sparsity is None or 0 <= sparsity <= 1):
                raise ValueError(
                    f"{kind}.sparsity must be between 0 and 1, got {sparsity}; it is the fraction "
                    "of weights to set to zero, e.g. 0.7"
                )
        if not any(targets.values()):
            raise ValueError(
                f"{kind} prunes nothing in {type(state.model).__name__}: its targets are "
                f"{self.targets} (a list of class names, names or re: patterns), its ignore "
                f"{self.ignore}"
            )
        if self.structure:
            self.check_structure(targets)
        found = {name: module for modules in targets.values() for name, module in modules.items()}
        check_weights_are_own(state.model, found)
        self._check_places(found)
        self._check_samples(state)
        if self.repairs:
            self._check_repairs(targets)
        keep_all_modifiers_when_saved(state.model)
        warn_of_lost_zeros(state.model, current_modifiers(), self)
        save_under_source_names(state.model)
        make_savable(state.model)
        self._heeded = heed_ignore(state.model, self)
        return bool(super().on_initialize(state, **kwargs))

    def check_structure(self, targets: dict[str, dict[str, torch.nn.Module]]) -> None:
        """Make sure that an N:M structure fits sparsities and modules.

        :param targets: as :func:`dlp_plugin.host.stage_targets` gives them
        :raises ValueError: naming the field or module
        """
        field = f"{type(self).__name__}.sparsity"
        if isinstance(self.sparsity, list):
            for sparsity in self.sparsity:
                self.structure.number(sparsity, f"an entry of {field}")
        elif self.sparsity is not None:
            self.structure.exact_target(self.sparsity, field)
        for modules in targets.values():
            check_columns(modules, self.structure.m, f"add them to {type(self).__name__}.ignore")

    def _check_places(self, found: dict[str, torch.nn.Module]) -> None:
        """Make sure that no two processes would write one file.

        :raises ValueError: naming the module
        """
        for name, module in found.items() if is_distributed() else ():
            if get_offloaded_device(module) == "disk":
                raise ValueError(
                    f"{name} lies on disk, where several processes cannot prune it: load the "
                    "model into memory, or run one process"
                )

    @property
    def repairs(self) -> bool:
        """Whether the remaining weights are refitted or trained."""
        return self.polish or self._trains is not None

    @property
    def _trains(self) -> str | None:
        """The field that asks for training."""
        return next((name for name in ("reconstruct", "distill") if getattr(self, name)), None)

    @property
    def _repairing(self) -> str:
        """The field that asks for repairs, for messages."""
        return f"{type(self).__name__}.{'polish' if self.polish else self._trains}"

    @property
    def _prunes_by_samples(self) -> bool:
        """Whether the stage needs samples even if it repairs nothing."""
        return bool(type(self).model_fields["requires_calibration_data"].default)

    def _check_samples(self, state: State) -> None:
        """Make sure that there are the samples that the stage prunes by, or repairs on.

        :raises ValueError: naming stage or field
        """
        kind = type(self).__name__
        if self.requires_calibration_data and not state.data.calib:
            repairing = self._repairing, ", or leave it out"
            what, remedy = (kind, "") if self._prunes_by_samples else repairing
            raise ValueError(
                f"{what} needs calibration samples, and there are none: pass dataset=... to "
                f"oneshot(){remedy}"
            )
        if self.reconstruct:
            check_number(state, f"{kind}.reconstruct")
        if self.distill:
            check_distillable(state, f"{kind}.distill")

    def _check_repairs(self, targets: dict[str, dict[str, torch.nn.Module]]) -> None:
        """Check that polish and reconstruction can handle the modules.

        :raises ValueError: naming the module
        """
        for modules in targets.values():
            for name, module in modules.items():
                if not isinstance(module, torch.nn.Linear):
                    raise ValueError(
                        f"{name} is a {type(module).__name__}, and {self._repairing} takes "
                        f"Linears only: add it to {type(self).__name__}.ignore"
                    )

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Begin to collect statistics.

        :raises ValueError: if ``sparsity`` is null, and no modifier has stated one; if ``distill``
            cannot work
        """
        if self.sparsity is None and not self.structure:
            raise ValueError(f"{type(self).__name__}.sparsity is not stated: set it, e.g. 0.7")
        super().on_calibration_start(state, event, **kwargs)
        if self.polish:
            self.watch_inputs()
        if self._trains:
            targets = self._sequential_targets
            names = block_names(state.model, [targets] if isinstance(targets, str) else targets)
            self._blocks = {name: state.model.get_submodule(name) for name in names}
        if self.reconstruct:
            self._reconstruction = Reconstruction(self._blocks, self.reconstruct)
            record: Any = self._reconstruction.record
            for block in self._blocks.values():
                self.register_hook(block, record, "forward", with_kwargs=True)
        if self.distill:
            self._distillation = distillation(state, self.distill, f"{type(self).__name__}.distill")

    def watch_inputs(self) -> None:
        """Sum the Gram matrices that polish needs."""
        add: Any = self._grams.add
        for module in self._module_names:
            self.register_hook(module, add, "forward")

    def on_sequential_epoch_end(
        self,
        state: State,
        event: Event,
        modules: Collection[torch.nn.Module] = (),
        **kwargs: Any,
    ) -> None:
        """Prune the part of the model that has run, and repair it."""
        with ExitStack() as repairs:
            repairs.enter_context(torch.no_grad())
            repairs.enter_context(eval_context(state.model))
            if self._reconstruction is not None:
                repairs.enter_context(self._reconstruction.around(self._module_names))
            if self.polish:
                repairs.enter_context(self.polishing(modules))
            if is_distributed():
                dist.barrier()  # all have looked at dense weights, which processes may share
            super().on_sequential_epoch_end(state, event, **kwargs)
            if is_distributed():
                dist.barrier()  # what they share may be written by one of them

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Distill; let go of hooks and samples.

        :raises ValueError: if the stage needs samples, and none has reached what it prunes
        """
        self._check_reached()
        self._reached.clear()
        self._reconstruction = None
        super().on_calibration_end(state, event, **kwargs)
        if self._distillation is not None:
            weights = survivors(self._module_names)
            self._distillation.train(self._blocks.values(), weights, DISTILLING)
        self._distillation = None
        self._blocks = {}

    def _check_reached(self) -> None:
        kind, names = type(self).__name__, self._module_names
        missed = [name.strip(".") for module, name in names.items() if module not in self._reached]
        if not self.requires_calibration_data or not missed:
            return
        if len(missed) == len(names):
            raise ValueError(
                f"no calibration sample reached the modules of {kind}, so it pruned nothing: leave "
                "out pipeline='datafree', or name the blocks by sequential_targets"
            )
        if self._prunes_by_samples and not is_distributed():  # where others may have seen some
            more = f" and {len(missed) - 1} more" if len(missed) > 1 else ""
            logger.warning(
                "{} leaves {}{} dense, which received no calibration token", kind, missed[0], more
            )

    def polishing(self, modules: Collection[torch.nn.Module]) -> AbstractContextManager[None]:
        """Polish what is pruned within this context.

        :param modules: the part of the model that is through
        """
        return polishing(self._grams, self._module_names, modules)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Restore the fields as they were written."""
        self.ignore = [entry for entry in self.ignore if entry not in self._heeded]
        return bool(super().on_finalize(state, **kwargs))


def declared() -> dict[str, type[PruningStage]]:
    """Return all pruning stages by the names that they declare, sorted by name."""
    found: dict[str, type[PruningStage]] = {}
    waiting: list[Any] = [PruningStage]
    while waiting:
        kind = waiting.pop(0)
        if name := vars(kind).get("pruner"):
            found[name] = kind
        waiting += kind.__subclasses__()
    return dict(sorted(found.items()))
