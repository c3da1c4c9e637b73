"""Refusing to prune or quantize by numbers that are none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from compressed_tensors.utils import align_module_device

__all__ = ["check_inputs", "check_weights"]

Module = torch.nn.Module


def check_weights(modules: Iterable[Module], names: Mapping[Module, str]) -> None:
    """Make sure that what is about to change is sound.

    :param names: of the modules, as the host keeps them
    :raises ValueError: naming the first module whose weight is not finite
    """
    for module in modules:
        with align_module_device(module):
            if not module.get_parameter("weight").isfinite().all():
                raise ValueError(
                    f"weight of {names[module].strip('.')} holds infinite or undefined values: "
                    "the checkpoint is damaged; load a sound one"
                )


def check_inputs(statistics: Mapping[Module, torch.Tensor], names: Mapping[Module, str]) -> None:
    """Make sure that what was summed of modules' inputs can be pruned by.

    :param names: of the modules, as the host keeps them
    :raises ValueError: naming the first module whose statistic, or whose weight, is not finite;
        a weight makes the inputs of others so, and comes first
    """
    check_weights(statistics, names)
    for module, statistic in statistics.items():
        if not statistic.isfinite().all():
            raise ValueError(
                f"the inputs of {names[module].strip('.')} hold infinite or undefined values: "
                "check the calibration data, load the model in a wider dtype, or leave the module "
                "out by ignore"
            )
