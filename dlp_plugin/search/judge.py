"""The model as it would be if it were pruned: losses without touching a weight.

Wanda's mask of a Linear follows at any sparsity from the weight and the norms of its input
channels (arXiv 2306.11695): in each row the weights with the smallest ``|W| * norm`` go, or in
each M consecutive weights of a row. So a pruned model can be measured by masking each weight as
it is used; what is kept is one threshold per row and sparsity, or for groups of M each weight's
place in its group (a byte), not a second model.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.utils import get_execution_device, patch_attr
from llmcompressor.utils.dev import get_main_device
from torch import distributed as dist
from torch.nn import functional

from dlp_plugin.planning.structure import UNSTRUCTURED, MaskStructure
from dlp_plugin.precision import wide_enough, widest
from dlp_plugin.scoring.calibration import Batch

__all__ = ["Judge"]

# Tokens that are run together, and tokens whose logits are widened to float32 together.
_TOGETHER = 2048
_WIDE = 256
# Tokens of the vocabulary that the dense model's predictions are kept for, the likeliest
# ones; the others are one class.
LIKELIEST = 512
# Rows of a weight whose groups are sorted together, which takes 16 bytes a weight.
_ROWS = 256
# Sparsities per Linear whose thresholds are kept.
REMEMBERED = 16


class _Kept(NamedTuple):
    """The dense model's predictions for ``n`` tokens."""

    places: torch.Tensor  # int32 [n, likeliest]
    logs: torch.Tensor  # float32 [n, likeliest + 1], the last of all other tokens


class Judge:
    """Losses of a causal language model at any sparsities of its Linears.

    In a distributed run every process measures its own samples, and all get the loss over
    all of them.

    :param model: a causal language model of transformers
    :param linears: full name to Linear, those that are to be pruned
    :param norms: full name to the l2 norms of the Linear's input channels, float32 ``[in]``
    :param batches: token ids to measure on, as
        :func:`dlp_plugin.scoring.calibration.scoring_batches` makes them
    """

    def __init__(
        self,
        model: torch.nn.Module,
        linears: Mapping[str, torch.nn.Linear],
        norms: Mapping[str, torch.Tensor],
        batches: Sequence[Batch],
    ) -> None:
        self._model = model
        self._linears = linears
        self._norms = norms
        self._thresholds: dict[tuple[str, int], torch.Tensor] = {}
        self._places: dict[str, torch.Tensor] = {}
        self._grouped = 0
        self._batches = _together(batches)
        self._device = get_main_device()
        self._kept: list[_Kept] = []

    @property
    def tokens(self) -> int:
        """Number of tokens that a measurement on all samples runs."""
        return sum(batch["input_ids"].numel() for batch in self._batches)

    @property
    def fingerprint(self) -> str:
        """Tells apart what losses are measured with: samples and norms."""
        digest = hashlib.sha256()
        for batch in self._batches:
            digest.update(str(batch["input_ids"].tolist()).encode())
        for name, norms in self._norms.items():
            digest.update(f"{name} {float(norms.cpu().double().sum())!r}".encode())
        return digest.hexdigest()

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
                logits = self._logits(batch)[:, :-1].flatten(0, 1)
                wanted = batch["input_ids"][:, 1:].flatten().to(logits.device)
                for few, right in zip(logits.split(_WIDE), wanted.split(_WIDE), strict=True):
                    losses = functional.cross_entropy(few.float(), right, reduction="sum")
                    total += float(losses)
                count += len(wanted)
        return _mean(total, count, self._device)

    def portions(self, tokens: int) -> list[list[int]]:
        """The samples in portions of at least so many tokens, to measure on one at a time.

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
                self._kept = [_keep(self._logits(batch).flatten(0, 1)) for batch in self._batches]
        total, count = 0.0, 0
        with self._pruned(sparsities, structure):
            for place in range(len(self._batches)) if portion is None else portion:
                logits = self._logits(self._batches[place]).flatten(0, 1)
                total += _divergence(logits, self._kept[place])
                count += len(logits)
        return _mean(total, count, self._device)

    @torch.no_grad()
    def _logits(self, batch: Batch) -> torch.Tensor:
        known = inspect.signature(type(self._model).forward).parameters
        inputs = {
            key: value.to(self._device) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
            if key in known and key != "labels"
        }
        with wide_enough(self._model, self._device):
            logits: torch.Tensor = self._model(**inputs, use_cache=False).logits
        return logits

    @contextmanager
    def _pruned(self, sparsities: Mapping[str, float], structure: MaskStructure) -> Iterator[None]:
        """Have Linears compute with masked weights."""
        was_training = self._model.training
        self._model.eval()
        with ExitStack() as stack:
            stack.callback(self._model.train, was_training)
            for name, sparsity in sparsities.items():
                linear = self._linears[name]
                of = linear.in_features
                count = structure.number(sparsity) if structure else int(of * sparsity)
                if count:
                    mask = partial(self._mask, name, count, structure.m)
                    stack.enter_context(patch_attr(linear, "forward", _Masked(linear, mask)))
            yield

    def _mask(self, name: str, count: int, group: int, weight: torch.Tensor) -> torch.Tensor:
        """Which weights are kept if ``count`` of each group go, or of each row."""
        if group:
            places = self._place(name, group).to(weight.device)
            return (places >= count).view(weight.shape)
        threshold = self._threshold(name, count).to(weight.device)
        return _scores(weight, self._norms[name]) > threshold

    @torch.no_grad()
    def _place(self, name: str, group: int) -> torch.Tensor:
        """Each weight's place in its group by score, from 0, uint8 ``[out, groups, group]``."""
        if self._grouped != group:
            self._places.clear()  # a byte a weight, for one structure at a time
            self._grouped = group
        if name not in self._places:
            linear = self._linears[name]
            weight = linear.weight.to(get_execution_device(linear))
            places, number = [], torch.uint8 if group <= 256 else torch.int32
            for rows in _scores(weight, self._norms[name]).split(_ROWS):
                order = rows.unflatten(1, (-1, group)).argsort(dim=2, stable=True)
                places.append(order.argsort(dim=2).to(number))
            self._places[name] = torch.cat(places)
        return self._places[name]

    @torch.no_grad()
    def _threshold(self, name: str, count: int) -> torch.Tensor:
        """The score in each row up to which ``count`` weights go, float32 ``[out, 1]``."""
        if (name, count) not in self._thresholds:
            linear = self._linears[name]
            weight = linear.weight.to(get_execution_device(linear))
            value = _scores(weight, self._norms[name]).kthvalue(count, dim=1, keepdim=True)
            if len(self._thresholds) >= REMEMBERED * len(self._linears):
                del self._thresholds[next(iter(self._thresholds))]  # the oldest
            self._thresholds[name, count] = value.values
        return self._thresholds[name, count]


