"""Models that are trained to predict what they predicted before they were compressed.

Reconstruction brings each block near the dense one. What a block returns matters only through what
the model predicts from it. So after all blocks are pruned or quantized, what is left of their
weights to change is trained together with norms and biases, until the model's predictions come
nearest to the former ones by Kullback-Leibler divergence (knowledge distillation, arXiv
1503.02531). Embeddings, the final norm and the head stay as they are.

It relies on this, tested by ``tests/pruning/test_distillation.py``: while a pipeline runs samples,
the host keeps the output head from computing by another ``forward`` of the module, and has
attention computed by another implementation, named in the model's configuration.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.offload import disable_onloading
from compressed_tensors.utils import patch_attr
from llmcompressor.core import State
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.utils.dev import get_main_device
from llmcompressor.utils.helpers import DisableQuantization, eval_context
from loguru import logger
from torch import distributed as dist

from dlp_plugin.evaluation.causal import check_causal
from dlp_plugin.evaluation.vocabulary import check_tokens
from dlp_plugin.host import current_modifiers
from dlp_plugin.precision import widest
from dlp_plugin.pruning.training import Trained, Training, check_number, train
from dlp_plugin.scoring.calibration import Batch, scoring_batches
from dlp_plugin.scoring.predictions import (
    Predictions,
    device_of,
    divergences,
    gradient,
    keep,
    loaded,
    logits_of,
)

__all__ = ["Distillation", "check_distillable", "distillation"]

Module = torch.nn.Module

# Bytes per weight: float32 copies of what is trained, kept and rounded, its gradient, the two
# states of Adam, and the mask.
NEEDED = 25

# Where a model's configuration names how attention is computed.
ATTENTION = "_attn_implementation"
_Sample = tuple[Batch, Predictions]


def check_distillable(state: State, field: str) -> None:
    """Check that there are samples to train on, a model that predicts tokens, and memory.

    :param state: of the run
    :param field: that asks for distillation, for the errors
    :raises ValueError: naming the field
    """
    check_number(state, field)
    _check_memory(state.model, field)
    check_causal(state.model, f"{field} trains on what the model predicts")


def _check_memory(model: Module, field: str) -> None:
    device = get_main_device()
    if device.type == "cuda":
        has = torch.cuda.get_device_properties(device).total_memory
    elif device.type == "cpu":
        has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return
    with disable_onloading():
        needed = NEEDED * sum(parameter.numel() for parameter in model.parameters())
    if needed > has:
        raise ValueError(
            f"{field} needs {needed / 1e9:,.0f} GB on one device, {NEEDED} bytes per weight, and "
            f"{device} has {has / 1e9:,.0f} GB: leave it out"
        )


def distillation(state: State, epochs: int, field: str) -> Distillation:
    """Begin: keep what the model predicts for the calibration samples.

    :param state: of the run, as :func:`check_distillable` passed it
    :param epochs: passes over the samples
    :param field: that asks for it, for the errors
    :raises ValueError: if all modifiers run at once, or the samples do not suit the model
    """
    if len(current_modifiers()) > 1:
        raise ValueError(
            f"{field} trains before the next modifier begins, but this pipeline runs all "
            "modifiers at once: call oneshot() with pipeline='independent', its default"
        )
    batches = scoring_batches(state.data.calib or ())
    check_tokens(state.model, (each["input_ids"] for each in batches if "input_ids" in each))
    return Distillation(state.model, batches, epochs)


class Distillation:
    """Keeps what a model predicts, and trains it once it is compressed.

    :param model: a causal language model that is not yet compressed
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

    def train(
        self,
        blocks: Iterable[Module],
        weights: Mapping[Module, Callable[[torch.Tensor], Trained]],
        rate: float,
    ) -> None:
        """Train the compressed model: weights of Linears, and norms and biases beside them.

        :param blocks: the model's
        :param weights: as :class:`~dlp_plugin.pruning.training.Training` takes them
        :param rate: Adam's at the start
        """
        parts = (list(block.modules()) for block in blocks)
        beside = {m for modules in parts if not weights.keys().isdisjoint(modules) for m in modules}
        with self._computing():
            start, least = train(
                Training(self._model, beside, weights),
                self._samples,
                self._gradients,
                self._error,
                rate,
                self._epochs,
            )
        logger.info(
            "distilled: divergence from the model before {:.4f} -> {:.4f} nats per token",
            start,
            least,
        )
        if not math.isfinite(start):
            logger.warning(
                "the model predicts nothing finite and was left as it is: load the model in "
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
