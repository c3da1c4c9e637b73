"""Perplexity of a causal language model on text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dlp_plugin.evaluation.vocabulary import check_tokens
from dlp_plugin.precision import wide_enough

__all__ = ["perplexity"]

# Largest number of tokens in a batch, unless a single window is longer.
TOGETHER = 2048
# Tokens whose logits are converted to float32 at a time; each has as many as the vocabulary.
_WIDE = 256


@torch.no_grad()
def perplexity(
    model: torch.nn.Module,
    windows: Sequence[torch.Tensor],
    batch_size: int | None = None,
    advance: Callable[[int], Any] = lambda _: None,
) -> float:
    """Compute the perplexity over token windows: all tokens but a window's first are predicted.

    Logits are converted to float32, and losses are summed in float64, whatever the model's dtype.
    On a CPU without arithmetic in that dtype the model computes in float32.

    :param model: a causal language model of transformers; its training mode is restored
    :param windows: int64 tensors ``[tokens]``, as
        :func:`dlp_plugin.evaluation.text.token_windows` cuts them
    :param batch_size: windows of equal length evaluated together; by default as many as hold 2,048
        tokens
    :param advance: called after each batch with its number of windows, for a progress bar
    :return: ``exp`` of the mean negative log-likelihood per predicted token. It is infinite if it
        exceeds a float's range, as a collapsed model's may, and NaN if the logits are not finite
    :raises ValueError: if the model has no embedding for a token
    """
    check_tokens(model, windows)
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    try:
        for batch in _batches(windows, batch_size):
            ids = torch.stack(batch).to(device)
            with wide_enough(model, device):
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            for row, wanted in zip(logits, ids[:, 1:].to(logits.device), strict=True):
                for few, right in zip(row.split(_WIDE), wanted.split(_WIDE), strict=True):
                    losses = torch.nn.functional.cross_entropy(few.float(), right, reduction="none")
                    total += losses.cpu().double().sum().item()
                    count += len(losses)
            advance(len(batch))
            if not math.isfinite(total):
                break  # more windows would not make it finite again
    finally:
        model.train(was_training)
    try:
        return math.exp(total / count)
    except OverflowError:
        return math.inf


def _batches(windows: Sequence[torch.Tensor], batch_size: int | None) -> list[list[torch.Tensor]]:
    batches: list[list[torch.Tensor]] = []
    for window in windows:
        last = batches[-1] if batches else []
        most = batch_size or TOGETHER // len(window)
        if last and len(last) < most and len(last[0]) == len(window):
            last.append(window)
        else:
            batches.append([window])
    return batches
