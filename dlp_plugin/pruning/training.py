"""Training what is left of pruned modules, with their masks held."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, TypeVar

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.utils import (
    align_module_device,
    patch_attr,
    update_offload_parameter,
)
from llmcompressor.utils.dev import get_main_device
from torch import distributed as dist

__all__ = ["Result", "Training", "train", "with_zeros"]

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


class Training:
    """A module that computes, within this context, with float32 copies of its parameters.

    The model's own may lie on another device or on disk, and be in a dtype too narrow for the
    steps of training.

    :param whole: the module that computes
    :param parts: modules within it whose norms and biases are trained
    :param pruned: Linears whose surviving weights are trained
    """

    def __init__(
        self, whole: Module, parts: Collection[Module], pruned: Collection[Module]
    ) -> None:
        self._copies: dict[Module, dict[str, torch.Tensor | None]] = {}
        self._places: list[tuple[Module, str]] = []
        self._dtypes: list[torch.dtype] = []
        self._weights: list[torch.Tensor] = []
        self._masks: list[torch.Tensor | None] = []
        self._patched = ExitStack()
        for module in whole.modules():
            with align_module_device(module):
                own = dict(module.named_parameters(recurse=False))
                copies = {name: p.detach().to(torch.float32, copy=True) for name, p in own.items()}
            self._copies[module] = {**dict.fromkeys(module._parameters), **copies}
            for name, copy in copies.items():
                weight = module in pruned and name == "weight"
                if weight or (copy.ndim <= 1 and module in parts):
                    self._places.append((module, name))
                    self._dtypes.append(own[name].dtype)
                    self._weights.append(copy.requires_grad_())
                    self._masks.append((copy != 0) if weight else None)
        self._adam = torch.optim.Adam(self._weights, fused=True)
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
        for step, place in enumerate(torch.randperm(len(samples), generator=order)[:steps]):
            with torch.enable_grad():
                found = gradients(samples[int(place)], self._weights)
            self._set_gradients(found)
            self._adam.param_groups[0]["lr"] = first + (last - first) * step / steps
            self._adam.step()

    def _set_gradients(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Set the gradients, none where a weight is pruned, mean over all processes."""
        for weight, mask, gradient in zip(self._weights, self._masks, gradients, strict=True):
            found = torch.zeros_like(weight) if gradient is None else gradient
            if is_distributed():
                dist.all_reduce(found)
                found /= dist.get_world_size()
            weight.grad = found if mask is None else found.mul_(mask)

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """Compute with weights as they would be written."""
        exact = self._copied()
        self._set(weight.to(dtype) for weight, dtype in zip(exact, self._dtypes, strict=True))
        yield
        self._set(exact)

    def keep(self) -> None:
        """Remember the weights as they are."""
        self._kept = self._copied()

    def restart(self) -> None:
        """Go back to what was kept last, or to the start."""
        self._set(self._kept)
        self._adam = torch.optim.Adam(self._weights, fused=True)

    def write(self) -> None:
        """Give the module what was kept last."""
        for (module, name), weight, dtype in zip(
            self._places, self._kept, self._dtypes, strict=True
        ):
            update_offload_parameter(module, name, weight.to(dtype))
        if is_distributed():
            dist.barrier()  # what the processes share may be written by one of them

    def _copied(self) -> list[torch.Tensor]:
        return [weight.detach().clone() for weight in self._weights]

    def _set(self, values: Iterable[torch.Tensor]) -> None:
        with torch.no_grad():
            for weight, value in zip(self._weights, values, strict=True):
                weight.copy_(value)


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


def with_zeros(modules: Iterable[Module]) -> set[Module]:
    """The modules some of whose weights are zero.

    :param modules: that have a weight
    """
    return {module for module in modules if _has_zeros(module)}


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
