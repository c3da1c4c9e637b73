"""How fast a causal language model reads a prompt and writes tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["prefill_and_decode", "weight_bytes"]

_SHORT = 16  # tokens of the prompt that is written on behind, so that the cache stays small
_REPEATS = 3
_SEED = 0


@torch.no_grad()
def prefill_and_decode(
    model: Any, prompt: int, tokens: int, batches: Sequence[int]
) -> tuple[float, dict[int, float]]:
    """Tokens per second of a prompt that is read, and of tokens that are written one by one.

    Prompts are random tokens from a seed, as time does not depend on what they say. Each figure
    is of the median of several runs or steps, behind one that does not count.

    :param model: a causal language model of transformers, where it stands; its mode is restored
    :param prompt: tokens of the prompt that is read
    :param tokens: how many are written
    :param batches: texts that are written at a time, each measured by itself
    :return: of the prompt, and of every batch; tokens of all its texts count
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
    """What a model's weights take in memory: its parameters and buffers, each once."""
    tensors = {id(each): each for each in (*model.parameters(), *model.buffers())}
    return sum(each.nbytes for each in tensors.values())


def _step(model: Any, batch: int, tokens: int) -> float:
    """Seconds that one more token of a batch takes."""
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
