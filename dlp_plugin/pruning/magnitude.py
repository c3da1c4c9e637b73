"""Pruning by magnitude, at once and without data."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from compressed_tensors.utils import align_module_device, update_offload_parameter
from llmcompressor.core import Event, State
from loguru import logger
from pydantic import PrivateAttr

from dlp_plugin.pruning.base import PruningStage
from dlp_plugin.pruning.finite import check_weights
from dlp_plugin.pruning.smallest import smallest, smallest_of_groups

__all__ = ["OneShotMagnitudeModifier"]


class OneShotMagnitudeModifier(PruningStage):
    """Prune the weights of least magnitude in every matrix, in one step and without data.

    The third pruner in the tables of DLP, SparseGPT and Wanda, used like the two others. Of a
    matrix with ``n`` weights exactly ``int(n * sparsity)`` are set to zero; of equal ones at the
    threshold the first. With an N:M structure these are the smallest N of every M consecutive
    weights of a row.

    ```yaml
    pruning_stage:
      pruning_modifiers:
        DLPModifier: {}
        OneShotMagnitudeModifier:
          sparsity: 0.5
          targets: [Linear]
          ignore: ["re:.*lm_head"]
    ```

    The fields are those of the host's pruning stages: ``sparsity`` (one, or one per match of
    ``targets``), ``mask_structure``, ``targets``, ``ignore``.
    """

    pruner: ClassVar[str] = "magnitude"
    by_magnitude: ClassVar[bool] = True

    requires_calibration_data: bool = False

    _waiting: dict[torch.nn.Module, str] = PrivateAttr(default_factory=dict)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check the settings.

        :raises ValueError: naming the field
        """
        if self.sparsity_profile is not None:
            raise ValueError(
                "OneShotMagnitudeModifier has no sparsity_profile: put OWLModifier before it"
            )
        self.requires_calibration_data = self.repairs
        return super().on_initialize(state, **kwargs)

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Find what is to be pruned.

        :raises ValueError: if ``sparsity`` is null, and no modifier has stated one
        """
        super().on_calibration_start(state, event, **kwargs)
        self._waiting = dict(self._module_names)

    def calibrate_module(
        self, module: torch.nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor
    ) -> None:
        """Nothing is learned from data but what has run, and is to be repaired next."""
        self._reached.add(module)

    def compress_modules(self) -> None:
        """Prune the targets; of those that are repaired what has run.

        :raises ValueError: naming a module whose weight is not finite
        """
        self._prune([m for m in self._waiting if m in self._reached or not self.repairs])

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Prune what saw no sample, such as some experts.

        :raises ValueError: if something was to be repaired and nothing ran
        """
        super().on_calibration_end(state, event, **kwargs)
        self._prune(list(self._waiting))

    def _prune(self, modules: list[torch.nn.Module]) -> None:
        """Prune one matrix after the other on its device."""
        check_weights(modules, self._waiting)
        for module in modules:
            name = self._waiting.pop(module)
            logger.info("Sparsifying {}", name)
            with torch.no_grad(), align_module_device(module):
                weight = module.get_parameter("weight").detach().clone()
                weight.masked_fill_(self._least(name, module, weight), 0)
            update_offload_parameter(module, "weight", weight)

    def _least(self, name: str, module: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
        """Which weights of a matrix are pruned."""
        if self.structure:
            magnitudes = weight.abs().flatten(1)
            least = smallest_of_groups(magnitudes, self.number(module), self.structure.m)
            return least.view(weight.shape)
        count = int(weight.numel() * float(self._module_sparsities[module]))
        return smallest(weight, count, name.strip("."))

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Let go of the model."""
        self._target_layers.clear()
        self._module_names.clear()
        self._module_sparsities.clear()
        return super().on_finalize(state, **kwargs)
