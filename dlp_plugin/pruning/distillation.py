"""Pruned models that are trained to predict what the dense model predicts, with their masks held.

Reconstruction brings each block near the dense one. What a block returns matters only through what
the model predicts from it. So after all blocks are pruned, their surviving weights, norms and
biases are trained together until the model's predictions come nearest to the dense model's, by
Kullback-Leibler divergence (knowledge distillation, arXiv 1503.02531). Embeddings, the final norm
and the head stay as they are.

It relies on this, tested by ``tests/pruning/test_distillation.py``: while a pipeline runs samples,
the host keeps the output head from computing by another ``forward`` of the module, and has
attention computed by another implementation, named in the model's configuration.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.utils import patch_attr
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.utils.helpers import DisableQuantization, eval_context
from loguru import logger
from torch import distributed as dist

from dlp_plugin.precision import widest
from dlp_plugin.pruning.training import Training, train, with_zeros
from dlp_plugin.scoring.calibration import Batch
from dlp_plugin.scoring.predictions import (
    Predictions,
    device_of,
    divergences,
    gradient,
    keep,
    loaded,
    logits_of,
)

__all__ = ["Distillation"]

Module = torch.nn.Module

# Where a model's configuration names how attention is computed.
ATTENTION = "_attn_implementation"
# Adam's; see train(). The best lay between 3e-4 and 1e-3 on the models that were measured.
RATE = 5e-4

_Sample = tuple[Batch, Predictions]


class Distillation:
    """Keeps what the dense model predicts, and trains the model once it is pruned.

    :param model: a causal language model that is not yet pruned
    :param batches: keyword arguments of its forward pass, at least two, without padding
    :param epochs: passes over the batches
    """

    def __init__(self, model: Any, batches: Sequence[Batch], epochs: int) -> None:
        self._model = model
        self._epochs = epochs
        self._device = device_of(model)
        self._attention = getattr(model.config, ATTENTION)
        with torch.no_grad(), loaded(model), self._alone():
            self._samples = [(batch, keep(self._logits(batch))) for batch in batches]

    def train(self, blocks: Collection[Module], pruned: Collection[Module]) -> None:
        """Train the pruned model.

        :param blocks: the model's
        :param pruned: Linears that the stage has pruned
        """
        parts = [block for block in blocks if any(module in pruned for module in block.modules())]
        with self._computing():
            start, least = train(
                Training(
                    self._model,
                    {module for block in parts for module in block.modules()},
                    with_zeros(pruned),
                ),
                self._samples,
                self._gradients,
                self._error,
                RATE,
                self._epochs,
            )
        logger.info(
            "distilled: divergence from the dense model {:.4f} -> {:.4f} nats per token",
            start,
            least,
        )
        if not math.isfinite(start):
            logger.warning(
                "the pruned model predicts nothing finite and was left as it is: load the model in "
                "a wider dtype"
            )

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Have the model compute as it does when no pipeline runs."""
        head = self._model.get_output_embeddings()
        forward = MethodType(type(head).forward, head)
        with (
            self._alone(),
            patch_attr(self._model.config, ATTENTION, self._attention),
            patch_attr(head, "forward", forward),
        ):
            yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Have no modifier take part."""
        with (
            HooksMixin.disable_hooks(),
            DisableQuantization(self._model),
            eval_context(self._model),
        ):
            yield

    def _logits(self, batch: Batch) -> torch.Tensor:
        """``[tokens, vocabulary]``."""
        return logits_of(self._model, batch, self._device).flatten(0, 1)

    def _gradients(
        self, sample: _Sample, weights: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor | None]:
        """Of the mean divergence per token."""
        batch, kept = sample
        logits = self._logits(batch)
        slope = gradient(logits, kept).div_(len(logits))
        return torch.autograd.grad(logits, weights, slope, allow_unused=True)

    @torch.no_grad()
    def _error(self, samples: Sequence[_Sample]) -> float:
        """Mean divergence per token, over all processes."""
        sums = torch.zeros(2, dtype=widest(self._device), device=self._device)
        for batch, kept in samples:
            logits = self._logits(batch)
            sums[0] += divergences(logits, kept).sum()
            sums[1] += len(logits)
        if is_distributed():
            dist.all_reduce(sums)
        return float(sums[0] / sums[1])
