"""The pruning stages: SparseGPT, Wanda and one-shot magnitude.

The first two carry the stock names and do what llm-compressor's do, so that recipes read the
same, and two things that those of 0.14 do not:

- with an N:M structure they take a list of sparsities too, an N for each entry; the stock
  ones have one N for the whole model and ignore the list without a word;
- on several processes they sum their statistics, as the host's GPTQ does, where the stock
  ones prune by their own share of the data and the last writer wins.

What they rely on, held by ``tests/test_stages.py`` and ``tests/test_distributed.py``: a stage
keeps a mean over samples per module (row scalars or Hessian) and the number of samples, and
``compress_modules`` prunes the modules that have both, each with the stage's N and M.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from compressed_tensors.distributed import greedy_bin_packing, is_distributed
from compressed_tensors.utils import (
    align_module_device,
    get_execution_device,
    update_offload_parameter,
)
from llmcompressor.core import Event, State
from llmcompressor.modifiers import pruning
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import make_empty_hessian
from llmcompressor.modifiers.pruning.wanda.wanda_sparsify import make_empty_row_scalars
from llmcompressor.utils.dist import broadcast_qparams_and_cleanup
from loguru import logger
from pydantic import PrivateAttr, model_validator
from torch import distributed as dist

from dlp_plugin.host import (
    PruningStage,
    heed_ignore,
    save_under_source_names,
    stage_targets,
)
from dlp_plugin.planning.allocation import check_target, check_whole, split_structure
from dlp_plugin.scoring.blocks import check_columns
from dlp_plugin.scoring.scores import smallest_score

__all__ = ["OneShotMagnitudeModifier", "SparseGPTModifier", "Stage", "WandaPruningModifier"]

Statistics = dict[torch.nn.Module, torch.Tensor]


class Stage(PruningStage):
    """What the stages here have in common: an N for every module, where there is an M.

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
        return fields if split_structure(structure) == (0, 0) else {"sparsity": None, **fields}

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
        if self._prune_m:
            self._check_structure(targets, self._prune_m)
        save_under_source_names(state.model)
        self._heeded = heed_ignore(state.model, self)
        return bool(super().on_initialize(state, **kwargs))

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Read as it was written again."""
        self.ignore = [entry for entry in self.ignore if entry not in self._heeded]
        return bool(super().on_finalize(state, **kwargs))

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Begin to collect statistics.

        :raises ValueError: if ``sparsity`` is null, and no modifier has stated one
        """
        if self.sparsity is None and not self._prune_m:
            raise ValueError(f"{type(self).__name__}.sparsity is not stated: set it, e.g. 0.7")
        super().on_calibration_start(state, event, **kwargs)

    def _check_structure(self, targets: dict[str, dict[str, torch.nn.Module]], m: int) -> None:
        field = f"{type(self).__name__}.sparsity"
        if isinstance(self.sparsity, list):
            for sparsity in self.sparsity:
                check_whole(sparsity, m, f"an entry of {field}")
        elif self.sparsity is not None:
            check_target(self.sparsity, self.mask_structure, field)
        for modules in targets.values():
            check_columns(modules, m, f"add them to {type(self).__name__}.ignore")

    def number(self, module: torch.nn.Module) -> int:
        """How many of every M consecutive weights of a module are to be zero."""
        if isinstance(self.sparsity, list):
            return round(float(self._module_sparsities[module]) * (self._prune_m or 0))
        return self._prune_n or 0


class WandaPruningModifier(Stage, pruning.WandaPruningModifier):
    """llm-compressor's Wanda stage, with an N for every entry of a list of sparsities."""

    def compress_modules(self) -> None:
        """Prune what has been calibrated."""
        compress = super().compress_modules
        _compress(self, self._row_scalars, make_empty_row_scalars, compress)


class SparseGPTModifier(Stage, pruning.SparseGPTModifier):
    """llm-compressor's SparseGPT stage, with an N for every entry of a list of sparsities."""

    def compress_modules(self) -> None:
        """Prune what has been calibrated."""
        _compress(self, self._hessians, make_empty_hessian, super().compress_modules)

    def _check_structure(self, targets: dict[str, dict[str, torch.nn.Module]], m: int) -> None:
        super()._check_structure(targets, m)
        if self.block_size % m:
            raise ValueError(
                f"SparseGPTModifier.block_size {self.block_size} would cut through groups of {m} "
                f"weights (mask_structure {self.mask_structure}): take a multiple of {m}"
            )
        if self.preserve_sparsity_mask:
            raise ValueError(
                "SparseGPTModifier.preserve_sparsity_mask looks for the zeros of every group in "
                f"the first columns in llm-compressor 0.14 and breaks mask_structure "
                f"{self.mask_structure}: leave it out"
            )


Calibrated = SparseGPTModifier | WandaPruningModifier


