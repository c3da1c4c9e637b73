"""Calibration batches as scoring wants them: the first so many, and no padding."""

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

# Of the order in which a loader that shuffles gives its samples.
_SEED = 0
# Tokens to judge on, at most: plans judged on 2,048, 4,096 and 8,192 tokens were the same.
_JUDGED = 16_384


def scoring_batches(
    loader: Iterable[Batch], num_samples: int | None = None, main_input: str = "input_ids"
) -> list[Batch]:
    """Take batches from a calibration loader, with every padded position removed.

    A batch that is padded is taken apart into samples, each cut down to what its
    attention mask lets through, so that no padding takes part in the forward pass: not
    in the norms, not in a router or a recurrent state. A loader that shuffles, as
    llm-compressor's do by default, gives the same samples in the same order each time.

    :param loader: batches of tensors ``[samples, ...]``, as llm-compressor makes them
    :param num_samples: take the first so many samples, over all processes of a
        distributed run; None for all
    :param main_input: what a batch holds that holds neither ``input_ids`` nor ``inputs_embeds``
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
            "the calibration data holds no token: its attention masks rule out every position"
        )
    if is_distributed():
        _warn_if_all_have_the_same(batches)
    return batches


def split(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Batches to score on, and a quarter of them, at least one, to judge by.

    More than 16,384 tokens are not judged on: the other batches are scored on. The judging
    ones are spread over the data, which may be in order of length.

    :raises ValueError: if there is but one batch
    """
    average = sum(map(_tokens, batches)) / len(batches)
    judging = max(min(len(batches) // 4, int(_JUDGED / average)), 1)
    if judging == len(batches):
        raise ValueError(
            "auto and refine need held-out calibration samples, and there is only one batch: give "
            "more samples, or a fixed strength"
        )
    step = len(batches) // judging
    judges = range(len(batches) - 1, -1, -step)[:judging]
    return (
        [batch for place, batch in enumerate(batches) if place not in judges],
        [batches[place] for place in sorted(judges)],
    )


def _sound(loader: Iterable[Batch], main_input: str) -> Iterator[Batch]:
    """Check what a loader gives: collators stumble over null rows, models over empty ones."""
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
            raise ValueError(f"{said} cannot be made of its rows ({reason}): {remedy}") from error
        held = batch if isinstance(batch, Mapping) else {}
        keys = (main_input, "input_ids", "inputs_embeds")
        main = next((held[key] for key in keys if key in held), None)
        if not isinstance(main, torch.Tensor) or not main.numel():
            shapes = {k: list(v.shape) for k, v in held.items() if isinstance(v, torch.Tensor)}
            raise ValueError(f"{said} has no {main_input} (tensors: {shapes}): {remedy}")
        yield batch


def _warn_if_all_have_the_same(batches: list[Batch]) -> None:
    """Tell of a loader that deals all processes the same samples instead of a share each."""
    main = [batch["input_ids"].tolist() for batch in batches if "input_ids" in batch]
    own = hashlib.sha256(str(main).encode()).hexdigest()
    hashes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, own)
    if main and len(set(hashes)) == 1:
        logger.warning(
            "All {} processes calibrate on the same samples: llm-compressor deals every process "
            "the first part of a data set that they share. Give each its own part, "
            "e.g. dataset.shard(num_shards=world_size, index=rank)",
            len(hashes),
        )


def _main(batch: Batch) -> torch.Tensor:
    """What the other tensors of a batch belong to: token ids, where it has them."""
    main = batch.get("input_ids")
    return next(value for value in (main, *batch.values()) if isinstance(value, torch.Tensor))


def _samples(batch: Batch) -> int:
    """Number of samples in a batch."""
    return len(_main(batch))


def _tokens(batch: Batch) -> int:
    """Number of positions of all of its samples."""
    return math.prod(_main(batch).shape[:2])


def _part(batch: Batch, samples: int, chosen: slice) -> Batch:
    """Some samples of a batch of so many."""
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
                "A padded batch of {} samples holds {} of shape {}, which cannot be told "
                "apart by sample, so its padding counts: calibrate with batch_size=1{}",
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
    """Cut a sample's tensors ``[1, tokens, ...]`` down to the positions of a mask."""
    for key, value in sample.items():
        if (
            key.startswith("decoder_") == bool(prefix)
            and isinstance(value, torch.Tensor)
            and value.shape[:2] == mask.shape
        ):
            sample[key] = value[:, mask[0]]


def together(batches: Sequence[Batch], tokens: int, *, cut: bool = False) -> list[Batch]:
    """Join neighbouring batches, and take large ones apart, that hold only tensors per token.

    :param tokens: how many a batch has at most, unless one sample has more
    :param cut: whether samples are cut to so many too. The beginnings of all come before what
        follows them, so that the first batches are of many samples
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
    """Batches of so many tokens at most; a sample's pieces in rounds, one of each a round."""
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
    """Parts of a batch of tensors of one shape."""
    parts = zip(*(tensor.split(size, dimension) for tensor in batch.values()), strict=True)
    return (dict(zip(batch, part, strict=True)) for part in parts)


def _per_token(batch: Batch) -> bool:
    shape = batch["input_ids"].shape
    return all(isinstance(v, torch.Tensor) and v.shape == shape for v in batch.values())
