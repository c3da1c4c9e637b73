"""The stock pruning stages, for runs on several processes too.

In llm-compressor 0.14 GPTQ sums its statistics over processes, SparseGPT and Wanda do not:
each process prunes by its own share of the calibration data, and the last writer wins. The
classes here carry the stock names, so that recipes read the same; on one process they do
what the stock classes do.

What they rely on, held by ``tests/test_distributed.py``: a stage keeps a mean over
samples per module (row scalars or Hessian) and the number of samples, and
``compress_modules`` prunes the modules that have both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from compressed_tensors.distributed import greedy_bin_packing, is_distributed
from compressed_tensors.utils import get_execution_device
from llmcompressor.modifiers import pruning
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import make_empty_hessian
from llmcompressor.modifiers.pruning.wanda.wanda_sparsify import make_empty_row_scalars
from llmcompressor.utils.dist import broadcast_qparams_and_cleanup
from torch import distributed as dist

__all__ = ["SparseGPTModifier", "WandaPruningModifier"]

Statistics = dict[torch.nn.Module, torch.Tensor]


class WandaPruningModifier(pruning.WandaPruningModifier):
    """llm-compressor's Wanda stage; on several processes it prunes by all their data."""

    def compress_modules(self) -> None:
        """Prune what has been calibrated, each module on one process."""
        if is_distributed():
            modules = _gather(self, self._row_scalars, make_empty_row_scalars)
            super().compress_modules()
            _spread(modules)
        else:
            super().compress_modules()


class SparseGPTModifier(pruning.SparseGPTModifier):
    """llm-compressor's SparseGPT stage; on several processes it prunes by all their data."""

    def compress_modules(self) -> None:
        """Prune what has been calibrated, each module on one process."""
        if is_distributed():
            modules = _gather(self, self._hessians, make_empty_hessian)
            super().compress_modules()
            _spread(modules)
        else:
            super().compress_modules()


def _gather(
    stage: pruning.SparseGPTModifier | pruning.WandaPruningModifier,
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
