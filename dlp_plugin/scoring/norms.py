"""Norms of the input channels of Linears, accumulated over all tokens and processes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.utils import get_execution_device
from torch import distributed as dist

from dlp_plugin.precision import widest

__all__ = ["ChannelNorms"]

# Number of tokens whose squares are summed in float32 before they are added to the float64 sum.
_TOKENS = 64


class ChannelNorms:
    """Squared l2 norms of the input channels of many Linears, over all tokens.

    Squares are summed in float32 over 64 tokens, and these sums in float64, whatever the
    activations' dtype. Linears that get the same tensor one after the other (query, key and value;
    gate and up) share one computation.
    """

    def __init__(self) -> None:
        self._squares: dict[str, torch.Tensor] = {}
        self._seen: tuple[torch.Tensor, int] | None = None
        self._seen_squares = torch.empty(0)

    def add(self, name: str, inputs: torch.Tensor) -> None:
        """Add the inputs of one batch.

        :param name: the Linear's full name
        :param inputs: ``[..., in_features]``, any float dtype; without tokens, as for an expert
            that no token was routed to, nothing is added
        """
        if inputs.numel() == 0:
            return
        seen = self._seen
        if seen is None or seen[0] is not inputs or seen[1] != inputs._version:
            self._seen_squares = channel_squares(inputs.detach())
            self._seen = (inputs, inputs._version)
        total = self._squares.get(name)
        squares = self._seen_squares
        self._squares[name] = squares if total is None else total + squares

    def of(self, linears: Mapping[str, torch.nn.Linear]) -> dict[str, torch.Tensor | None]:
        """Compute the norms over all inputs added so far, by all processes of a distributed run.

        In a distributed run all processes must call this with the same Linears at the same time.
        Call it when a block is done: it also frees the last input tensor.

        :param linears: full name to Linear
        :return: full name to float32 ``[in_features]``, or to None if the Linear got no token
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
    """Add up each Linear's sums over all processes; None if no process has any."""
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


def channel_squares(inputs: torch.Tensor) -> torch.Tensor:
    """Sum the squares of each channel.

    :param inputs: ``[..., channels]``
    :return: ``[channels]``, float64 if the device has it
    """
    tokens = inputs.reshape(-1, inputs.shape[-1])
    if tokens.device.type != "cpu":  # launching a kernel per chunk would cost more than it saves
        return tokens.to(widest(tokens.device)).square().sum(0)
    total = torch.zeros(tokens.shape[1], dtype=widest(tokens.device), device=tokens.device)
    for chunk in tokens.split(_TOKENS):
        wide = chunk.to(torch.promote_types(chunk.dtype, torch.float32))
        total += (wide * wide).sum(0)
    return total
