"""What the pruning stages here have in common: an N for every module, where there is an M."""

from __future__ import annotations

from typing import Any

import torch
from llmcompressor.core import Event, State
from pydantic import PrivateAttr, model_validator

from dlp_plugin.experts import save_under_source_names
from dlp_plugin.host import StockStage, heed_ignore, stage_targets
from dlp_plugin.planning.structure import MaskStructure
from dlp_plugin.scoring.blocks import check_columns

__all__ = ["PruningStage"]


class PruningStage(StockStage):
    """A pruning stage that takes an N for every module, and means by ``ignore`` what it says.

    :param sparsity: of all targets, or one per match of ``targets``; with an N:M structure it
        may be left out, or be a list of N / M
    """

    _heeded: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        given = fields.get("sparsity")
        if any(isinstance(one, bool) for one in (given if isinstance(given, list) else [given])):
            raise ValueError(f"sparsity is {given}, which is no number: state it, e.g. 0.7")
        structure = fields.get("mask_structure", "0:0")
        if not isinstance(structure, str):
            raise ValueError(
                f'mask_structure is {structure!r}: quote it, "2:4", which YAML reads as a number'
            )
        return {"sparsity": None, **fields} if MaskStructure.parse(structure) else fields

    @property
    def structure(self) -> MaskStructure:
        """What ``mask_structure`` says."""
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
        save_under_source_names(state.model)
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

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Begin to collect statistics.

        :raises ValueError: if ``sparsity`` is null, and no modifier has stated one
        """
        if self.sparsity is None and not self.structure:
            raise ValueError(f"{type(self).__name__}.sparsity is not stated: set it, e.g. 0.7")
        super().on_calibration_start(state, event, **kwargs)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Read as it was written again."""
        self.ignore = [entry for entry in self.ignore if entry not in self._heeded]
        return bool(super().on_finalize(state, **kwargs))
