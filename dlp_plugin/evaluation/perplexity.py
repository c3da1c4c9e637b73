"""Perplexity of a causal language model on text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dlp_plugin.evaluation.vocabulary import check_tokens
from dlp_plugin.precision import wide_enough

__all__ = ["perplexity"]

# Tokens that are run together unless windows are longer, and tokens whose logits are widened to
# float32 together: these may be a hundred thousand times as many as the tokens.
TOGETHER = 2048
_WIDE = 256


@torch.no_grad()
def perplexity(
    model: torch.nn.Module,
    windows: Sequence[torch.Tensor],
    batch_size: int | None = None,
    advance: Callable[[int], Any] = lambda _: None,
) -> float:
    """Perplexity over token windows: every token after a window's first counts once.

    Logits are taken to float32 and the losses summed in float64, whatever the model's
    dtype; on a CPU without arithmetic in that dtype the model computes in float32.

    :param model: a causal language model of transformers; its mode is restored
    :param windows: int64 tensors ``[tokens]``, as
        :func:`dlp_plugin.evaluation.text.token_windows` cuts them
    :param batch_size: windows of equal length evaluated together; by default as many as hold 2,048
        tokens
    :param advance: called with the number of windows done, for a progress bar
    :return: ``exp`` of the mean negative log-likelihood per predicted token; infinite where
        that is beyond a float's range, as of a model that has collapsed, and NaN where the
        model's logits are not finite
    :raises ValueError: if a token is beyond the model's embeddings
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
                break  # it will not be a number again
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
