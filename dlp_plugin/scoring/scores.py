"""Block scores: streamed activation norms in, one unimportance per block out.

The score of one weight is ``|W_ij| * ||X_:,j||_2`` in float32 (Wanda's, as DLP uses
it); a block's score is the lower median (the paper) or the mean (the authors' released
code) over every prunable weight of the block. Neither ever holds the scores of a whole
block: the median reads the weights once, as they lie in memory, with a few megabytes
of scratch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.utils import get_execution_device
from torch import distributed as dist

from dlp_plugin.planning.allocation import Statistic
from dlp_plugin.precision import widest

__all__ = ["ChannelNorms", "Part", "block_score", "smallest_score"]

Part = tuple[torch.Tensor, torch.Tensor]

# Elements handled at a time: they stay in a CPU's cache and are no matter of memory,
# and a kernel launch on so many costs nothing.
_CHUNK = 1 << 20
# Tokens whose squares are summed in float32 before they join the float64 sum.
_TOKENS = 64
# Scores drawn to bracket the median; a block with no more than these is sorted whole.
_SAMPLE = 1 << 18
# The bracket's first half-width in ranks of the sample: four standard deviations.
_MARGIN = int(4 * _SAMPLE**0.5 / 2)

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class ChannelNorms:
    """Squared l2 norms of the input channels of many Linears, over all tokens.

    Squares are summed in float32 over a few tokens and in float64 beyond, whatever
    the activations' dtype. Linears that are fed the very same tensor one after the
    other (query, key and value; gate and up) share one computation.
    """

    def __init__(self) -> None:
        self._squares: dict[str, torch.Tensor] = {}
        self._seen: tuple[torch.Tensor, int] | None = None
        self._seen_squares = torch.empty(0)

    def add(self, name: str, inputs: torch.Tensor) -> None:
        """Account for one batch.

        :param name: the Linear's full name
        :param inputs: its input, ``[..., in_features]``, any float dtype; one without
            tokens (an expert that was routed none) counts as never seen
        """
        if inputs.numel() == 0:
            return
        seen = self._seen
        if seen is None or seen[0] is not inputs or seen[1] != inputs._version:
            self._seen_squares = _channel_squares(inputs.detach())
            self._seen = (inputs, inputs._version)
        total = self._squares.get(name)
        squares = self._seen_squares
        self._squares[name] = squares if total is None else total + squares

    def of(self, linears: Mapping[str, torch.nn.Linear]) -> dict[str, torch.Tensor | None]:
        """Norms over all that was added so far, by every process of a distributed run.

        In a distributed run all processes must ask for the same Linears at the same time.
        Lets go of the last input tensor: call when a block is done.

        :param linears: full name to Linear
        :return: for each, float32 ``[in_features]``, or None if it saw no token
        :raises ValueError: if a norm is not finite
        """
        self._seen = None
        squares = {name: self._squares.get(name) for name in linears}
        if is_distributed():
            squares = _summed_over_ranks(squares, linears)
        norms = {}
        for name, square in squares.items():
            norm = norms[name] = None if square is None else square.sqrt().float()
            if norm is not None and not bool(norm.isfinite().all()):
                raise ValueError(
                    f"the inputs of {name} hold infinite or undefined values: check the "
                    "calibration data, or load the model in a wider dtype"
                )
        return norms


def _summed_over_ranks(
    squares: Mapping[str, torch.Tensor | None], linears: Mapping[str, torch.nn.Linear]
) -> dict[str, torch.Tensor | None]:
    """Add up each Linear's sums; one that no process has seen is None."""
    pieces = []
    for name, linear in linears.items():
        square = squares[name]
        piece = torch.zeros(linear.in_features + 1, dtype=torch.float64)
        if square is not None:
            piece[:-1] = square
            piece[-1] = 1
        pieces.append(piece)
    device = get_execution_device(next(iter(linears.values())))
    total = torch.cat(pieces).to(device, widest(device))
    dist.all_reduce(total)
    summed = total.split([len(piece) for piece in pieces])
    return {
        name: piece[:-1] if piece[-1] > 0 else None
        for name, piece in zip(linears, summed, strict=True)
    }


