"""Training what can still change in compressed modules, with masks or integers held."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.quantization.utils import is_module_quantized
from compressed_tensors.utils import (
    align_module_device,
    patch_attr,
    update_offload_parameter,
)
from llmcompressor.core import State
from llmcompressor.utils.dev import get_main_device
from torch import distributed as dist

__all__ = ["Entries", "Result", "Trained", "Training", "check_number", "survivors", "train"]

Module = torch.nn.Module
Sample = TypeVar("Sample")

# One of so many samples is kept to measure on.
KEPT = 8
SEED = 0


class Result(NamedTuple):
    """The error on the samples that are kept to measure on.

    :param start: before training
    :param least: of the weights that the modules have now
    """

    start: float
    least: float


class Trained(Protocol):
    """What is trained of a module's parameter."""

    leaf: torch.Tensor
    """The float32 copy that the module computes with, and that is differentiated."""
    values: torch.Tensor
    """What Adam changes, float32."""

    def slope(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient with respect to ``values``, from that with respect to ``leaf``."""

    def spread(self) -> None:
        """Set ``leaf`` by ``values``."""

    def rounded(self) -> torch.Tensor:
        """The values as they would be written."""

    def write(self, values: torch.Tensor) -> None:
        """Give the module these values."""


class Entries:
    """A norm, a bias, or the surviving entries of a weight.

    :param module: that has the parameter, onloaded
    :param name: of the parameter
    :param leaf: its float32 copy
    :param masked: whether its zeros stay
    """

    def __init__(self, module: Module, name: str, leaf: torch.Tensor, *, masked: bool) -> None:
        self.leaf = self.values = leaf.requires_grad_()
        self._place = module, name
        self._dtype = module.get_parameter(name).dtype
        self._mask = (leaf != 0) if masked else None

    def slope(self, gradient: torch.Tensor) -> torch.Tensor:
        """As in :class:`Trained`."""
        return gradient if self._mask is None else gradient.mul_(self._mask)

    def spread(self) -> None:
        """As in :class:`Trained`: they are one."""

    def rounded(self) -> torch.Tensor:
        """As in :class:`Trained`."""
        return self.values.detach().to(self._dtype).float()

    def write(self, values: torch.Tensor) -> None:
        """As in :class:`Trained`."""
        update_offload_parameter(*self._place, values.to(self._dtype))


class Training:
    """A module that computes, within this context, with float32 copies of its parameters.

    The model's own may lie on another device or on disk, and be in a dtype too narrow for the
    steps of training.

    :param whole: the module that computes
    :param parts: modules within it whose norms and biases are trained
    :param weights: of each Linear whose weight is trained too, what makes of its float32 copy
        what is trained
    """

    def __init__(
        self,
        whole: Module,
        parts: Collection[Module],
        weights: Mapping[Module, Callable[[torch.Tensor], Trained]],
    ) -> None:
        self._copies: dict[Module, dict[str, torch.Tensor | None]] = {}
        self._trained: list[Trained] = []
        self._patched = ExitStack()
        for module in whole.modules():
            quantized = is_module_quantized(module)  # which has scales and more beside its bias
            with align_module_device(module):
                copies = {
                    name: parameter.detach().to(torch.float32, copy=True)
                    for name, parameter in module.named_parameters(recurse=False)
                }
                for name, copy in copies.items():
                    if module in weights and name == "weight":
                        self._trained.append(weights[module](copy))
                    elif copy.ndim <= 1 and module in parts and not (quantized and name != "bias"):
                        self._trained.append(Entries(module, name, copy, masked=False))
            self._copies[module] = {**dict.fromkeys(module._parameters), **copies}
        self._adam = self._optimizer()
        self._kept = self._copied()

    def __enter__(self) -> Training:
        for module, copies in self._copies.items():
            self._patched.enter_context(patch_attr(module, "_parameters", copies))
        return self

    def __exit__(self, *_: object) -> None:
        self._patched.close()

    def run(
        self,
        samples: Sequence[Sample],
        gradients: Callable[[Sample, Sequence[torch.Tensor]], Sequence[torch.Tensor | None]],
        first: float,
        last: float,
        order: torch.Generator,
    ) -> None:
        """Take one step of Adam for every sample.

        :param gradients: of a sample's loss with respect to weights
        :param first: rate of the first step; it falls linearly towards ``last``
        :param order: draws the order of the samples
        """
        steps = _least_of_all(len(samples))
        leaves = [each.leaf for each in self._trained]
        for step, place in enumerate(torch.randperm(len(samples), generator=order)[:steps]):
            with torch.enable_grad():
                found = gradients(samples[int(place)], leaves)
            self._set_gradients(found)
            self._adam.param_groups[0]["lr"] = first + (last - first) * step / steps
            self._adam.step()
            with torch.no_grad():
                for each in self._trained:
                    each.spread()

    def _set_gradients(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Set the gradients, mean over all processes."""
        for each, gradient in zip(self._trained, gradients, strict=True):
            found = torch.zeros_like(each.leaf) if gradient is None else gradient
            if is_distributed():
                dist.all_reduce(found)
                found /= dist.get_world_size()
            each.values.grad = each.slope(found)

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """Compute with values as they would be written."""
        exact = self._copied()
        self._set([each.rounded() for each in self._trained])
        yield
        self._set(exact)

    def keep(self) -> None:
        """Remember the values as they are."""
        self._kept = self._copied()

    def restart(self) -> None:
        """Go back to what was kept last, or to the start."""
        self._set(self._kept)
        self._adam = self._optimizer()

    def write(self) -> None:
        """Give the module what was kept last."""
        for each, values in zip(self._trained, self._kept, strict=True):
            each.write(values)
        if is_distributed():
            dist.barrier()  # what the processes share may be written by one of them

    def _optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam([each.values for each in self._trained], fused=True)

    def _copied(self) -> list[torch.Tensor]:
        return [each.values.detach().clone() for each in self._trained]

    def _set(self, values: Iterable[torch.Tensor]) -> None:
        with torch.no_grad():
            for each, value in zip(self._trained, values, strict=True):
                each.values.copy_(value)
                each.spread()


def check_number(state: State, what: str) -> None:
    """Make sure that there is a batch to train on beside the one that is kept.

    :param state: of the run
    :param what: what trains, for the error
    :raises ValueError: if there is only one
    """
    if len(state.data.calib or ()) < 2:
        raise ValueError(
            f"{what} holds out one of eight batches, and there is only one: give more samples, or "
            "leave it out"
        )


def train(
    training: Training,
    samples: Sequence[Sample],
    gradients: Callable[[Sample, Sequence[torch.Tensor]], Sequence[torch.Tensor | None]],
    error: Callable[[Sequence[Sample]], float],
    rate: float,
    epochs: int,
) -> Result:
    """Train, and keep the weights of least error on the samples kept for it, one of eight.

    :param training: what is trained
    :param samples: at least two
    :param gradients: of a sample's loss with respect to weights
    :param error: of samples, over all processes
    :param rate: Adam's, which falls to 0 over the epochs, and to a quarter after an epoch that
        brought nothing
    :param epochs: passes over the samples
    :return: the error before and after
    """
    places = set(range(len(samples) - 1, -1, -KEPT))
    kept = [sample for place, sample in enumerate(samples) if place in places]
    seen = [sample for place, sample in enumerate(samples) if place not in places]
    order = torch.Generator().manual_seed(SEED)
    with training:
        start = least = error(kept)
        for epoch in range(epochs):
            left = [1 - done / epochs for done in (epoch, epoch + 1)]
            training.run(seen, gradients, rate * left[0], rate * left[1], order)
            with training.rounded():
                found = error(kept)
            if found < least:
                least = found
                training.keep()
            else:
                training.restart()
                rate /= 4
    if least < start:
        training.write()
    return Result(start, least)


def survivors(modules: Iterable[Module]) -> dict[Module, Callable[[torch.Tensor], Trained]]:
    """What is trained of pruned modules: the entries of their weights that are not zero.

    :param modules: that have a weight; those without a zero in it are left out
    """
    pruned = [module for module in modules if _has_zeros(module)]
    return {module: partial(Entries, module, "weight", masked=True) for module in pruned}


def _has_zeros(module: Module) -> bool:
    with align_module_device(module):
        return bool((module.get_parameter("weight") == 0).any())


def _least_of_all(number: int) -> int:
    """The least of a number that each process has."""
    if not is_distributed():
        return number
    found = torch.tensor(number, device=get_main_device())
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return int(found)
