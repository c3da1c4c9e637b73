"""Calibrated statistics and pruned weights, shared between processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from compressed_tensors.distributed import greedy_bin_packing
from compressed_tensors.utils import get_execution_device
from llmcompressor.utils.dist import broadcast_qparams_and_cleanup
from torch import distributed as dist

__all__ = ["gather", "spread"]

Module = torch.nn.Module


def gather(
    statistics: dict[Module, torch.Tensor],
    samples: dict[Module, int],
    names: Mapping[Module, str],
    empty: Callable[..., torch.Tensor],
) -> dict[Module, int]:
    """Compute each module's mean over all processes' samples, on one process per module.

    Afterwards both dictionaries hold the modules that fall to this process only.

    :param statistics: each module's mean over the samples of this process
    :param samples: each module's number of samples on this process
    :param names: of all modules that a process may have calibrated
    :param empty: makes a statistic of zeros for a module on a device
    :return: every module that some process has calibrated, and the process it fell to
    """
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, {names[module]: n for module, n in samples.items()})
    totals = {
        module: sum(count.get(name, 0) for count in counts)
        for module, name in names.items()
        if any(name in count for count in counts)
    }
    _, _, ranks = greedy_bin_packing(
        list(totals),
        len(counts),
        item_weight_fn=lambda module: sum(p.numel() for p in module.parameters()),
    )
    for module, total in totals.items():
        device = get_execution_device(module)
        statistic = statistics.pop(module, None)
        if statistic is None:
            statistic = empty(module, device=device)
        statistic = statistic.to(device)
        statistic *= samples.pop(module, 0) / total
        dist.reduce(statistic, dst=ranks[module])
        if ranks[module] == dist.get_rank():
            statistics[module], samples[module] = statistic, total
    return dict(ranks)


def spread(ranks: dict[Module, int]) -> None:
    """Give every process the weights that the others have pruned.

    :param ranks: each pruned module to the process that pruned it
    """
    broadcast_qparams_and_cleanup(list(ranks), ranks, ["weight"])
    dist.barrier()  # processes may share a weight's memory: wait until it is written
