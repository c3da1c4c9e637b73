"""What weights a Linear should keep, and what they should be: least squares on its inputs.

    W  [out, in]   the dense weight
    G  [in, in]    Gram matrix X^T X of the inputs X [tokens, in], or any multiple of it
    M  [out, in]   which weights are kept
    Z  [out, in]   what they become:  min trace((Z - W) G (Z - W)^T),  Z = 0 where M is 0

Inputs are brought to norm 1 first, with n = sqrt(diag G): G becomes G / (n n^T) + dampening * I,
and W becomes W * n.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from dlp_plugin.planning.structure import MaskStructure
from dlp_plugin.pruning.smallest import smallest, smallest_of_groups

__all__ = ["LeastSquares"]

# Weights that are polished at a time (rows are independent of each other), in six copies.
_WEIGHTS = 1 << 24
# ADMM (Boyd et al. 2011): so many steps with each of these penalties on what differs from the mask
# (section 3.4.1), over-relaxation (3.4.3), and how early weights go, as a power of the steps that
# are left. Less than the last penalty, and masks swing to and fro on some Linears.
STEPS, PENALTIES = 5, (0.1, 0.2, 0.4, 0.8)
RELAXATION = 1.6
EARLY = 8
# Conjugate gradients: at most so many steps, and none after one that took less than this part of
# the error.
POLISHING, TOLERANCE = 20, 3e-4


class LeastSquares:
    """The problem of one Linear, in inputs of norm 1.

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
        """The kept weights moved towards the optimum for their mask, by conjugate gradients.

        All rows at once take steps of the method (Hestenes and Stiefel, 1952; for this problem
        ALPS, arXiv 2406.07831, section 3.3); with as many as a row keeps weights it is exact but
        for rounding.

        :param dense: ``[out, in]``, any dtype
        :param pruned: ``[out, in]``; what is zero in it stays so
        :param steps: at most
        :param tolerance: none follows a step that took less than this part of the squared error
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
            length = torch.where(along > 0, square / along, 0)  # 0 for a row that is there
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
        """Weights and mask at once, by the alternating direction method of multipliers.

        ArXiv 2401.02938, algorithm 1, with the mask found gradually (there in section 3.3), a
        penalty rho that rises, as in ALPS (arXiv 2406.07831), and over-relaxation a: with ``t`` of
        20 steps taken, ``1 - (1 - t / 20)^8`` of what is to go has gone.

            V = a V + (1 - a) Z;   M is 0 for the least |V + U|
            Z = (V + U) M;   U = U + V - Z;   V = W + rho (Z - U - W) (G + rho I)^-1

        Some seven copies of the weight in float32 are in memory, and three of the Gram matrix.

        :param dense: ``[out, in]``, any dtype
        :param sparsity: ``int(out * in * sparsity)`` weights go
        :param structure: with an N:M as many of every M, as ``sparsity`` says
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
                if taken:  # before, it is the weight itself
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
    """Which weights go, a share of those that will in the end; of equal ones the first.

    :param scores: at least 0, ``[out, in]``
    :param structure: without one the least of all go; with one the least of those that are
        among the least of their group
    :return: bool ``[out, in]``
    """
    if not structure:
        return smallest(scores, int(int(scores.numel() * sparsity) * share))
    gone = smallest_of_groups(scores, structure.number(sparsity), structure.m)
    if share < 1:
        candidates = scores.masked_fill(~gone, torch.finfo(scores.dtype).max)
        gone = smallest(candidates, int(int(gone.sum()) * share))
    return gone
