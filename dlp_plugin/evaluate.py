"""Perplexity of a causal language model on text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["perplexity"]


@torch.no_grad()
def perplexity(
    model: torch.nn.Module,
    windows: Sequence[torch.Tensor],
    batch_size: int = 8,
    advance: Callable[[int], Any] = lambda _: None,
) -> float:
    """Perplexity over token windows: every token after a window's first counts once.

    Logits are taken to float32 and the losses summed in float64, whatever the model's
    dtype.

    :param model: a causal language model of transformers; its mode is restored
    :param windows: int64 tensors ``[tokens]``, as :func:`dlp_plugin.text.token_windows` cuts them
    :param batch_size: windows of equal length evaluated together
    :param advance: called with the number of windows done, for a progress bar
    :return: ``exp`` of the mean negative log-likelihood per predicted token
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    try:
        for batch in _batches(windows, batch_size):
            ids = torch.stack(batch).to(device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            )
            total += losses.double().sum().item()
            count += losses.numel()
            advance(len(batch))
    finally:
        model.train(was_training)
    return math.exp(total / count)


def _batches(windows: Sequence[torch.Tensor], batch_size: int) -> list[list[torch.Tensor]]:
    batches: list[list[torch.Tensor]] = []
    for window in windows:
        last = batches[-1] if batches else []
        if last and len(last) < batch_size and len(last[0]) == len(window):
            last.append(window)
        else:
            batches.append([window])
    return batches
