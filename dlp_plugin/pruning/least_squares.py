"""Finds the mask and the remaining weights of a Linear by least squares on its outputs.

    W  [out, in]   the dense weight
    G  [in, in]    Gram matrix X^T X of the inputs X [tokens, in], or any multiple of it
    M  [out, in]   the mask: 1 for weights that are kept
    Z  [out, in]   the pruned weight:  min trace((Z - W) G (Z - W)^T),  Z = 0 where M is 0

Input channels are scaled to norm 1 first, with n = sqrt(diag G): G becomes
G / (n n^T) + dampening * I, and W becomes W * n.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from dlp_plugin.planning.structure import MaskStructure
from dlp_plugin.pruning.smallest import smallest, smallest_of_groups

__all__ = ["LeastSquares"]

# Number of weights that are polished at a time, in six copies; rows are independent of each other.
_WEIGHTS = 1 << 24
# ADMM (Boyd et al. 2011): number of steps with each of the penalties rho (section 3.4.1). With a
# smaller last penalty the masks of some Linears oscillate.
STEPS, PENALTIES = 5, (0.1, 0.2, 0.4, 0.8)
# Over-relaxation (section 3.4.3), and the exponent of the schedule that prunes most weights early.
RELAXATION = 1.6
EARLY = 8
# Conjugate gradients: largest number of steps, and the relative decrease of the squared error
# below which no further step follows.
POLISHING, TOLERANCE = 20, 3e-4


class LeastSquares:
    """The least-squares problem of one Linear, with input channels scaled to norm 1.

    :param gram: float32 ``[in, in]``
    :param dampening: added to the diagonal, as a fraction of it
    """

    def __init__(self, gram: torch.Tensor, dampening: float) -> None:
        norms = gram.diagonal().clamp_min(0).sqrt()
        self.norms = norms.clamp_min(1e-8 * float(norms.max()) or 1.0)
        self.gram = gram / self.norms / self.norms.unsqueeze(1)
        self.gram.diagonal().add_(dampening)

    def polished(
        self,
        dense: torch.Tensor,
        pruned: torch.Tensor,
        steps: int = POLISHING,
        tolerance: float = TOLERANCE,
    ) -> torch.Tensor:
        """Refit the kept weights for their mask, by conjugate gradients.

        The steps are taken for all rows at once (Hestenes and Stiefel, 1952; for this problem
        ALPS, arXiv 2406.07831, section 3.3). With as many steps as a row has kept weights the
        result would be exact except for rounding.

        :param dense: ``[out, in]``, any dtype
        :param pruned: ``[out, in]``; zeros in it stay zero
        :param steps: largest number of steps
        :param tolerance: stop after a step that lowers the squared error by less than this fraction
        :return: float32 ``[out, in]``
        """
        return torch.cat(
            [
                self._descended(
                    w.float() * self.norms, z.float() * self.norms, z != 0, steps, tolerance
                )
                / self.norms
                for w, z in zip(*map(self._portions, (dense, pruned)), strict=True)
            ]
        )

    def _descended(
        self, dense: torch.Tensor, z: torch.Tensor, mask: torch.Tensor, steps: int, tolerance: float
    ) -> torch.Tensor:
        residual = (dense - z) @ self.gram
        error = ((dense - z) * residual).sum()
        residual.mul_(mask)
        direction = residual.clone()
        square = residual.square().sum(1, keepdim=True)
        for _ in range(steps):
            image = (direction @ self.gram).mul_(mask)
            along = (direction * image).sum(1, keepdim=True)
            length = torch.where(along > 0, square / along, 0)  # 0 if the row has converged
            z = z + length * direction
            taken = (length * square).sum()
            if taken <= tolerance * error:
                break
            error -= taken
            residual = residual - length * image
            before, square = square, residual.square().sum(1, keepdim=True)
            direction = residual + torch.where(before > 0, square / before, 0) * direction
        return z

    def pruned(
        self, dense: torch.Tensor, sparsity: float, structure: MaskStructure
    ) -> torch.Tensor:
        """Find mask and weights together, by the alternating direction method of multipliers.

        This is algorithm 1 of arXiv 2401.02938 with gradual pruning (its section 3.3), a rising
        penalty rho as in ALPS (arXiv 2406.07831), and over-relaxation a. After ``t`` of 20 steps
        the fraction ``1 - (1 - t / 20)^8`` of the weights to prune is pruned.

            V = a V + (1 - a) Z;   M is 0 for the least |V + U|
            Z = (V + U) M;   U = U + V - Z;   V = W + rho (Z - U - W) (G + rho I)^-1

        It needs about seven float32 copies of the weight, and three of the Gram matrix.

        :param dense: ``[out, in]``, any dtype
        :param sparsity: ``int(out * in * sparsity)`` weights are pruned
        :param structure: with N:M, the fraction ``sparsity`` of every M weights is pruned
        :return: float32 ``[out, in]``, zero where pruned
        :raises torch.linalg.LinAlgError: if the Gram matrix is not finite
        """
        dense = dense.float() * self.norms
        v, z, u = dense, dense.clone(), torch.zeros_like(dense)
        number, taken = STEPS * len(PENALTIES), 0
        for before, penalty in pairwise((PENALTIES[0], *PENALTIES)):
            inverse = self._inverse(penalty).mul_(penalty)
            u.mul_(before / penalty)
            for _ in range(STEPS):
                if taken:  # in the first step V is the dense weight
                    v = torch.addmm(dense, z.sub(u).sub_(dense), inverse)
                taken += 1
                u.add_(v, alpha=RELAXATION).add_(z, alpha=1 - RELAXATION)
                gone = least(u.abs(), sparsity, structure, 1 - (1 - taken / number) ** EARLY)
                del v
                z.copy_(u).masked_fill_(gone, 0)
                u.sub_(z)
        return z.div_(self.norms)

    def _inverse(self, penalty: float) -> torch.Tensor:
        matrix = self.gram.clone()
        matrix.diagonal().add_(penalty)
        return torch.cholesky_inverse(torch.linalg.cholesky(matrix))

    def _portions(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = max(1, _WEIGHTS // weight.shape[1])
        return torch.split(weight, rows)


def least(
    scores: torch.Tensor, sparsity: float, structure: MaskStructure, share: float = 1.0
) -> torch.Tensor:
    """Mark the smallest scores; of equal ones the first.

    With N:M the smallest N of every M consecutive scores of a row are candidates; otherwise the
    smallest of all scores.

    :param scores: at least 0, ``[out, in]``
    :param sparsity: fraction of the scores that are candidates
    :param structure: N:M or unstructured
    :param share: fraction of the candidates to mark, the smallest ones
    :return: bool ``[out, in]``
    """
    if not structure:
        return smallest(scores, int(int(scores.numel() * sparsity) * share))
    gone = smallest_of_groups(scores, structure.number(sparsity), structure.m)
    if share < 1:
        candidates = scores.masked_fill(~gone, torch.finfo(scores.dtype).max)
        gone = smallest(candidates, int(int(gone.sum()) * share))
    return gone