def _channel_squares(inputs: torch.Tensor) -> torch.Tensor:
    """Sum of squares per channel: ``[..., channels]`` to float64 ``[channels]``, where there is."""
    tokens = inputs.reshape(-1, inputs.shape[-1])
    total = torch.zeros(tokens.shape[1], dtype=widest(tokens.device), device=tokens.device)
    for chunk in tokens.split(_TOKENS):
        wide = chunk.to(torch.promote_types(chunk.dtype, torch.float32))
        total += (wide * wide).sum(0)
    return total


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
        _check_dtype(name, weight)
    if statistic == "mean":
        return _mean(parts)
    count = sum(weight.numel() for weight, _ in parts.values())
    return smallest_score(parts, (count + 1) // 2)


def _chunks(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    """Consecutive rows of ``[rows, columns]``, about ``_CHUNK`` elements at a time.

    Never more rows than an int16 can count.
    """
    rows = min(max(_CHUNK // matrix.shape[1], 1), torch.iinfo(torch.int16).max)
    yield from matrix.split(rows)


class _Scratch:
    """A piece of memory that chunks of one weight are worked on in, one by one.

    Fresh memory for every chunk costs more than the arithmetic on it.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        size = min(max(_CHUNK, weight.shape[1]), weight.numel())
        integer = _INTEGER[weight.dtype.itemsize]
        self._memory = torch.empty(size, dtype=integer, device=weight.device)

    def like(self, chunk: torch.Tensor) -> torch.Tensor:
        return self._memory[: chunk.numel()].view(chunk.shape)


def _magnitudes(weight: torch.Tensor) -> Iterator[torch.Tensor]:
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


def _check_dtype(name: str, weight: torch.Tensor) -> None:
    """Refuse a weight that is not of a float type."""
    if weight.dtype.itemsize not in _INTEGER or not weight.is_floating_point():
        raise ValueError(
            f"weight of {name} is {weight.dtype}; scoring takes bfloat16, float16, "
            "float32 or float64: load the model dequantized"
        )


def _check_finite(name: str, dtype: torch.dtype, peaks: Sequence[torch.Tensor]) -> None:
    """Refuse a weight whose largest magnitudes, per chunk, are not numbers."""
    if int(torch.stack(list(peaks)).amax()) > _largest(dtype):
        raise ValueError(
            f"weight of {name} holds infinite or undefined values: the checkpoint "
            "is damaged; load a sound one"
        )


def _mean(parts: Mapping[str, Part]) -> float:
    total, count = 0.0, 0
    for name, (weight, norms) in parts.items():
        _check_finite(name, weight.dtype, [chunk.amax() for chunk in _magnitudes(weight)])
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
    if count <= _SAMPLE:
        for name, (weight, _) in parts.items():
            _check_finite(name, weight.dtype, [chunk.amax() for chunk in _magnitudes(weight)])
        scores = torch.cat([_scores(*part).flatten() for part in parts.values()])
        return float(scores.kthvalue(rank).values)

    sample = _sampled_scores(list(parts.values()), count)
    centre, margin = len(sample) * rank // count, _MARGIN
    while True:
        lowest, highest = centre - margin, centre + margin
        low = float(sample[lowest]) if lowest >= 0 else -1.0
        high = float(sample[highest]) if highest < len(sample) else torch.inf
        at_most_low, between = _count_and_collect(parts, low, high)
        if rank <= at_most_low:
            # Few scores can be equal to one another by chance, many only by nature
            # (zeros); then the bracket's end itself is the one.
            if _count(parts.values(), low, strict=True) < rank:
                return low
        elif rank <= at_most_low + len(between):
            return float(between.kthvalue(rank - at_most_low).values)
        elif rank <= _count(parts.values(), high, strict=False):
            return high
        margin *= 4


def _scores(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    return weight.abs().float() * norms


def _sampled_scores(parts: Sequence[Part], count: int) -> torch.Tensor:
    """Sorted scores at random places; the seed is fixed, so runs repeat exactly."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for weight, norms in parts:
        size = -(-_SAMPLE * weight.numel() // count)
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


def _count(parts: Iterable[Part], limit: float, strict: bool) -> int:
    """Number of scores at most (below) ``limit``."""
    total = 0
    for weight, norms in parts:
        thresholds = _thresholds(weight.dtype, norms, limit, strict)
        scratch = _Scratch(weight)
        counts = [_hits(_at_most(chunk, thresholds, scratch)) for chunk in _magnitudes(weight)]
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
        for chunk in _magnitudes(weight):
            peaks.append(chunk.amax())
            low_side = _at_most(chunk, up_to_low, low_scratch)
            counts.append(_hits(low_side))
            inside = _at_most(chunk, below_high, high_scratch)
            inside &= low_side.bitwise_not_()
            places = _places(inside)
            values = chunk.flatten()[places].view(weight.dtype)
            between.append(_scores(values, norms[places % weight.shape[1]]))
        _check_finite(name, weight.dtype, peaks)
        total += int(torch.stack(counts).sum())
    return total, torch.cat(between)