class OneShotMagnitudeModifier(Stage):
    """Prune the weights of least magnitude in every matrix, at once and without data.

    The third pruner of DLP's tables (and of SparseGPT's and Wanda's), fed like the two
    others. Of a matrix with ``n`` weights exactly ``int(n * sparsity)`` are set to zero; of
    equal ones at the threshold the first. With an N:M structure the least N of every M
    consecutive weights of a row.

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

    requires_calibration_data: bool = False

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check the settings.

        :raises ValueError: naming the field
        """
        if self.sparsity_profile is not None:
            raise ValueError(
                "OneShotMagnitudeModifier has no sparsity_profile: put OWLModifier before it"
            )
        return super().on_initialize(state, **kwargs)

    def calibrate_module(
        self, module: torch.nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor
    ) -> None:
        """Nothing is learned from data."""

    def compress_modules(self) -> None:
        """Prune the targets, with one matrix at a time on its device."""
        for module, name in self._module_names.items():
            logger.info("Sparsifying {}", name)
            with torch.no_grad(), align_module_device(module):
                weight = module.get_parameter("weight").detach().clone()
                weight.masked_fill_(self._least(name, module, weight), 0)
            update_offload_parameter(module, "weight", weight)
        self._module_names.clear()

    def _least(self, name: str, module: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
        """Which weights of a matrix go."""
        if self._prune_m:
            magnitudes = weight.abs().flatten(1).unflatten(1, (-1, self._prune_m))
            order = magnitudes.argsort(dim=2, stable=True)[..., : self.number(module)]
            least = torch.zeros_like(magnitudes, dtype=torch.bool).scatter_(2, order, True)
            return least.view(weight.shape)
        count = int(weight.numel() * float(self._module_sparsities[module]))
        return smallest(weight, count, name.strip("."))

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Let go of the model."""
        self._target_layers.clear()
        self._module_sparsities.clear()
        return super().on_finalize(state, **kwargs)


def smallest(weight: torch.Tensor, count: int, name: str = "the matrix") -> torch.Tensor:
    """Mark exactly ``count`` weights of the smallest magnitude; of equal ones the first.

    :param weight: ``[out, ...]``, any float type; magnitudes are compared in float32
    :param name: what an error calls it
    :raises ValueError: if a weight is not finite
    """
    if not count:
        return torch.zeros_like(weight, dtype=torch.bool)
    matrix = weight.flatten(1)
    ones = torch.ones(matrix.shape[1], device=weight.device)
    threshold = smallest_score({name: (matrix, ones)}, count)
    magnitudes = matrix.abs().flatten()
    magnitudes = magnitudes if magnitudes.itemsize <= 4 else magnitudes.float()
    marked = magnitudes < threshold
    equal = (magnitudes == threshold).nonzero()[: count - int(marked.sum())]
    marked[equal] = True
    return marked.view(weight.shape)


def _compress(
    stage: Calibrated,
    statistics: Statistics,
    empty: Callable[..., torch.Tensor],
    compress: Callable[[], None],
) -> None:
    """Have the host prune what has been calibrated; of several processes each some modules.

    :param compress: the host's ``compress_modules``
    """
    ranks = _gather(stage, statistics, empty) if is_distributed() else None
    if stage._prune_m:
        _compress_by_number(stage, statistics, compress)
    else:
        compress()
    if ranks is not None:
        _spread(ranks)


def _compress_by_number(
    stage: Calibrated, statistics: Statistics, compress: Callable[[], None]
) -> None:
    """Have the host prune the modules of one N at a time."""
    waiting, written = stage._num_samples, stage._prune_n
    for number in sorted({stage.number(module) for module in waiting}):
        these = {m: count for m, count in waiting.items() if stage.number(m) == number}
        if number:
            stage._num_samples, stage._prune_n = these, number
            compress()
        else:  # which the host takes for no structure
            for module in these:
                del statistics[module]
    stage._num_samples, stage._prune_n = {}, written


def _gather(
    stage: Calibrated,
    statistics: Statistics,
    empty: Callable[..., torch.Tensor],
) -> dict[torch.nn.Module, int]:
    """Bring each module's mean over all processes' samples to one process.

    Afterwards the stage holds statistics of the modules that fall to this process only.

    :return: every module that some process has calibrated, and the process it fell to
    """
    own = {stage._module_names[module]: n for module, n in stage._num_samples.items()}
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, own)
    samples = {
        module: sum(count.get(name, 0) for count in counts)
        for module, name in stage._module_names.items()
        if any(name in count for count in counts)
    }
    _, _, ranks = greedy_bin_packing(
        list(samples),
        len(counts),
        item_weight_fn=lambda module: sum(p.numel() for p in module.parameters()),
    )
    for module, total in samples.items():
        device = get_execution_device(module)
        statistic = statistics.pop(module, None)
        if statistic is None:
            statistic = empty(module, device=device)
        statistic = statistic.to(device)
        statistic *= stage._num_samples.pop(module, 0) / total
        dist.reduce(statistic, dst=ranks[module])
        if ranks[module] == dist.get_rank():
            statistics[module], stage._num_samples[module] = statistic, total
    return dict(ranks)


def _spread(ranks: dict[torch.nn.Module, int]) -> None:
    """Give every process the weights that the others have pruned."""
    broadcast_qparams_and_cleanup(list(ranks), ranks, ["weight"])
    dist.barrier()  # weights in memory that the processes share are written in place
