"""Measures how fast a causal language model processes a prompt and generates tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["prefill_and_decode", "weight_bytes"]

_SHORT = 16  # prompt tokens before decoding is timed: few, so that the cache stays small
_REPEATS = 3
_SEED = 0


@torch.no_grad()
def prefill_and_decode(
    model: Any, prompt: int, tokens: int, batches: Sequence[int]
) -> tuple[float, dict[int, float]]:
    """Measure prefill and decoding in tokens per second.

    Prompts are random tokens, because the time does not depend on their content. Each result comes
    from the median time of several runs or steps; the first one is left out.

    :param model: a causal language model of transformers; its training mode is restored
    :param prompt: number of tokens of the prompt for prefill
    :param tokens: number of decoding steps
    :param batches: batch sizes to measure decoding with
    :return: tokens per second of prefill; and batch size to tokens per second of decoding, summed
        over the batch
    """
    was_training = model.training
    model.eval()
    try:
        ids = _random_ids(model, 1, prompt)
        read = [_seconds(lambda: model(input_ids=ids, use_cache=True)) for _ in range(_REPEATS + 1)]
        written = {batch: batch / _step(model, batch, tokens) for batch in batches}
    finally:
        model.train(was_training)
    return prompt / statistics.median(read[1:]), written


def weight_bytes(model: torch.nn.Module) -> int:
    """Sum the sizes of a model's parameters and buffers; shared ones count once.

    :param model: to measure
    :return: bytes
    """
    tensors = {id(each): each for each in (*model.parameters(), *model.buffers())}
    return sum(each.nbytes for each in tensors.values())


def _step(model: Any, batch: int, tokens: int) -> float:
    """Return the median seconds of a decoding step."""
    found = model(input_ids=_random_ids(model, batch, _SHORT), use_cache=True)
    seconds = []
    for _ in range(tokens + 1):
        last, cache = found.logits[:, -1:].argmax(-1), found.past_key_values
        started = time.perf_counter()
        found = model(input_ids=last, past_key_values=cache, use_cache=True)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _seconds(run: Any) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _random_ids(model: Any, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    rows = model.config.get_text_config().vocab_size
    return torch.randint(rows, (batch, length), generator=generator)
