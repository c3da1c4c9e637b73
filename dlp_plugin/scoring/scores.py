"""DLP's block score, computed from weights and activation norms.

The score of one weight is ``|W_ij| * ||X_:,j||_2`` in float32, as in Wanda (arXiv 2306.11695).
The score of a block is the lower median (in the paper) or the mean (in the authors' released
code) of the scores of all its prunable weights. The scores of a whole block are never stored: the
median needs one pass over the weights and a few megabytes of memory.
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

# Elements processed at a time: few enough for a CPU's cache, many enough for a GPU kernel.
CHUNK = 1 << 20
# Up to this many scores the median is computed directly; a bracket would not be faster.
WHOLE = 1 << 21
# Number of scores drawn at random to find a bracket around the median of more scores.
SAMPLE = 1 << 18
# Half-width of the first bracket, in ranks of the sample: four standard deviations.
MARGIN = int(4 * SAMPLE**0.5 / 2)

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def block_score(parts: Mapping[str, Part], statistic: Statistic = "median") -> float:
    """Compute the unimportance ``U_b`` of one block (DLP, arXiv 2505.23807, eq. 4).

    The paper uses the median, the released code the mean. The median is exact: it has the same
    bits as ``torch.median`` of all float32 scores, which for an even count is the lower of the two
    middle ones.

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
    """Yield consecutive rows of ``[rows, columns]``, about ``CHUNK`` elements at a time.

    A chunk never has more rows than an int16 can count.
    """
    rows = min(max(CHUNK // matrix.shape[1], 1), torch.iinfo(torch.int16).max)
    yield from matrix.split(rows)


class _Scratch:
    """A buffer that is reused for all chunks of a weight.

    Allocating memory for every chunk would cost more than the arithmetic.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        size = min(max(CHUNK, weight.shape[1]), weight.numel())
        integer = _INTEGER[weight.dtype.itemsize]
        self._memory = torch.empty(size, dtype=integer, device=weight.device)

    def like(self, chunk: torch.Tensor) -> torch.Tensor:
        return self._memory[: chunk.numel()].view(chunk.shape)


def magnitudes_of(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield chunks of ``|w|`` as integers: the bits without the sign, which have the same order.

    Each chunk is overwritten by the next.

    :param weight: ``[out, in]``, any float dtype
    :return: chunks of consecutive rows, as integers of the weight's width
    """
    integer, scratch = _INTEGER[weight.dtype.itemsize], _Scratch(weight)
    without_sign = torch.iinfo(integer).max
    for chunk in _chunks(weight.detach().view(integer)):
        yield torch.bitwise_and(chunk, without_sign, out=scratch.like(chunk))


def _largest(dtype: torch.dtype) -> int:
    """Return the bits of the largest finite number of a float type."""
    largest = torch.tensor(torch.finfo(dtype).max, dtype=dtype)
    return int(largest.view(_INTEGER[dtype.itemsize]))


def check_dtype(name: str, weight: torch.Tensor) -> None:
    """Refuse a weight that is not a float of 16, 32 or 64 bits.

    :param name: full name of the module, for the error
    :param weight: to check
    :raises ValueError: naming the module
    """
    if weight.dtype.itemsize not in _INTEGER or not weight.is_floating_point():
        raise ValueError(
            f"weight of {name} is {weight.dtype}, but scoring needs bfloat16, float16, "
            "float32 or float64: load the model dequantized"
        )


def check_finite(name: str, dtype: torch.dtype, peaks: Sequence[torch.Tensor]) -> None:
    """Refuse a weight that holds NaN or infinity.

    :param name: full name of the module, for the error
    :param dtype: of the weight
    :param peaks: largest magnitude of every chunk, as integers of :func:`magnitudes_of`
    :raises ValueError: naming the module
    """
    if int(torch.stack(list(peaks)).amax()) > _largest(dtype):
        raise ValueError(
            f"weight of {name} holds infinite or undefined values: the checkpoint "
            "is damaged; load an intact one"
        )


def mean_score(parts: Mapping[str, Part]) -> float:
    """Compute the mean of all scores.

    :param parts: as in :func:`block_score`
    :return: the mean
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
    """Find the ``rank``-th smallest score exactly, by a bracket from a random sample.

    The scores below and inside the bracket are counted in one pass. Within a channel the float32
    score grows with ``|w|``, so ``score <= t`` holds exactly if ``|w|`` is at most the channel's
    threshold for t. The bits of non-negative floats compare like integers. So the pass compares
    integers of the weight's width, and multiplies only the few weights inside the bracket.

    :param parts: as in :func:`block_score`
    :param rank: from 1 to the number of weights
    :return: the score
    :raises ValueError: if a weight is not finite (names the module)
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
            # If very many scores are equal, such as zeros, the end of the bracket itself may have
            # the rank.
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
    """Return the sorted scores of randomly drawn weights; the seed is fixed."""
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
    """Find each channel's largest magnitude with a score of at most (``strict``: below) ``limit``.

    :return: bits of the magnitudes as integers of the weight's width, ``[in]``; -1 if even a zero
        weight scores too high
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
    """Return -1 where a magnitude is at most its channel's threshold, else 0.

    The result is the sign of a difference. On the CPU this is several times faster than a
    comparison, because torch does not vectorize comparisons with a boolean result.
    """
    difference = torch.sub(magnitudes, thresholds + 1, out=scratch.like(magnitudes))
    difference >>= 8 * difference.dtype.itemsize - 1
    return difference


def _hits(signs: torch.Tensor) -> torch.Tensor:
    """Count the -1 in a chunk; column sums fit in its dtype, because chunks have few rows."""
    return -signs.sum(0, dtype=signs.dtype).sum()


def count_up_to(parts: Iterable[Part], limit: float, strict: bool) -> int:
    """Count the scores up to a limit.

    :param parts: weight and norms of every Linear, as in :func:`block_score`
    :param limit: of the scores
    :param strict: whether to count scores below the limit only, or those equal to it too
    :return: the number of scores
    """
    total = 0
    for weight, norms in parts:
        thresholds = _thresholds(weight.dtype, norms, limit, strict)
        scratch = _Scratch(weight)
        counts = [_hits(_at_most(chunk, thresholds, scratch)) for chunk in magnitudes_of(weight)]
        total += int(torch.stack(counts).sum())
    return total


def _places(signs: torch.Tensor) -> torch.Tensor:
    """Return the flat indices of the -1 in a chunk, fast if there are few.

    Several narrow integers are viewed as one 64-bit integer first; most of these are 0.
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
    """Count the scores up to ``low``, and collect those strictly between ``low`` and ``high``.

    The same pass checks that the weights are finite.
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
