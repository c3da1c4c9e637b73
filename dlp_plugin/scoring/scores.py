"""Block scores: weights and activation norms in, one unimportance per block out.

The score of one weight is ``|W_ij| * ||X_:,j||_2`` in float32 (Wanda's, as DLP uses
it); a block's score is the lower median (the paper) or the mean (the authors' released
code) over every prunable weight of the block. Neither ever holds the scores of a whole
block: the median reads the weights once, as they lie in memory, with a few megabytes
of scratch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from dlp_plugin.precision import widest
from dlp_plugin.scoring.choices import Statistic

__all__ = [
    "Part",
    "block_score",
    "check_dtype",
    "check_finite",
    "count_up_to",
    "magnitudes_of",
    "mean_score",
    "smallest_score",
]

Part = tuple[torch.Tensor, torch.Tensor]
"""A Linear's weight ``[out, in]`` and the l2 norms of its input channels, float32 ``[in]``."""

# Elements handled at a time: they stay in a CPU's cache and are no matter of memory,
# and a kernel launch on so many costs nothing.
CHUNK = 1 << 20
# Scores that are looked through as they are; a bracket is no faster for so few.
WHOLE = 1 << 21
# Scores drawn to bracket the one in question among more.
SAMPLE = 1 << 18
# The bracket's first half-width in ranks of the sample: four standard deviations.
MARGIN = int(4 * SAMPLE**0.5 / 2)

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def block_score(parts: Mapping[str, Part], statistic: Statistic = "median") -> float:
    """Unimportance ``U_b`` of one block over all its prunable weights (paper, eq. 4).

    The paper says median and the released code computes the mean; both are exact:
    ``median`` equals ``torch.median`` of all float32 scores to the bit (for an even
    count the lower of the two middle ones).

    :param parts: full name to a Linear's weight ``[out, in]`` and the l2 norms of its
        input channels, float32 ``[in]``, finite and not negative
    :param statistic: ``median`` or ``mean``
    :return: a finite float, at least 0
    :raises ValueError: if a weight is not finite (names the module)
    """
    for name, (weight, _) in parts.items():
        check_dtype(name, weight)
    if statistic == "mean":
        return mean_score(parts)
    count = sum(weight.numel() for weight, _ in parts.values())
    return smallest_score(parts, (count + 1) // 2)


def _chunks(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    """Consecutive rows of ``[rows, columns]``, about ``CHUNK`` elements at a time.

    Never more rows than an int16 can count.
    """
    rows = min(max(CHUNK // matrix.shape[1], 1), torch.iinfo(torch.int16).max)
    yield from matrix.split(rows)


class _Scratch:
    """A piece of memory that chunks of one weight are worked on in, one by one.

    Fresh memory for every chunk costs more than the arithmetic on it.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        size = min(max(CHUNK, weight.shape[1]), weight.numel())
        integer = _INTEGER[weight.dtype.itemsize]
        self._memory = torch.empty(size, dtype=integer, device=weight.device)

    def like(self, chunk: torch.Tensor) -> torch.Tensor:
        return self._memory[: chunk.numel()].view(chunk.shape)


def magnitudes_of(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Chunks of ``|w|`` as integers: the bits without the sign, which order alike.

    Each chunk is gone when the next is taken.
    """
    integer, scratch = _INTEGER[weight.dtype.itemsize], _Scratch(weight)
    without_sign = torch.iinfo(integer).max
    for chunk in _chunks(weight.detach().view(integer)):
        yield torch.bitwise_and(chunk, without_sign, out=scratch.like(chunk))


def _largest(dtype: torch.dtype) -> int:
    """Bits of the largest finite number of a float type."""
    largest = torch.tensor(torch.finfo(dtype).max, dtype=dtype)
    return int(largest.view(_INTEGER[dtype.itemsize]))


def check_dtype(name: str, weight: torch.Tensor) -> None:
    """Refuse a weight that is not of a float type."""
    if weight.dtype.itemsize not in _INTEGER or not weight.is_floating_point():
        raise ValueError(
            f"weight of {name} is {weight.dtype}; scoring takes bfloat16, float16, "
            "float32 or float64: load the model dequantized"
        )


def check_finite(name: str, dtype: torch.dtype, peaks: Sequence[torch.Tensor]) -> None:
    """Refuse a weight whose largest magnitudes, per chunk, are not numbers."""
    if int(torch.stack(list(peaks)).amax()) > _largest(dtype):
        raise ValueError(
            f"weight of {name} holds infinite or undefined values: the checkpoint "
            "is damaged; load a sound one"
        )


def mean_score(parts: Mapping[str, Part]) -> float:
    """The mean of all scores.

    :param parts: as in :func:`block_score`
    :raises ValueError: if a weight is not finite (names the module)
    """
    total, count = 0.0, 0
    for name, (weight, norms) in parts.items():
        check_finite(name, weight.dtype, [chunk.amax() for chunk in magnitudes_of(weight)])
        columns = torch.zeros_like(norms, dtype=widest(norms.device))
        for chunk in _chunks(weight):
            columns += chunk.abs().sum(0, dtype=torch.float32)
        total += float(columns @ norms.to(columns.dtype))
        count += weight.numel()
    return total / count


def smallest_score(parts: Mapping[str, Part], rank: int) -> float:
    """The ``rank``-th smallest of all scores, by a bracket from a sample and an exact count.

    For one channel the float32 product grows with ``|w|``, so "score <= t" is
    "``|w|`` <= t's threshold for that channel", and the bits of non-negative floats
    compare like integers: the passes compare small integers, without multiplying or
    widening a weight. Only the few scores inside the bracket are ever computed.

    :param parts: as in :func:`block_score`
    :param rank: from 1 to the number of weights
    :raises ValueError: if a weight is not finite (names it)
    """
    count = sum(weight.numel() for weight, _ in parts.values())
    if count <= WHOLE:
        for name, (weight, _) in parts.items():
            check_finite(name, weight.dtype, [chunk.amax() for chunk in magnitudes_of(weight)])
        scores = torch.cat([_scores(*part).flatten() for part in parts.values()])
        return float(scores.kthvalue(rank).values)

    sample = _sampled_scores(list(parts.values()), count)
    centre, margin = len(sample) * rank // count, MARGIN
    while True:
        lowest, highest = centre - margin, centre + margin
        low = float(sample[lowest]) if lowest >= 0 else -1.0
        high = float(sample[highest]) if highest < len(sample) else torch.inf
        at_most_low, between = _count_and_collect(parts, low, high)
        if rank <= at_most_low:
            # Few scores can be equal to one another by chance, many only by nature
            # (zeros); then the bracket's end itself is the one.
            if count_up_to(parts.values(), low, strict=True) < rank:
                return low
        elif rank <= at_most_low + len(between):
            return float(between.kthvalue(rank - at_most_low).values)
        elif rank <= count_up_to(parts.values(), high, strict=False):
            return high
        margin *= 4


def _scores(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    return weight.abs().float() * norms


def _sampled_scores(parts: Sequence[Part], count: int) -> torch.Tensor:
    """Sorted scores at random places; the seed is fixed, so runs repeat exactly."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for weight, norms in parts:
        size = -(-SAMPLE * weight.numel() // count)
        places = torch.randint(weight.numel(), (size,), generator=generator)
        rows, columns = places // weight.shape[1], places % weight.shape[1]
        rows, columns = rows.to(weight.device), columns.to(weight.device)
        drawn.append(_scores(weight[rows, columns], norms[columns]))
    return torch.cat(drawn).sort().values


def _thresholds(
    dtype: torch.dtype, norms: torch.Tensor, limit: float, strict: bool
) -> torch.Tensor:
    """Largest magnitude per channel whose score is at most (below) ``limit``.

    :return: its bits as an integer of the weight's width, ``[in]``; -1 where even a
        zero weight scores above ``limit``
    """
    integer = _INTEGER[dtype.itemsize]
    below = torch.full_like(norms, -1, dtype=torch.int64)
    above = torch.full_like(below, _largest(dtype))
    for _ in range(8 * dtype.itemsize):
        middle = below + ((above - below + 1) >> 1)
        scores = _scores(middle.to(integer).view(dtype), norms)
        fits = (scores < limit) if strict else (scores <= limit)
        below = torch.where(fits, middle, below)
        above = torch.where(fits, above, middle - 1)
    return below.to(integer)


def _at_most(magnitudes: torch.Tensor, thresholds: torch.Tensor, scratch: _Scratch) -> torch.Tensor:
    """-1 where a magnitude is at most its channel's threshold, else 0.

    The sign of a difference: on the CPU integer arithmetic is several times faster
    than a comparison, whose boolean result is not vectorized.
    """
    difference = torch.sub(magnitudes, thresholds + 1, out=scratch.like(magnitudes))
    difference >>= 8 * difference.dtype.itemsize - 1
    return difference


def _hits(signs: torch.Tensor) -> torch.Tensor:
    """Number of -1 in a chunk; columns are summed narrow, as no column is too long."""
    return -signs.sum(0, dtype=signs.dtype).sum()


def count_up_to(parts: Iterable[Part], limit: float, strict: bool) -> int:
    """Number of scores at most (below) ``limit``."""
    total = 0
    for weight, norms in parts:
        thresholds = _thresholds(weight.dtype, norms, limit, strict)
        scratch = _Scratch(weight)
        counts = [_hits(_at_most(chunk, thresholds, scratch)) for chunk in magnitudes_of(weight)]
        total += int(torch.stack(counts).sum())
    return total


def _places(signs: torch.Tensor) -> torch.Tensor:
    """Flat places of the -1 in a chunk where they are few.

    Several narrow integers are looked at as one wide integer first: most of those are 0.
    """
    signs = signs.flatten()
    lanes = 8 // signs.dtype.itemsize
    if signs.numel() % lanes:
        return signs.nonzero().flatten()
    groups = signs.view(torch.int64).nonzero().flatten()
    inside = signs.view(-1, lanes)[groups].nonzero()
    return groups[inside[:, 0]] * lanes + inside[:, 1]


def _count_and_collect(
    parts: Mapping[str, Part], low: float, high: float
) -> tuple[int, torch.Tensor]:
    """Number of scores at most ``low``, and the scores strictly between the two.

    The finiteness of the weights is seen to in the same pass.
    """
    total, between = 0, []
    for name, (weight, norms) in parts.items():
        up_to_low = _thresholds(weight.dtype, norms, low, strict=False)
        below_high = _thresholds(weight.dtype, norms, high, strict=True)
        counts, peaks = [], []
        low_scratch, high_scratch = _Scratch(weight), _Scratch(weight)
        for chunk in magnitudes_of(weight):
            peaks.append(chunk.amax())
            low_side = _at_most(chunk, up_to_low, low_scratch)
            counts.append(_hits(low_side))
            inside = _at_most(chunk, below_high, high_scratch)
            inside &= low_side.bitwise_not_()
            places = _places(inside)
            values = chunk.flatten()[places].view(weight.dtype)
            between.append(_scores(values, norms[places % weight.shape[1]]))
        check_finite(name, weight.dtype, peaks)
        total += int(torch.stack(counts).sum())
    return total, torch.cat(between)
