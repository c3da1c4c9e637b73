"""Marks an exact number of the smallest weights of a matrix; of equal weights the first."""

from __future__ import annotations

import torch

from dlp_plugin.scoring.scores import check_finite, magnitudes_of, smallest_score

__all__ = ["smallest", "smallest_of_groups"]


def smallest(weight: torch.Tensor, count: int, name: str = "the matrix") -> torch.Tensor:
    """Mark exactly ``count`` weights of the smallest magnitude; of equal ones the first.

    :param weight: ``[out, ...]``, any float type; magnitudes are compared in float32
    :param count: how many weights to mark
    :param name: of the matrix, for the error
    :raises ValueError: if a weight is not finite
    """
    if not count:
        return torch.zeros_like(weight, dtype=torch.bool)
    matrix = weight.flatten(1)
    magnitudes = matrix.abs().flatten()
    magnitudes = magnitudes if magnitudes.itemsize <= 4 else magnitudes.float()
    threshold: float | torch.Tensor
    if weight.device.type == "cpu":
        ones = torch.ones(matrix.shape[1])
        threshold = smallest_score({name: (matrix, ones)}, count)
    else:  # a GPU sorts faster than it makes several passes
        check_finite(name, weight.dtype, [chunk.amax() for chunk in magnitudes_of(matrix)])
        threshold = magnitudes.sort().values[count - 1]
    marked = magnitudes < threshold
    equal = (magnitudes == threshold).nonzero()[: count - int(marked.sum())]
    marked[equal] = True
    return marked.view(weight.shape)


def smallest_of_groups(scores: torch.Tensor, number: int, m: int) -> torch.Tensor:
    """Mark the smallest of every M consecutive scores of a row; of equal ones the first.

    :param scores: ``[out, in]``
    :param number: how many of every M scores to mark
    :param m: M
    :return: bool ``[out, in]``
    """
    groups = scores.unflatten(1, (-1, m))
    order = groups.argsort(dim=2, stable=True)[..., :number]
    marked = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order, True)
    return marked.view(scores.shape)