def _scores(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    return weight.abs().float() * norms.to(weight.device)


class _Masked:
    """A Linear's forward with some weights at zero."""

    def __init__(
        self, linear: torch.nn.Linear, mask: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self._parts = linear, mask

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        linear, mask = self._parts
        weight = linear.weight.to(inputs.device)
        return functional.linear(inputs, weight * mask(weight), linear.bias)


def _together(batches: Sequence[Batch]) -> list[Batch]:
    """Join neighbouring batches that hold nothing but tensors of one shape per token."""
    joined: list[Batch] = []
    for batch in batches:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.keys() == batch.keys()
            and all(_per_token(one) for one in (last, batch))
            and last["input_ids"].shape[1:] == batch["input_ids"].shape[1:]
            and last["input_ids"].numel() + batch["input_ids"].numel() <= _TOGETHER
        ):
            joined[-1] = {key: torch.cat([last[key], batch[key]]) for key in batch}
        else:
            joined.append(batch)
    return joined


def _per_token(batch: Batch) -> bool:
    shape = batch["input_ids"].shape
    return all(isinstance(v, torch.Tensor) and v.shape == shape for v in batch.values())


def _mean(total: float, count: int, device: torch.device) -> float:
    """Mean over the samples of all processes."""
    if is_distributed():
        sums = torch.tensor([total, count], dtype=widest(device), device=device)
        dist.all_reduce(sums)
        total, count = sums[0].item(), int(sums[1])
    return total / count if count else math.nan


def _keep(logits: torch.Tensor) -> _Kept:
    likeliest = min(LIKELIEST, logits.shape[1])
    places, logs = [], []
    for few in logits.split(_WIDE):
        every = few.float().log_softmax(-1)
        top = every.topk(likeliest)
        places.append(top.indices.int().cpu())
        logs.append(torch.cat([top.values, _rest(top.values)], dim=1).cpu())
    return _Kept(torch.cat(places), torch.cat(logs))


def _rest(logs: torch.Tensor) -> torch.Tensor:
    """Logarithm of what probabilities leave, ``[n, 1]``."""
    left = 1 - logs.to(widest(logs.device)).exp().sum(1, keepdim=True)
    return left.clamp_min(1e-12).log().float()


def _divergence(logits: torch.Tensor, kept: _Kept) -> float:
    """Summed over tokens."""
    total = 0.0
    for few, places, logs in zip(
        logits.split(_WIDE), kept.places.split(_WIDE), kept.logs.split(_WIDE), strict=True
    ):
        every = few.float().log_softmax(-1)
        top = every.gather(1, places.long().to(every.device))
        other = torch.cat([top, _rest(top)], dim=1)
        logs = logs.to(every.device)
        differences = logs.exp() * (logs - other)
        total += float(differences.to(widest(logs.device)).sum())
    return total
