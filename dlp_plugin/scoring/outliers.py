"""OWL's block score: the percentage of outliers among a block's weight scores."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dlp_plugin.scoring.scores import Part, check_dtype, count_up_to, mean_score

__all__ = ["outlier_ratio"]


def outlier_ratio(parts: Mapping[str, Part], multiple: float) -> float:
    """Compute the percentage of a block's weight scores above ``multiple`` times their mean.

    This is OWL's layerwise outlier distribution (arXiv 2310.05175, section 3.2). The scores are
    ``|W_ij| * ||X_:,j||_2`` in float32. Mean and percentage are taken over all Linears of the
    block together (luuyin/OWL, ``lib/prune_all.py``: the scores are concatenated before
    ``check_outlier_mean``). Only scores strictly above the limit count. The released code divides
    the squared norms by the number of sequences; this factor is the same for a whole block, so it
    cancels. There is one difference to that code: the mean is summed with more precision than
    float32, so a score within float32 rounding of the limit may be counted differently.

    Example: scores 1, 1, 1, 9 and multiple 2. The mean is 3, the limit 6, and one score
    of four is above it: 25.0.

    The scores are not stored: a few megabytes of memory are needed, whatever the block's size.

    :param parts: full name to a Linear's weight ``[out, in]``, any float dtype, and the
        l2 norms of its input channels, float32 ``[in]``, finite and not negative
    :param multiple: ``M`` of the paper, finite and above 0; 5 for LLaMA-7B
    :return: in [0, 100]; 0 if all scores are 0
    :raises ValueError: if ``multiple`` is out of bounds, or a weight is not finite or
        not of a float dtype (names the module)
    """
    if not (math.isfinite(multiple) and multiple > 0):
        raise ValueError(
            f"multiple must be finite and above 0, got {multiple}; scores above this multiple of "
            "their mean are outliers, e.g. 5"
        )
    for name, (weight, _) in parts.items():
        check_dtype(name, weight)
    limit = multiple * mean_score(parts)
    count = sum(weight.numel() for weight, _ in parts.values())
    return 100 * (count - count_up_to(parts.values(), limit, strict=False)) / count
