"""AlphaPruning's score: the power-law exponent of a block's spectra."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from dlp_plugin.precision import widest
from dlp_plugin.scoring.choices import Tail
from dlp_plugin.scoring.scores import check_dtype, check_finite, magnitudes_of

__all__ = ["block_exponent", "power_law_exponent"]

# Eigenvalues below this share of the largest are rounding errors of the Gram matrix, and
# so are differences between eigenvalues: some n * 2.2e-16, and n is a few thousand.
_NOISE = 1e-12
# Elements of a weight that are widened to float64 at a time (32 MB).
WIDE = 1 << 22
# Bins of the histogram whose highest bar is the peak (the released code's number).
_BINS = 100


def power_law_exponent(name: str, weight: torch.Tensor, tail: Tail = "peak") -> float:
    """Exponent of a power law fitted to the eigenvalues of ``W^T W`` (PL_Alpha_Hill).

    AlphaPruning (arXiv 2410.10912, section 3.1; haiquanlu/AlphaPruning,
    ``lib/esd_utils.py``, ``net_esd_estimator``). With the ``n`` eigenvalues in ascending
    order and a tail that starts at the one with index ``i`` (from 0), Hill's estimate is

        1 + (n - i) / sum over j >= i of log(eigenvalue_j / eigenvalue_i)

    As in the released code the tail's first eigenvalue counts as one of its ``n - i``,
    which the paper's formula leaves out. The tail starts

    - ``peak`` (the released code's default, in all its scripts): where the fit has the
      least Kolmogorov-Smirnov distance, among the starts from ``log10(0.95 p)`` to
      ``1.5 p``; ``p`` is the left edge of the fullest of 100 bins of the eigenvalues'
      logarithms. The missing power of ten in the lower bound is the released code's and
      kept, as published results rest on it; it makes the exponent depend a little on
      the weight's scale;
    - ``median`` (its ``alpha_mid``): at ``i = n // 2``, whatever the scale.

    Example: eigenvalues 1, e, e^2, e^3. From the median the tail is e^2, e^3, and the
    exponent 1 + 2 / (0 + 1) = 3.

    The eigenvalues are those of the smaller Gram matrix in float64, on the weight's
    device: several times faster than singular values in float32, which the released
    code squares (on two CPU cores 5 s against 39 for 2048 x 5504), and closer, as
    an error is at most some 1e-15 of the largest eigenvalue. What is 0 but for rounding
    (under 1e-12 of the largest) is left out, where the released code takes its
    logarithm.

    :param name: the module's full name, for errors
    :param weight: ``[out, in]``, any float dtype
    :param tail: ``peak`` or ``median``
    :return: above 1; small for a heavy tail (a layer that is well trained)
    :raises ValueError: if the weight is not finite or not of a float dtype, or if no
        power law fits: fewer than two eigenvalues that are not 0, or none in the tail
        that differs from another; names the module
    """
    check_dtype(name, weight)
    if min(weight.shape) >= 2:  # a vector has one eigenvalue
        weight = weight.detach()
        check_finite(name, weight.dtype, [chunk.amax() for chunk in magnitudes_of(weight)])
        logs = _log_spectrum(weight)
        if len(logs) >= 2:
            exponent = _from_median(logs) if tail == "median" else _from_peak(logs)
            if math.isfinite(exponent):
                return exponent
    raise ValueError(
        f"no power law fits the eigenvalues of {name}, {list(weight.shape)}: their tail needs at "
        "least two that are neither 0 nor equal; leave the module out of the pruning, or take "
        "another method"
    )


def block_exponent(weights: Mapping[str, torch.Tensor], tail: Tail = "peak") -> float:
    """Exponent of one block: the mean over its Linears, each counting the same.

    AlphaPruning's default ``--mapping_type block_wise`` (haiquanlu/AlphaPruning,
    ``lib/prune.py``, ``ww_sparsity``; section 3.2 of the paper). Sizes do not weigh in.

    :param weights: full name to a Linear's weight ``[out, in]``; at least one
    :param tail: where each spectrum's tail starts, see :func:`power_law_exponent`
    :return: above 1
    :raises ValueError: as :func:`power_law_exponent`, or if there is no weight
    """
    if not weights:
        raise ValueError("a block's exponent is a mean over its Linears, got none")
    exponents = [power_law_exponent(name, weight, tail) for name, weight in weights.items()]
    return math.fsum(exponents) / len(exponents)


def _log_spectrum(weight: torch.Tensor) -> torch.Tensor:
    """Natural logarithms of the eigenvalues that are not 0, ascending; float64 on the CPU.

    :param weight: finite, ``[out, in]``
    """
    if widest(weight.device) != torch.float64:
        weight = weight.cpu()
    wide = weight if weight.shape[0] <= weight.shape[1] else weight.T
    size = wide.shape[0]
    gram = torch.zeros(size, size, dtype=torch.float64, device=weight.device)
    for columns in wide.split(max(WIDE // size, 1), dim=1):
        columns = columns.double()
        gram.addmm_(columns, columns.T)
    eigenvalues: torch.Tensor = torch.linalg.eigvalsh(gram).cpu()
    return eigenvalues[eigenvalues > _NOISE * eigenvalues[-1].clamp(min=0)].log()


def _hill(logs: torch.Tensor) -> torch.Tensor:
    """Hill's estimate for a tail that starts at each eigenvalue; inf where it is flat."""
    sizes = torch.arange(len(logs), 0, -1)
    excess = logs.flip(0).cumsum(0).flip(0) - sizes * logs
    return torch.where(logs[-1] - logs > _NOISE, 1 + sizes / excess, torch.inf)


def _from_median(logs: torch.Tensor) -> float:
    return float(_hill(logs)[len(logs) // 2])


def _from_peak(logs: torch.Tensor) -> float:
    """The exponent with the best fit among the starts up to the peak; inf if none."""
    lowest, highest = float(logs[0]), float(logs[-1])
    if highest - lowest <= _NOISE:
        return math.inf
    counts = torch.histc(logs, _BINS, min=lowest, max=highest)
    peak = math.exp(lowest + (highest - lowest) * int(counts.argmax()) / _BINS)
    eigenvalues, exponents = logs.exp(), _hill(logs)
    allowed = (eigenvalues >= math.log10(0.95 * peak)) & (eigenvalues <= 1.5 * peak)
    best, closest = math.inf, math.inf
    for start in (allowed & exponents.isfinite()).nonzero().flatten().tolist():
        distance = _distance(logs[start:], float(exponents[start]))
        if distance < closest:
            best, closest = float(exponents[start]), distance
    return best


def _distance(logs: torch.Tensor, exponent: float) -> float:
    """Kolmogorov-Smirnov distance of a tail from the power law that starts with it."""
    fitted = 1 - ((1 - exponent) * (logs - logs[0])).exp()
    seen = torch.arange(len(logs), dtype=torch.float64) / len(logs)
    return float((fitted - seen).abs().max())
