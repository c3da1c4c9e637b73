"""Refuses to prune or quantize with weights or statistics that are NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from compressed_tensors.utils import align_module_device

__all__ = ["check_inputs", "check_weights"]

Module = torch.nn.Module


def check_weights(modules: Iterable[Module], names: Mapping[Module, str]) -> None:
    """Check that the weights of modules are finite.

    :param modules: about to be pruned
    :param names: of the modules, as the host keeps them
    :raises ValueError: naming the first module whose weight is not finite
    """
    for module in modules:
        with align_module_device(module):
            if not module.get_parameter("weight").isfinite().all():
                raise ValueError(
                    f"weight of {names[module].strip('.')} holds infinite or undefined values: "
                    "the checkpoint is damaged; load an intact one"
                )


def check_inputs(statistics: Mapping[Module, torch.Tensor], names: Mapping[Module, str]) -> None:
    """Check that statistics of modules' inputs are finite.

    :param statistics: each module's statistic
    :param names: of the modules, as the host keeps them
    :raises ValueError: naming the first module whose weight or statistic is not finite. Weights
        are checked first, because they make the inputs of later modules not finite
    """
    check_weights(statistics, names)
    for module, statistic in statistics.items():
        if not statistic.isfinite().all():
            raise ValueError(
                f"the inputs of {names[module].strip('.')} hold infinite or undefined values: "
                "check the calibration data, load the model in a wider dtype, or leave the module "
                "out by ignore"
            )
