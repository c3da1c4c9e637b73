"""Prepares calibration batches for scoring: limits their number and removes padding."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from compressed_tensors.distributed import is_distributed
from loguru import logger
from torch import distributed as dist

__all__ = ["Batch", "scoring_batches", "split", "together"]

Batch = dict[str, Any]

# Seed for the order of a loader that shuffles.
_SEED = 0
# Largest number of held-out tokens: plans judged on 2,048, 4,096 and 8,192 tokens were the same.
_JUDGED = 16_384


def scoring_batches(
    loader: Iterable[Batch], num_samples: int | None = None, main_input: str = "input_ids"
) -> list[Batch]:
    """Take batches from a calibration loader, with all padding removed.

    A padded batch is split into samples, and each sample is cut to the positions that its
    attention mask selects. So padding has no influence on norms, routers or recurrent states. The
    random seed is fixed: a loader that shuffles, as llm-compressor's do by default, gives the same
    samples in the same order each time.

    :param loader: batches of tensors ``[samples, ...]``, as llm-compressor makes them
    :param num_samples: number of samples to take, counted from the first and summed over all
        processes of a distributed run; None for all
    :param main_input: key of the model's main input, if a batch has neither ``input_ids`` nor
        ``inputs_embeds``
    :return: batches without padding
    :raises ValueError: if a batch has rows without tokens, or if no token is left
    """
    if num_samples is not None and is_distributed():
        rank, ranks = dist.get_rank(), dist.get_world_size()
        num_samples = max(num_samples * (rank + 1) // ranks - num_samples * rank // ranks, 1)
    sound = _sound(loader, main_input)
    taken = sound if num_samples is None else _first(sound, num_samples)
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(_SEED)
        batches = [piece for batch in taken for piece in _without_padding(batch)]
    if not batches:
        raise ValueError(
            "the calibration data holds no tokens: its attention masks exclude every position"
        )
    if is_distributed():
        _warn_if_all_have_the_same(batches)
    return batches


def split(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Split batches into those to score on and the held-out ones.

    A quarter is held out, at least one batch and at most about 16,384 tokens. Held-out batches are
    spread over the data, because it may be sorted by length.

    :param batches: at least two
    :return: the batches to score on, and the held-out batches
    :raises ValueError: if there is only one batch
    """
    average = sum(map(_tokens, batches)) / len(batches)
    judging = max(min(len(batches) // 4, int(_JUDGED / average)), 1)
    if judging == len(batches):
        raise ValueError(
            "auto and refine need held-out calibration samples, but there is only one batch: give "
            "more samples, or a fixed strength"
        )
    step = len(batches) // judging
    judges = range(len(batches) - 1, -1, -step)[:judging]
    return (
        [batch for place, batch in enumerate(batches) if place not in judges],
        [batches[place] for place in sorted(judges)],
    )


def _sound(loader: Iterable[Batch], main_input: str) -> Iterator[Batch]:
    """Check the loader's batches: null rows break collators, and empty rows break models."""
    batches = iter(loader)
    remedy = "leave such rows out, e.g. dataset.filter(lambda row: row['input_ids'])"
    for number in count(1):
        said = f"batch {number} of the calibration data"
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{said} cannot be made from its rows ({reason}): {remedy}") from error
        held = batch if isinstance(batch, Mapping) else {}
        keys = (main_input, "input_ids", "inputs_embeds")
        main = next((held[key] for key in keys if key in held), None)
        if not isinstance(main, torch.Tensor) or not main.numel():
            shapes = {k: list(v.shape) for k, v in held.items() if isinstance(v, torch.Tensor)}
            raise ValueError(f"{said} has no {main_input} (tensors: {shapes}): {remedy}")
        yield batch


def _warn_if_all_have_the_same(batches: list[Batch]) -> None:
    """Warn if all processes got the same samples instead of a share each."""
    main = [batch["input_ids"].tolist() for batch in batches if "input_ids" in batch]
    own = hashlib.sha256(str(main).encode()).hexdigest()
    hashes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, own)
    if main and len(set(hashes)) == 1:
        logger.warning(
            "All {} processes calibrate on the same samples: llm-compressor gives every process "
            "the first part of a shared data set. Give each process its own part, "
            "e.g. dataset.shard(num_shards=world_size, index=rank)",
            len(hashes),
        )


def _main(batch: Batch) -> torch.Tensor:
    """Return a batch's main tensor, whose shape gives samples and tokens: ``input_ids`` if any."""
    main = batch.get("input_ids")
    return next(value for value in (main, *batch.values()) if isinstance(value, torch.Tensor))


def _samples(batch: Batch) -> int:
    """Return the number of samples in a batch."""
    return len(_main(batch))


def _tokens(batch: Batch) -> int:
    """Return the number of tokens in a batch."""
    return math.prod(_main(batch).shape[:2])


def _part(batch: Batch, samples: int, chosen: slice) -> Batch:
    """Take some samples out of a batch that has ``samples`` of them."""
    return {
        key: value[chosen]
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == samples
        else value
        for key, value in batch.items()
    }


def _first(loader: Iterable[Batch], left: int) -> Iterator[Batch]:
    for batch in loader:
        samples = _samples(batch)
        yield batch if samples <= left else _part(batch, samples, slice(left))
        left -= samples
        if left <= 0:
            return


def _without_padding(batch: Batch) -> Iterator[Batch]:
    masks = [batch.get("attention_mask"), batch.get("decoder_attention_mask")]
    if all(mask is None or mask.ndim != 2 or bool(mask.all()) for mask in masks):
        yield batch
        return
    samples = _samples(batch)
    for key, value in batch.items():
        if not isinstance(value, torch.Tensor) or not value.ndim:
            continue
        by_axis = key.endswith("position_ids") and value.ndim > 2
        if by_axis or (samples > 1 and len(value) != samples):
            logger.warning(
                "A padded batch of {} samples holds {} of shape {}, which cannot be split by "
                "sample, so its padding counts: calibrate with batch_size=1{}",
                samples,
                key,
                tuple(value.shape),
                " and without it" if by_axis else "",
            )
            yield batch
            return
    for row in range(samples):
        sample = _part(batch, samples, slice(row, row + 1))
        for prefix in ("decoder_", ""):
            mask = sample.get(f"{prefix}attention_mask")
            if mask is not None and mask.ndim == 2:
                _keep_real(sample, mask.bool(), prefix)
        if all(value.numel() for key, value in sample.items() if key.endswith("input_ids")):
            yield sample


def _keep_real(sample: Batch, mask: torch.Tensor, prefix: str) -> None:
    """Cut a sample's tensors ``[1, tokens, ...]`` to the positions of a mask, in place."""
    for key, value in sample.items():
        if (
            key.startswith("decoder_") == bool(prefix)
            and isinstance(value, torch.Tensor)
            and value.shape[:2] == mask.shape
        ):
            sample[key] = value[:, mask[0]]


def together(batches: Sequence[Batch], tokens: int, *, cut: bool = False) -> list[Batch]:
    """Join small neighbouring batches and split large ones, if all their tensors are per token.

    :param batches: in order
    :param tokens: largest number of tokens in a batch, unless a single sample has more
    :param cut: whether to cut longer samples too. The first pieces of all samples then come before
        the second ones, so that the first batches hold many samples
    :return: the new batches
    """
    joined: list[Batch] = []
    for batch in _apart(batches, tokens, cut):
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.keys() == batch.keys()
            and all(_per_token(one) for one in (last, batch))
            and last["input_ids"].shape[1:] == batch["input_ids"].shape[1:]
            and last["input_ids"].numel() + batch["input_ids"].numel() <= tokens
        ):
            joined[-1] = {key: torch.cat([last[key], batch[key]]) for key in batch}
        else:
            joined.append(batch)
    return joined


def _apart(batches: Sequence[Batch], tokens: int, cut: bool) -> list[Batch]:
    """Split batches to ``tokens`` at most; all samples' first pieces come first, and so on."""
    rounds: list[list[Batch]] = [[]]
    for batch in batches:
        if not _per_token(batch) or batch["input_ids"].ndim != 2:
            rounds[0].append(batch)
            continue
        length = min(tokens, batch["input_ids"].shape[1]) if cut else batch["input_ids"].shape[1]
        samples = max(1, tokens // length)
        for number, piece in enumerate(_splits(batch, length, 1)):
            if number == len(rounds):
                rounds.append([])
            rounds[number] += _splits(piece, samples, 0)
    return [piece for pieces in rounds for piece in pieces]


def _splits(batch: Batch, size: int, dimension: int) -> Iterator[Batch]:
    """Split all tensors of a batch, which have one shape, into parts along a dimension."""
    parts = zip(*(tensor.split(size, dimension) for tensor in batch.values()), strict=True)
    return (dict(zip(batch, part, strict=True)) for part in parts)


def _per_token(batch: Batch) -> bool:
    shape = batch["input_ids"].shape
    return all(isinstance(v, torch.Tensor) and v.shape == shape for v in batch.values())
