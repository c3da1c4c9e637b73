"""SparseGPT and Wanda.

They have the names of llm-compressor's stages and do the same, so recipes need no change. They
differ from those of llm-compressor 0.14 in three ways:

- with an N:M structure they accept a list of sparsities, with an N for each entry; the stock
  stages have one N for the whole model and silently ignore the list;
- on several processes they sum their statistics, as llm-compressor's GPTQ does; each process of
  the stock stages prunes by its own share of the data, and the last one to write wins;
- an expert that received no token stays dense; the stock stages prune it without data, and
  SparseGPT sets all its weights to zero.

What they rely on, tested by ``tests/test_pruning_structures.py`` and
``tests/test_distributed.py``: a stage keeps a mean over samples per module (row scalars or
Hessian) and the number of samples, and ``compress_modules`` prunes the modules that have both,
each with the stage's N and M.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.utils import get_execution_device
from llmcompressor.core import State
from llmcompressor.modifiers import pruning
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import make_empty_hessian
from llmcompressor.modifiers.pruning.wanda.wanda_sparsify import make_empty_row_scalars

from dlp_plugin.pruning.base import PruningStage
from dlp_plugin.pruning.distributed import gather, spread
from dlp_plugin.pruning.finite import check_inputs

__all__ = ["SparseGPTModifier", "WandaPruningModifier"]


class _Calibrated(PruningStage):
    """A stage that prunes by statistics of the calibration samples."""

    if TYPE_CHECKING:  # of the stock stage beside it
        _num_samples: dict[torch.nn.Module, int]

    def calibrate_module(
        self, module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> None:
        """Take in a sample's inputs, unless it is an expert that no token was sent to.

        The host counts such a call as a sample of zeros, and prunes by it.
        """
        if args[0].numel():
            self._reached.add(module)
            super().calibrate_module(module, args, output)  # type: ignore[safe-super]

    def compress_modules(self) -> None:
        """Prune what has been calibrated; of several processes each some modules.

        :raises ValueError: naming a module whose inputs or weight are not finite
        """
        check_inputs(self._statistics, self._module_names)
        if not is_distributed():
            self._compress()
            return
        ranks = gather(
            self._statistics, self._num_samples, self._module_names, self._empty_statistic()
        )
        self._compress()
        spread(ranks)

    @property
    def _statistics(self) -> dict[torch.nn.Module, torch.Tensor]:
        """Each module's mean over the samples."""
        raise NotImplementedError

    def _empty_statistic(self) -> Callable[..., torch.Tensor]:
        """What makes a statistic of zeros for a module."""
        raise NotImplementedError

    def _compress(self) -> None:
        """Have the host prune the modules of one N at a time."""
        compress = super().compress_modules  # type: ignore[safe-super]
        if not self.structure:
            compress()
            return
        waiting, written = self._num_samples, self._prune_n
        for number in sorted({self.number(module) for module in waiting}):
            these = {m: count for m, count in waiting.items() if self.number(m) == number}
            if number:
                self._num_samples, self._prune_n = these, number
                compress()
            else:  # which the host takes for no structure
                for module in these:
                    del self._statistics[module]
        self._num_samples, self._prune_n = {}, written


class WandaPruningModifier(_Calibrated, pruning.WandaPruningModifier):
    """llm-compressor's Wanda stage, with an N for every entry of a list of sparsities."""

    pruner: ClassVar[str] = "wanda"

    @property
    def _statistics(self) -> dict[torch.nn.Module, torch.Tensor]:
        return self._row_scalars

    def _empty_statistic(self) -> Callable[..., torch.Tensor]:
        return make_empty_row_scalars


class SparseGPTModifier(_Calibrated, pruning.SparseGPTModifier):
    """llm-compressor's SparseGPT stage, with an N for every entry of a list of sparsities."""

    pruner: ClassVar[str] = "sparsegpt"
    compensates: ClassVar[bool] = True

    @property
    def _statistics(self) -> dict[torch.nn.Module, torch.Tensor]:
        return self._hessians

    def _empty_statistic(self) -> Callable[..., torch.Tensor]:
        return make_empty_hessian

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check the settings.

        :raises ValueError: naming the field or module
        """
        stated = self.sparsity if isinstance(self.sparsity, list) else [self.sparsity]
        if 1 in stated and not self.structure:
            raise ValueError(
                "SparseGPTModifier.sparsity is 1, and llm-compressor's SparseGPT must keep some "
                "weights: state less, e.g. 0.99, or add the module to ignore"
            )
        return super().on_initialize(state, **kwargs)

    def _compress(self) -> None:
        """Have the host prune, if Hessians are offloaded a module at a time.

        Its own loop multiplies them with the weight where they are, on the CPU.
        """
        if not self.offload_hessians:
            super()._compress()
            return
        for module, samples in dict(self._num_samples).items():
            self._hessians[module] = self._hessians[module].to(get_execution_device(module))
            self._num_samples = {module: samples}
            super()._compress()

    def watch_inputs(self) -> None:
        """Nothing more: pruning sums the Gram matrices already."""

    def polishing(self, modules: Collection[torch.nn.Module]) -> AbstractContextManager[None]:
        """Polish by copies of the matrices, which pruning uses up."""
        self._grams.matrices = {m: matrix.clone() for m, matrix in self._hessians.items()}
        self._grams.samples = dict(self._num_samples)
        return super().polishing(modules)

    def check_structure(self, targets: dict[str, dict[str, torch.nn.Module]]) -> None:
        """Make sure that an N:M structure fits this stage's blocks of columns too.

        :raises ValueError: naming the field or module
        """
        super().check_structure(targets)
        if self.block_size % self.structure.m:
            raise ValueError(
                f"SparseGPTModifier.block_size {self.block_size} would cut through groups of "
                f"{self.structure.m} weights (mask_structure {self.mask_structure}): take a "
                f"multiple of {self.structure.m}"
            )
        if self.preserve_sparsity_mask:
            raise ValueError(
                "SparseGPTModifier.preserve_sparsity_mask looks for the zeros of every group in "
                f"the first columns in llm-compressor 0.14 and breaks mask_structure "
                f"{self.mask_structure}: leave it out"
            )
