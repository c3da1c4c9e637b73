"""Gram matrices of the inputs of the Linears that a stage prunes, and polishing by them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.utils import (
    align_module_device,
    get_execution_device,
    update_offload_parameter,
)
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import (
    accumulate_hessian,
    make_empty_hessian,
)

from dlp_plugin.pruning.distributed import gather, spread
from dlp_plugin.pruning.finite import check_inputs
from dlp_plugin.pruning.least_squares import LeastSquares

__all__ = ["DAMPENING", "Grams", "least_squares", "polishing"]

Module = torch.nn.Module

# What the host's SparseGPT takes by default too.
DAMPENING = 0.01


class Grams:
    """Twice the Gram matrix of each Linear's inputs, mean over samples, as SparseGPT sums it.

    :param offload: keep matrices on the CPU between samples
    """

    def __init__(self, offload: bool = False) -> None:
        self.matrices: dict[Module, torch.Tensor] = {}
        self.samples: dict[Module, int] = {}
        self._offload = offload

    def add(self, module: Module, args: tuple[torch.Tensor, ...], _output: object = None) -> None:
        """Take in a sample; a forward hook.

        :param args: the module's inputs ``[..., in]`` first
        """
        if not args[0].numel():  # an expert that no token was sent to
            return
        device = torch.device(get_execution_device(module))
        if module not in self.samples:
            self.matrices[module] = make_empty_hessian(module, device=device)
            self.samples[module] = 0
        inputs = args[0] if args[0].ndim < 4 else args[0].flatten(0, -2)
        matrix, self.samples[module] = accumulate_hessian(
            inputs, module, self.matrices[module].to(device), self.samples[module]
        )
        self.matrices[module] = matrix.cpu() if self._offload else matrix

    @contextmanager
    def shared(self, names: Mapping[Module, str]) -> Iterator[dict[Module, torch.Tensor]]:
        """The matrices over all processes' samples, to each process those of some modules.

        On leaving, every process gets the weights that the others have made, and the matrices
        are forgotten.

        :param names: of all modules that a process may have calibrated
        """
        if is_distributed():
            ranks = gather(self.matrices, self.samples, names, make_empty_hessian)
        yield self.matrices
        if is_distributed():
            spread(ranks)
        self.matrices.clear()
        self.samples.clear()


def least_squares(module: Module, gram: torch.Tensor, dampening: float = DAMPENING) -> LeastSquares:
    """Make a module's least-squares problem, on the device that the module computes on.

    :param module: whose device is used
    :param gram: ``[in, in]``
    :param dampening: as in :class:`~dlp_plugin.pruning.least_squares.LeastSquares`
    """
    return LeastSquares(gram.to(get_execution_device(module)), dampening)


@contextmanager
def polishing(
    grams: Grams, names: Mapping[Module, str], through: Collection[Module]
) -> Iterator[None]:
    """Refit by least squares the remaining weights of modules that are pruned within.

    :param grams: of the modules that samples reached
    :param names: of all modules that the stage prunes
    :param through: the part of the model that is through; the dense weights of what the stage
        prunes in it are in memory meanwhile
    """
    check_inputs(grams.matrices, names)
    reached = {*through, *grams.samples}  # which tracing may have told of another part
    dense = {module: _weight(module) for module in names if module in reached}
    yield
    with grams.shared(names) as matrices:
        for module, gram in matrices.items():
            pruned = _weight(module)
            if module not in dense or torch.equal(dense[module], pruned):
                continue
            problem = least_squares(module, gram)
            weight = problem.polished(dense.pop(module), pruned)
            update_offload_parameter(module, "weight", weight.to(pruned.dtype))


def _weight(module: Module) -> torch.Tensor:
    with align_module_device(module):
        return module.get_parameter("weight").detach().clone()
