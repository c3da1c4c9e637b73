"""Pruning by the alternating direction method of multipliers (ADMM)."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from compressed_tensors.utils import align_module_device, update_offload_parameter
from llmcompressor.core import State
from loguru import logger
from pydantic import Field

from dlp_plugin.pruning.base import PruningStage
from dlp_plugin.pruning.finite import check_inputs
from dlp_plugin.pruning.grams import DAMPENING, Grams, least_squares

__all__ = ["ADMMPruningModifier"]


class ADMMPruningModifier(PruningStage):
    """Find the mask and the remaining weights of a Linear together, so its outputs change least.

    The mask grows gradually while the remaining weights are updated to compensate (arXiv
    2401.02938). Then conjugate gradients refit them by least squares for the final mask (ALPS,
    arXiv 2406.07831). It is used like SparseGPT and Wanda, and loses less at the same sparsity.

    ```yaml
    pruning_stage:
      pruning_modifiers:
        DLPModifier: {}
        ADMMPruningModifier:
          sparsity: 0.7
          targets: [Linear]
          ignore: ["re:.*lm_head"]
    ```

    The fields are those of the host's pruning stages: ``sparsity`` (one, or one per match of
    ``targets``), ``mask_structure``, ``targets``, ``ignore``; ``reconstruct`` of
    :class:`~dlp_plugin.pruning.base.PruningStage`; and

    :param polish: as in ``PruningStage``, but on by default
    :param dampening_frac: added to the diagonal of the Gram matrix of inputs that are scaled to
        norm 1
    :param offload_hessians: keep Gram matrices on the CPU between samples: less memory, more time
    """

    pruner: ClassVar[str] = "admm"
    compensates: ClassVar[bool] = True

    polish: bool = True
    dampening_frac: float = Field(default=DAMPENING, gt=0)
    offload_hessians: bool = False

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check the settings.

        :raises ValueError: naming the field or module
        """
        self._grams = Grams(self.offload_hessians)
        return super().on_initialize(state, **kwargs)

    def calibrate_module(
        self, module: torch.nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor
    ) -> None:
        """Take in a sample's inputs."""
        if args[0].numel():
            self._reached.add(module)
        self._grams.add(module, args)

    def compress_modules(self) -> None:
        """Prune what has been calibrated; of several processes each some modules.

        :raises ValueError: naming a module whose inputs or weight are not finite
        """
        check_inputs(self._grams.matrices, self._module_names)
        with self._grams.shared(self._module_names) as grams:
            for module in list(grams):
                sparsity = self._sparsity_of(module)
                if not sparsity:
                    continue
                name = self._module_names[module].strip(".")
                logger.info("Sparsifying {}", name)
                problem = least_squares(module, grams.pop(module), self.dampening_frac)
                with align_module_device(module):
                    dense = module.get_parameter("weight").detach()
                    weight = problem.pruned(dense, sparsity, self.structure)
                    if self.polish:
                        weight = problem.polished(dense, weight)
                update_offload_parameter(module, "weight", weight.to(dense.dtype))

    def _sparsity_of(self, module: torch.nn.Module) -> float:
        if self.structure:
            return self.number(module) / self.structure.m
        return float(self._module_sparsities[module])

    def watch_inputs(self) -> None:
        """Nothing more: pruning sums the Gram matrices already."""

    def polishing(self, modules: Collection[torch.nn.Module]) -> AbstractContextManager[None]:
        """Nothing more: pruning refits the weights itself."""
        return nullcontext()
