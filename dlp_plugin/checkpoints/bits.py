"""Bits, pairs of four bits and words of 32 in tensors of bytes, the lowest first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "eight_of_a_byte",
    "integers_of_words",
    "mask_of",
    "nibbles_of",
    "ones",
    "packed",
    "words_for",
    "words_of_integers",
]

# Times a word of eight bytes that are 0 or 1: brings byte j's bit to place 56 + j.
_GATHER = sum(1 << (56 - 7 * j) for j in range(8))


def mask_of(present: Tensor) -> Tensor:
    """What is True, a bit each: uint8 ``[rows, ceil(columns / 8)]``.

    :param present: bool ``[rows, columns]``
    """
    rows, columns = present.shape
    eights = pad(present, (0, -columns % 8)).flatten().view(torch.int64)
    return (eights * _GATHER >> 56 & 0xFF).to(torch.uint8).view(rows, -(-columns // 8))


def ones(mask: Tensor) -> Tensor:
    """How many bits of each row are set: int64 ``[rows]``.

    :param mask: uint8 ``[rows, bytes]``
    """
    pairs = mask - (mask >> 1 & 0x55)
    fours = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return (fours + (fours >> 4) & 0xF).sum(1)


def eight_of_a_byte(device: torch.device) -> Tensor:
    """For every byte of a mask its eight bits, as eight bytes in one word: int64 ``[256]``."""
    byte, place = torch.arange(256, device=device)[:, None], torch.arange(8, device=device)
    return (byte >> place & 1).to(torch.uint8).view(torch.int64).flatten()


def nibbles_of(pairs: Tensor) -> Tensor:
    """The numbers of four bits in bytes that hold two each: uint8 ``[2 n]``.

    :param pairs: uint8 ``[n]``
    """
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten()


def packed(values: Tensor, bits: int) -> Tensor:
    """Integers uint8 ``[n]`` of 8 bits as they are, those of 4 two in a byte."""
    if bits == 8:
        return values
    pairs = pad(values, (0, len(values) % 2)).view(-1, 2)
    return pairs[:, 0] | pairs[:, 1] << 4


def words_for(count: int, bits: int) -> int:
    """How many words of 32 bits hold a number of integers."""
    return -(-count * bits // 32)


def integers_of_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """Unsigned integers uint8 ``[rows, columns]`` of words as compressed-tensors packs them.

    :param words: int32 ``[rows, ceil(columns * bits / 32)]``
    :param bits: 4 or 8
    """
    # A word's bytes lie the lowest first, as safetensors and the processors have them.
    found = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 4:
        found = nibbles_of(found.flatten()).view(len(found), -1)
    return found[:, :columns]


def words_of_integers(integers: Tensor, bits: int) -> Tensor:
    """The words that :func:`integers_of_words` reads; what fills the last of a row is zero.

    :param integers: uint8 ``[rows, columns]``
    :param bits: 4 or 8
    """
    rows, columns = integers.shape
    words = words_for(columns, bits)
    filled = pad(integers, (0, words * 32 // bits - columns))
    return packed(filled.flatten(), bits).view(torch.int32).view(rows, words)
