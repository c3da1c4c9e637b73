"""Which weights of a Linear are pruned at a sparsity, by the scores of the stage that prunes it.

Wanda's mask follows at any sparsity from the weight and the norms of its input channels (arXiv
2306.11695): in each row the weights with the smallest ``|W| * norm`` go, or in each M consecutive
weights of a row. Magnitude's follows from the weight alone: of the whole matrix the smallest go.
What is kept is one threshold per row (or matrix) and sparsity, or for groups of M each weight's
place in its group (a byte), not a second model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from compressed_tensors.utils import get_execution_device

from dlp_plugin.planning.structure import MaskStructure

__all__ = ["REMEMBERED", "Masks"]

# Rows of a weight whose groups are sorted together, which takes 16 bytes a weight.
_ROWS = 256
# Weights that are looked at together: on a CPU so many a thread, whose scores stay in its cache.
_CACHED, _LAUNCHED = 1 << 16, 1 << 26
# Sparsities per Linear whose thresholds are kept.
REMEMBERED = 16


class Masks:
    """Masks of many Linears at any sparsity.

    :param linears: full name to Linear, those that are to be pruned
    :param norms: full name to the l2 norms of the Linear's input channels, float32 ``[in]``
    :param by_magnitude: full names of the Linears that magnitude prunes; the others go by
        Wanda's scores
    """

    def __init__(
        self,
        linears: Mapping[str, torch.nn.Linear],
        norms: Mapping[str, torch.Tensor],
        by_magnitude: Collection[str] = (),
    ) -> None:
        self.linears = linears
        self.norms = norms
        self.by_magnitude = frozenset(by_magnitude)
        self._thresholds: dict[tuple[str, int], torch.Tensor] = {}
        self._places: dict[str, torch.Tensor] = {}
        self._grouped = 0
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads)

    @property
    def bytes_kept(self) -> int:
        """Memory that thresholds and places take."""
        kept = [*self._thresholds.values(), *self._places.values()]
        return sum(tensor.nbytes for tensor in kept)

    def count(self, name: str, sparsity: float, structure: MaskStructure) -> int:
        """How many weights of each group, row or matrix go, as the stage counts them."""
        if structure:
            return structure.number(sparsity)
        return int(self._ranked_together(name) * sparsity)

    @torch.no_grad()
    def masked(
        self,
        name: str,
        count: int,
        structure: MaskStructure,
        weight: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """The weight with zeros where weights go.

        :param count: as :meth:`count` gives it
        :param weight: the Linear's, ``[out, in]``, on the device to compute on
        :param dtype: of what is returned
        """
        found = torch.empty_like(weight, dtype=dtype)
        if structure:
            places = self._place(name, structure.m)
        else:
            threshold = self._threshold(name, count).to(weight.device).expand(len(weight), 1)
        for rows in self._portions(weight):
            if structure:
                kept = (places[rows].to(weight.device) >= count).flatten(1)
            else:
                kept = self._scores(name, weight[rows]) > threshold[rows]
            torch.mul(weight[rows], kept, out=found[rows])
        return found

    def near(
        self,
        name: str,
        count: int,
        structure: MaskStructure,
        rows: slice,
        weight: torch.Tensor,
        share: float,
    ) -> torch.Tensor:
        """Which weights lie at the threshold: the last that go and the first that stay.

        :param rows: those to look at
        :param weight: these rows ``[n, in]`` of the Linear's
        :param share: of those that are ranked together, on either side; with N:M one
        :return: bool ``[n, in]``, at least one of each row (or of the matrix)
        """
        if structure:
            places = self._place(name, structure.m)[rows].to(weight.device)
            last = min(max(count, 1), structure.m - 1)
            return ((places == last) | (places == last - 1)).view(weight.shape)
        scores = self._scores(name, weight)
        if name in self.by_magnitude:
            scores = scores.view(1, -1)
        together = scores.shape[1]
        count = count * together // self._ranked_together(name)  # of a matrix, in these rows
        width = max(1, int(share * together))
        low, high = self._smallest(scores.clone(), count - width, count + width)
        # a row of equal scores there, as the zeros of a model that is pruned already, has them all
        return (((scores > low) | (scores == high)) & (scores <= high)).view(weight.shape)

    def _ranked_together(self, name: str) -> int:
        linear = self.linears[name]
        rows = linear.out_features if name in self.by_magnitude else 1
        return rows * linear.in_features

    def _scores(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """What the stage ranks by, float32 ``[n, in]``."""
        magnitudes = weight.abs().float()
        if name in self.by_magnitude:
            return magnitudes
        return magnitudes.mul_(self.norms[name].to(weight.device))

    def _weight(self, name: str) -> torch.Tensor:
        linear = self.linears[name]
        return linear.weight.detach().to(get_execution_device(linear))

    @torch.no_grad()
    def _place(self, name: str, m: int) -> torch.Tensor:
        """Each weight's place in its group by score, from 0, uint8 ``[out, groups, m]``."""
        if self._grouped != m:
            self._places.clear()  # a byte a weight, for one structure at a time
            self._grouped = m
        if name not in self._places:
            weight = self._weight(name)
            places, number = [], torch.uint8 if m <= 256 else torch.int32
            for rows in weight.split(_ROWS):
                scores = self._scores(name, rows)
                order = scores.unflatten(1, (-1, m)).argsort(dim=2, stable=True)
                places.append(order.argsort(dim=2).to(number))
            self._places[name] = torch.cat(places)
        return self._places[name]

    @torch.no_grad()
    def _threshold(self, name: str, count: int) -> torch.Tensor:
        """The score up to which ``count`` weights go, float32 ``[rows, 1]``."""
        if (name, count) not in self._thresholds:
            weight = self._weight(name)
            if name in self.by_magnitude:
                (found,) = self._smallest(self._scores(name, weight).view(1, -1), count)
            else:
                of_rows = [
                    self._smallest(self._scores(name, weight[rows]), count)[0]
                    for rows in self._portions(weight)
                ]
                found = torch.cat(of_rows)
            if len(self._thresholds) >= REMEMBERED * len(self.linears):
                del self._thresholds[next(iter(self._thresholds))]  # the oldest
            self._thresholds[name, count] = found
        return self._thresholds[name, count]

    def _portions(self, weight: torch.Tensor) -> Iterator[slice]:
        """Consecutive rows of ``[rows, columns]``."""
        together = _CACHED * self._threads if weight.device.type == "cpu" else _LAUNCHED
        rows = max(1, together // weight.shape[1])
        return (slice(first, first + rows) for first in range(0, len(weight), rows))

    def _smallest(self, scores: torch.Tensor, *counts: int) -> list[torch.Tensor]:
        """The scores in each row up to which so many lie, ``[rows, 1]``; below all for none.

        :param scores: ``[rows, n]``; used up
        :param counts: in rising order
        """
        found, first = [], 0
        for count in counts:
            last = min(count, scores.shape[1]) - 1
            if last < 0:
                found.append(scores.new_full((len(scores), 1), -1.0))
            elif scores.device.type != "cpu":
                found.append(scores.kthvalue(last + 1, dim=1, keepdim=True).values)
            else:  # numpy selects several times as fast as torch, and lets threads run
                parts = np.array_split(scores[:, first:].numpy(), self._threads)
                place = last - first
                list(self._pool.map(lambda part, k=place: part.partition(k, axis=1), parts))
                found.append(scores[:, last : last + 1].clone())
                first = last  # what lies behind is at least as large
        return found
