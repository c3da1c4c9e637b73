"""Losses of the model as if it were pruned, without changing a weight.

Each weight is masked as it is used (:mod:`dlp_plugin.search.masks`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.utils import patch_attr
from torch import distributed as dist
from torch.nn import functional

from dlp_plugin.planning.structure import UNSTRUCTURED, MaskStructure
from dlp_plugin.precision import widest
from dlp_plugin.scoring.calibration import Batch, together
from dlp_plugin.scoring.predictions import (
    WIDE,
    Predictions,
    device_of,
    divergences,
    keep,
    loaded,
    logits_of,
)
from dlp_plugin.search.masks import Masks

__all__ = ["Judge"]

# Tokens that are run together, unless a sample is longer.
TOGETHER = 2048


class Judge:
    """Losses of a causal language model at any sparsities of its Linears.

    In a distributed run every process measures its own samples, and all get the loss over
    all of them.

    :param model: a causal language model of transformers
    :param masks: of the Linears that are to be pruned
    :param batches: token ids to measure on, as
        :func:`dlp_plugin.scoring.calibration.scoring_batches` makes them
    """

    def __init__(
        self,
        model: torch.nn.Module,
        masks: Masks,
        batches: Sequence[Batch],
    ) -> None:
        self._model = model
        self._masks = masks
        self._batches = together(batches, TOGETHER)
        self._kept: list[Predictions] = []

    @property
    def _device(self) -> torch.device:
        return device_of(self._model)

    @property
    def tokens(self) -> int:
        """Number of tokens that a measurement on all samples runs."""
        return sum(batch["input_ids"].numel() for batch in self._batches)

    @property
    def fingerprint(self) -> str:
        """A fingerprint of what losses depend on: samples, norms, and the ranking of weights."""
        digest = hashlib.sha256(str(sorted(self._masks.by_magnitude)).encode())
        for batch in self._batches:
            digest.update(str(batch["input_ids"].tolist()).encode())
        for name, norms in self._masks.norms.items():
            digest.update(f"{name} {float(norms.cpu().double().sum())!r}".encode())
        return digest.hexdigest()

    def loaded(self) -> AbstractContextManager[None]:
        """Keep the model's weights on the device that computes, if there is room."""
        return loaded(self._model)

    @torch.no_grad()
    def loss(
        self, sparsities: Mapping[str, float], structure: MaskStructure = UNSTRUCTURED
    ) -> float:
        """Mean cross-entropy per predicted token, in nats.

        :param sparsities: full name to sparsity of every Linear that is not to stay dense
        :param structure: prune among every M consecutive weights, or without one in rows
        """
        total, count = 0.0, 0
        with self._pruned(sparsities, structure):
            for batch in self._batches:
                logits = logits_of(self._model, batch, self._device)[:, :-1].flatten(0, 1)
                wanted = batch["input_ids"][:, 1:].flatten().to(logits.device)
                for few, right in zip(logits.split(WIDE), wanted.split(WIDE), strict=True):
                    losses = functional.cross_entropy(few.float(), right, reduction="sum")
                    total += float(losses)
                count += len(wanted)
        return _mean(total, count, self._device)

    def portions(self, tokens: int) -> list[list[int]]:
        """Split the samples into portions of at least so many tokens, to measure on one at a time.

        :return: numbers of batches; as many portions on every process of a distributed run
        """
        found: list[list[int]] = [[]]
        for place in range(len(self._batches)):
            if self.tokens_in(found[-1]) >= tokens:
                found.append([])
            found[-1].append(place)
        if len(found) > 1 and self.tokens_in(found[-1]) < tokens:
            rest = found.pop()
            found[-1] += rest
        if is_distributed():
            count = torch.tensor(len(found), device=self._device)
            dist.all_reduce(count, op=dist.ReduceOp.MIN)
            found = found[: int(count)]
        return found

    def tokens_in(self, portion: Sequence[int]) -> int:
        """Number of tokens in a portion."""
        return sum(self._batches[place]["input_ids"].numel() for place in portion)

    @torch.no_grad()
    def divergence(
        self,
        sparsities: Mapping[str, float],
        portion: Sequence[int] | None = None,
        structure: MaskStructure = UNSTRUCTURED,
    ) -> float:
        """Mean Kullback-Leibler divergence from the dense model per token, in nats.

        Of the vocabulary the 512 tokens that the dense model thinks likeliest count one by
        one and the others as one, so that what is kept of the dense model stays small; that
        is a lower bound of the divergence over the whole vocabulary.

        :param sparsities: as in :meth:`loss`
        :param portion: measure on one of :meth:`portions`; None for all samples
        :param structure: as in :meth:`loss`
        """
        if not self._kept:
            with self._pruned({}, UNSTRUCTURED):
                self._kept = [
                    keep(logits_of(self._model, batch, self._device).flatten(0, 1))
                    for batch in self._batches
                ]
        total, count = 0.0, 0
        with self._pruned(sparsities, structure):
            for place in range(len(self._batches)) if portion is None else portion:
                logits = logits_of(self._model, self._batches[place], self._device).flatten(0, 1)
                total += float(divergences(logits, self._kept[place]).sum())
                count += len(logits)
        return _mean(total, count, self._device)

    @contextmanager
    def _pruned(self, sparsities: Mapping[str, float], structure: MaskStructure) -> Iterator[None]:
        """Have Linears compute with masked weights."""
        was_training = self._model.training
        self._model.eval()
        with ExitStack() as stack:
            stack.callback(self._model.train, was_training)
            for name, sparsity in sparsities.items():
                linear = self._masks.linears[name]
                if count := self._masks.count(name, sparsity, structure):
                    masked = partial(self._masks.masked, name, count, structure)
                    forward = _MaskedForward(linear, masked)
                    stack.enter_context(patch_attr(linear, "forward", forward))
            yield


class _MaskedForward:
    """A Linear's forward with some weights at zero."""

    def __init__(
        self,
        linear: torch.nn.Linear,
        masked: Callable[[torch.Tensor, torch.dtype], torch.Tensor],
    ) -> None:
        self._parts = linear, masked

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        linear, masked = self._parts
        weight = masked(linear.weight.to(inputs.device), inputs.dtype)
        return functional.linear(inputs, weight, linear.bias)


def _mean(total: float, count: int, device: torch.device) -> float:
    """Mean over the samples of all processes."""
    if is_distributed():
        sums = torch.tensor([total, count], dtype=widest(device), device=device)
        dist.all_reduce(sums)
        total, count = sums[0].item(), int(sums[1])
    return total / count if count else math.nan
