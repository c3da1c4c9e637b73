"""AlphaPruning's block score: the power-law exponent of the spectra of a block's weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from dlp_plugin.precision import widest
from dlp_plugin.scoring.choices import Tail
from dlp_plugin.scoring.scores import check_dtype, check_finite, magnitudes_of

__all__ = ["block_exponent", "power_law_exponent"]

# Eigenvalues below this fraction of the largest, and smaller differences between the logarithms of
# eigenvalues, are rounding errors: these are about n * 2.2e-16, where n is a few thousand.
_NOISE = 1e-12
# Elements of a weight that are converted to float64 at a time (32 MB).
WIDE = 1 << 22
# Number of histogram bins for finding the peak (that of the released code).
_BINS = 100


def power_law_exponent(name: str, weight: torch.Tensor, tail: Tail = "peak") -> float:
    """Fit a power law to the eigenvalues of ``W^T W``, and return its exponent (PL_Alpha_Hill).

    Source: AlphaPruning (arXiv 2410.10912, section 3.1; haiquanlu/AlphaPruning,
    ``lib/esd_utils.py``, ``net_esd_estimator``). Let the ``n`` eigenvalues be in ascending order,
    and let the tail start at index ``i`` (from 0). Then Hill's estimate is

        1 + (n - i) / sum over j >= i of log(eigenvalue_j / eigenvalue_i)

    As in the released code, the tail's first eigenvalue is one of the ``n - i``; the paper's
    formula leaves it out. The tail starts

    - with ``peak`` (the default in all scripts of the released code): at the best fit, which is
      the least Kolmogorov-Smirnov distance, among starts from ``log10(0.95 p)`` to ``1.5 p``.
      ``p`` is the left edge of the fullest of 100 bins of the eigenvalues' logarithms. In the
      lower bound the released code forgets to raise 10 to that power. This is kept, because
      published results depend on it. It makes the exponent depend slightly on the weight's scale;
    - with ``median`` (``alpha_mid`` of the released code): at ``i = n // 2``, for any scale.

    Example: eigenvalues 1, e, e^2, e^3. From the median the tail is e^2, e^3, and the
    exponent 1 + 2 / (0 + 1) = 3.

    The eigenvalues are computed from the smaller Gram matrix in float64, on the weight's device.
    The released code squares singular values in float32. That is several times slower (39 instead
    of 5 s for 2048 x 5504 on two CPU cores) and less exact: here the error is about 1e-15 of the
    largest eigenvalue. Eigenvalues below 1e-12 of the largest are left out, because they are 0
    except for rounding; the released code takes their logarithm.

    :param name: the module's full name, for errors
    :param weight: ``[out, in]``, any float dtype
    :param tail: ``peak`` or ``median``
    :return: above 1; small for a heavy tail, as of a well-trained layer
    :raises ValueError: naming the module, if the weight is not finite or not of a float dtype, or
        if no power law fits: there are fewer than two eigenvalues other than 0, or all eigenvalues
        of the tail are equal
    """
    check_dtype(name, weight)
    if min(weight.shape) >= 2:  # a vector has only one eigenvalue
        weight = weight.detach()
        check_finite(name, weight.dtype, [chunk.amax() for chunk in magnitudes_of(weight)])
        logs = _log_spectrum(weight)
        if len(logs) >= 2:
            exponent = _from_median(logs) if tail == "median" else _from_peak(logs)
            if math.isfinite(exponent):
                return exponent
    raise ValueError(
        f"no power law fits the eigenvalues of {name}, {list(weight.shape)}: the tail needs at "
        "least two different eigenvalues other than 0; leave the module out of the pruning, or "
        "use another method"
    )


def block_exponent(weights: Mapping[str, torch.Tensor], tail: Tail = "peak") -> float:
    """Compute the exponent of one block: the unweighted mean over its Linears.

    This is AlphaPruning's default ``--mapping_type block_wise`` (haiquanlu/AlphaPruning,
    ``lib/prune.py``, ``ww_sparsity``; section 3.2 of the paper).

    :param weights: full name to a Linear's weight ``[out, in]``; at least one
    :param tail: where each spectrum's tail starts, see :func:`power_law_exponent`
    :return: above 1
    :raises ValueError: as :func:`power_law_exponent` does, and if there are no weights
    """
    if not weights:
        raise ValueError("a block's exponent is the mean over its Linears, but there are none")
    exponents = [power_law_exponent(name, weight, tail) for name, weight in weights.items()]
    return math.fsum(exponents) / len(exponents)


def _log_spectrum(weight: torch.Tensor) -> torch.Tensor:
    """Return the natural logarithms of the eigenvalues other than 0, ascending, in float64.

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
    """Return Hill's estimate for the tail from each eigenvalue on; inf if the tail is constant."""
    sizes = torch.arange(len(logs), 0, -1)
    excess = logs.flip(0).cumsum(0).flip(0) - sizes * logs
    return torch.where(logs[-1] - logs > _NOISE, 1 + sizes / excess, torch.inf)


def _from_median(logs: torch.Tensor) -> float:
    return float(_hill(logs)[len(logs) // 2])


def _from_peak(logs: torch.Tensor) -> float:
    """Return the exponent of the best fit among the allowed starts; inf if there is none."""
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
    """Return the Kolmogorov-Smirnov distance between a tail and the power law fitted to it."""
    fitted = 1 - ((1 - exponent) * (logs - logs[0])).exp()
    seen = torch.arange(len(logs), dtype=torch.float64) / len(logs)
    return float((fitted - seen).abs().max())
